//! Every document: right ones are read, every damaged one is refused by name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic,
    reason = "a test fails by panic"
)]

mod client;

use client::{Client, GrantOf, JobOf, damaged, read_job, seal, unseal};
use myelin_protocol::cbor::Reader;
use myelin_protocol::{
    CHUNK, CHUNK_TAG, Grant, HEADER, HpkeKey, Refusal, Sealed, approve, report_data,
};

fn clients() -> [Client; 2] {
    [Client::new("a", 1), Client::new("researcher", 2)]
}

fn job(clients: &[Client]) -> JobOf<'_> {
    JobOf {
        parties: clients.iter().collect(),
        sends: vec![("records", 0, 10), ("test", 1, 5)],
        receives: vec![("score", None), ("weights", Some(1))],
        steps: 10,
        epsilon: 2_000_000,
        max_batch: 8,
        sample_rate: 1 << 30,
        max_grad_norm: 1_000_000,
        expected_batch: 2_500_000,
        noise_multiplier: 1_000_000,
        weights: [3; 32],
    }
}

fn refusal(document: &[u8]) -> Option<Refusal> {
    read_job(document).err()
}

#[test]
fn a_job_is_read() {
    let clients = clients();
    let document = job(&clients).document();
    let read = read_job(&document).unwrap();
    assert_eq!((read.sends.len(), read.parties.len(), read.receives.len()), (2, 2, 2));
    assert_eq!(read.sends.get(0).unwrap().capacity, 10);
    assert_eq!(read.privacy.expected_batch, 2_500_000);
    assert_eq!(read.receives.get(0).unwrap().party, None);
    assert_eq!(read.weights, [3; 32]);
}

#[test]
fn jobs_that_make_no_sense_are_refused() {
    let clients: &'static [Client] = Box::leak(Box::new(clients()));
    let good = job(clients);
    let wrong = |change: &dyn Fn(&mut JobOf<'_>)| {
        let mut changed = good.clone();
        change(&mut changed);
        refusal(&changed.document())
    };
    let job_wrong = Some(Refusal::JobWrong);
    assert_eq!(wrong(&|_| ()), None);
    assert_eq!(wrong(&|j| j.sends = vec![]), job_wrong);
    assert_eq!(wrong(&|j| j.sends = vec![("test", 0, 1)]), job_wrong);
    assert_eq!(wrong(&|j| j.sends.push(("records", 0, 3))), job_wrong);
    assert_eq!(wrong(&|j| j.sends.push(("weights", 0, 3))), job_wrong);
    assert_eq!(wrong(&|j| j.sends[0].2 = 0), job_wrong);
    assert_eq!(wrong(&|j| j.sends[0].2 = 1 << 32), job_wrong);
    assert_eq!(wrong(&|j| j.sends[0].1 = 2), Some(Refusal::PartyUnknown));
    assert_eq!(wrong(&|j| j.sends[0].0 = "labels"), Some(Refusal::FieldWrong));
    assert_eq!(wrong(&|j| _ = j.sends.pop()), job_wrong, "a score needs a test slot");
    assert_eq!(wrong(&|j| j.receives[1].1 = None), job_wrong, "weights are not public");
    assert_eq!(wrong(&|j| j.receives[0].1 = Some(0)), job_wrong, "a score is public");
    assert_eq!(wrong(&|j| j.receives[1].1 = Some(2)), Some(Refusal::PartyUnknown));
    assert_eq!(wrong(&|j| j.receives.push(("weights", Some(1)))), job_wrong);
    assert_eq!(wrong(&|j| j.receives.push(("records", Some(1)))), job_wrong);
    assert_eq!(wrong(&|j| j.parties.push(&clients[0])), job_wrong);
    assert_eq!(wrong(&|j| j.steps = 0), job_wrong);
    assert_eq!(wrong(&|j| j.max_batch = 0), job_wrong);
    assert_eq!(wrong(&|j| j.sample_rate = (1 << 32) + 1), job_wrong);
    assert_eq!(wrong(&|j| j.max_grad_norm = 0), job_wrong);
    assert_eq!(wrong(&|j| j.expected_batch = 0), job_wrong);
    assert_eq!(wrong(&|j| j.noise_multiplier = 0), job_wrong);
    let long = "x".repeat(65).leak();
    let long: &'static Client = Box::leak(Box::new(Client::new(long, 3)));
    assert_eq!(wrong(&|j| j.parties[0] = long), Some(Refusal::FieldWrong));
    assert_eq!(refusal(&vec![0xa7; 65_537]), Some(Refusal::MessageTooLong));
    let many: Vec<Client> = (1..=17).map(|number| Client::new("p", number)).collect();
    let mut changed = good.clone();
    changed.parties = many.iter().collect();
    assert_eq!(refusal(&changed.document()), Some(Refusal::LimitExceeded));
}

#[test]
fn a_damaged_job_is_refused_or_is_one_that_nobody_approved() {
    let clients = clients();
    let document = job(&clients).document();
    let digest = read_job(&document).unwrap().digest;
    let approvals = clients.each_ref().map(|client| client.approval(&digest));
    let mut read = 0;
    for changed in damaged(&document) {
        if let Ok(other) = read_job(&changed) {
            read += 1;
            for approval in &approvals {
                assert_eq!(approve(&other, approval), Err(Refusal::JobWrong));
            }
        }
    }
    assert!(read > 0, "a flipped bit of a digest is another job");
}

#[test]
fn approvals() {
    let clients = clients();
    let job = read_job(&job(&clients).document()).unwrap();
    let approval = clients[1].approval(&job.digest);
    assert_eq!(approve(&job, &approval), Ok(1));
    assert_eq!(approve(&job, &clients[0].approval(&[0; 32])), Err(Refusal::JobWrong));
    let stranger = Client::new("stranger", 9);
    assert_eq!(approve(&job, &stranger.approval(&job.digest)), Err(Refusal::PartyUnknown));
    for changed in damaged(&approval) {
        assert!(approve(&job, &changed).is_err());
    }
}

#[test]
fn a_signature_has_one_form() {
    let clients = clients();
    let job = read_job(&job(&clients).document()).unwrap();
    let mut approval = clients[0].approval(&job.digest);
    // The other root: s' = n − s is as good in plain ECDSA.
    let order = client::unhex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551");
    let start = approval.len() - 32;
    let mut borrow = 0;
    for i in (0..32).rev() {
        let digit = i32::from(order[i]) - i32::from(approval[start + i]) - borrow;
        borrow = i32::from(digit < 0);
        approval[start + i] = (digit & 0xff) as u8;
    }
    assert_eq!(approve(&job, &approval), Err(Refusal::SignatureWrong));
}

#[test]
fn grants() {
    let clients = clients();
    let job = read_job(&job(&clients).document()).unwrap();
    let instance = HpkeKey::from_seed([5; 32]);
    let public = instance.public().unwrap();
    let good = GrantOf {
        instance: &public,
        job: &job.digest,
        sealed_for: &job.digest,
        slot: "records",
        party: 0,
        key: &[6; 32],
        uses: 1,
        commitment: [8; 32],
    };
    let open = |bytes: &[u8], instance: &HpkeKey| {
        let grant = Grant::read(&job, bytes)?;
        grant.verify(&job)?;
        grant.open(&job, instance).map(|granted| (*granted.key, granted.commitment))
    };
    let grant = clients[0].grant(&good);
    assert_eq!(open(&grant, &instance), Ok(([6; 32], [8; 32])));
    assert_eq!(open(&grant, &HpkeKey::from_seed([4; 32])), Err(Refusal::HpkeFailed));
    let other = |by: usize, change: &dyn Fn(&mut GrantOf<'_>)| {
        let mut changed = good.clone();
        change(&mut changed);
        open(&clients[by].grant(&changed), &instance).unwrap_err()
    };
    assert_eq!(other(1, &|_| ()), Refusal::SignatureWrong);
    assert_eq!(other(0, &|g| g.job = &[0; 32]), Refusal::JobWrong);
    assert_eq!(other(0, &|g| g.sealed_for = &[0; 32]), Refusal::HpkeFailed);
    assert_eq!(other(0, &|g| g.slot = "test"), Refusal::GrantWrong);
    assert_eq!(other(0, &|g| g.slot = "weights"), Refusal::GrantWrong);
    assert_eq!(other(0, &|g| g.party = 1), Refusal::GrantWrong);
    assert_eq!(other(0, &|g| g.party = 2), Refusal::PartyUnknown);
    assert_eq!(other(0, &|g| g.uses = 2), Refusal::GrantWrong);
    for changed in damaged(&grant) {
        assert!(open(&changed, &instance).is_err());
    }
}

#[test]
fn sealed_files() {
    let key = [5; 32];
    for length in [0, 1, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK] {
        let plaintext: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        assert_eq!(unseal(&key, &seal_any(&key, &plaintext)), plaintext);
    }
    let file = seal(&key, &[9; 100]);
    let header: [u8; HEADER] = file[..HEADER].try_into().unwrap();
    let chunk = &file[HEADER..];
    assert_eq!(Sealed::open(&[6; 32], &header).err(), Some(Refusal::KeyCommitmentWrong));
    for changed in damaged(&header).filter(|changed| changed.len() == HEADER) {
        let changed: [u8; HEADER] = changed.try_into().unwrap();
        match Sealed::open(&key, &changed) {
            Err(refusal) => assert!(
                [Refusal::SealedHeaderWrong, Refusal::KeyCommitmentWrong].contains(&refusal)
            ),
            // Another length: the header is AAD of every chunk.
            Ok(sealed) => assert_eq!(decrypt(&sealed, 0, chunk), Err(Refusal::ChunkTagWrong)),
        }
    }
    let sealed = Sealed::open(&key, &header).unwrap();
    for changed in damaged(chunk) {
        assert_eq!(decrypt(&sealed, 0, &changed), Err(Refusal::ChunkTagWrong));
    }
    assert_eq!(decrypt(&sealed, 1, chunk), Err(Refusal::ChunkTagWrong), "another place");
}

/// An empty file has one empty chunk.
fn seal_any(key: &[u8; 32], plaintext: &[u8]) -> Vec<u8> {
    let mut file = seal(key, plaintext);
    if plaintext.is_empty() {
        let sealed = Sealed::open(key, file[..].try_into().unwrap()).unwrap();
        file.extend(sealed.encrypt(0, &mut []).unwrap());
    }
    file
}

fn decrypt(sealed: &Sealed, index: u64, chunk: &[u8]) -> Result<(), Refusal> {
    let mut text = vec![7; chunk.len().saturating_sub(CHUNK_TAG)];
    let result = sealed.decrypt(index, chunk, &mut text);
    assert!(result.is_ok() || text.iter().all(|byte| *byte == 7), "it changed");
    result
}

#[test]
fn only_deterministic_cbor() {
    fn unsigned(bytes: &[u8]) -> Result<u64, Refusal> {
        Reader::document(bytes, Reader::unsigned)
    }
    assert_eq!(unsigned(&[0x17]), Ok(23));
    assert_eq!(unsigned(&[0x18, 24]), Ok(24));
    assert_eq!(unsigned(&[0x1b, 0, 0, 0, 1, 0, 0, 0, 0]), Ok(1 << 32));
    let not_canonical: [&[u8]; 5] = [
        &[0x18, 23],
        &[0x19, 0, 255],
        &[0x1a, 0, 0, 255, 255],
        &[0x1b, 0, 0, 0, 0, 255, 255, 255, 255],
        &[0x1b, 0, 0, 0, 0, 0, 0, 0, 1],
    ];
    for bytes in not_canonical {
        assert_eq!(unsigned(bytes), Err(Refusal::CborNotCanonical));
    }
    assert_eq!(unsigned(&[]), Err(Refusal::CborMalformed));
    assert_eq!(unsigned(&[0x18]), Err(Refusal::CborMalformed));
    assert_eq!(unsigned(&[0, 0]), Err(Refusal::CborMalformed), "trailing byte");
    assert_eq!(unsigned(&[0x20]), Err(Refusal::FieldWrong), "negative");
    assert_eq!(unsigned(&[0xc0, 0]), Err(Refusal::FieldWrong), "tag");
    assert_eq!(unsigned(&[0xf9, 0, 0]), Err(Refusal::FieldWrong), "float");
    let bytes = |bytes: &[u8]| Reader::document(bytes, |r| r.bytes().map(<[u8]>::len));
    assert_eq!(bytes(&[0x41, 7]), Ok(1));
    assert_eq!(bytes(&[0x58, 1, 7]), Err(Refusal::CborNotCanonical));
    assert!(bytes(&[0x5f, 0x41, 7, 0xff]).is_err(), "indefinite");
    assert!(bytes(&[0x5b, 255, 255, 255, 255, 255, 255, 255, 255, 7]).is_err(), "2⁶⁴ bytes");
    assert_eq!(bytes(&[0x61, b'a']), Err(Refusal::FieldWrong), "text");
    let list = |bytes: &[u8]| Reader::document(bytes, |r| r.list(2));
    assert_eq!(list(&[0x80]), Ok(0));
    assert_eq!(list(&[0x98, 0]), Err(Refusal::CborNotCanonical));
    assert_eq!(list(&[0x9f, 0xff]), Err(Refusal::CborNotCanonical), "indefinite");
    assert_eq!(list(&[0x83]), Err(Refusal::LimitExceeded));
    let text = |bytes: &[u8]| Reader::document(bytes, |r| r.text().map(str::len));
    assert_eq!(text(&[0x61, 0xff]), Err(Refusal::CborMalformed), "not UTF-8");
    let map = |bytes: &[u8]| {
        Reader::document(bytes, |r| {
            r.map(2)?;
            let a = r.key("a")?.unsigned()?;
            Ok(a + r.key("b")?.unsigned()?)
        })
    };
    assert_eq!(map(&[0xa2, 0x61, b'a', 1, 0x61, b'b', 2]), Ok(3));
    let field_wrong: [&[u8]; 4] = [
        &[0xa2, 0x61, b'b', 2, 0x61, b'a', 1],
        &[0xa2, 0x61, b'a', 1, 0x61, b'a', 1],
        &[0xa1, 0x61, b'a', 1],
        &[0xa3, 0x61, b'a', 1, 0x61, b'b', 2, 0x61, b'c', 3],
    ];
    for bytes in field_wrong {
        assert_eq!(map(bytes), Err(Refusal::FieldWrong));
    }
}

#[test]
fn report_data_is_what_the_page_says() {
    use std::io::Write;
    let (hpke, sign) = ([2; 1216], [3; 65]);
    let found = report_data(&[1; 32], &hpke, &sign, &[4; 32]);
    // SHA-512 by the system's own tool.
    let mut message = b"myelin/report-data/1\0".to_vec();
    for part in [&[1; 32][..], &hpke, &sign, &[4; 32]] {
        message.extend((part.len() as u32).to_le_bytes());
        message.extend(part);
    }
    let tool = std::process::Command::new("sha512sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let Ok(mut tool) = tool else { return };
    tool.stdin.take().unwrap().write_all(&message).unwrap();
    let output = tool.wait_with_output().unwrap().stdout;
    assert_eq!(&output[..128], client::hex(&found).as_bytes());
}
