//! The vectors in vectors/protocol, written by the Python client: both sides read the same bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic,
    reason = "a test fails by panic"
)]

mod client;

use client::{Client, chunks, open_output, read_job, unhex, unseal};
use myelin_noise::Generator;
use myelin_protocol::cbor::Reader;
use myelin_protocol::{
    CHUNK_TAG, Envelope, Grant, HEADER, HpkeKey, Receipt, Refusal, Score, Sealed, SigningKey,
    approve, report_data,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The vectors of one kind of document.
fn vectors(name: &str) -> Value {
    let path = format!("{}/../../vectors/protocol/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn cases<'v>(vectors: &'v Value, kind: &str) -> &'v [Value] {
    let cases = vectors[kind].as_array().unwrap();
    assert!(!cases.is_empty());
    cases
}

fn bytes(case: &Value, field: &str) -> Vec<u8> {
    unhex(case[field].as_str().unwrap_or_else(|| panic!("no field {field}")))
}

fn array<const N: usize>(case: &Value, field: &str) -> [u8; N] {
    bytes(case, field).try_into().unwrap()
}

/// The invalid vectors must be refused by the reasons that they name.
fn refuse<T>(vectors: &Value, read: impl Fn(&Value) -> Result<T, Refusal>) {
    for case in cases(vectors, "invalid") {
        let found = read(case).err().map(Refusal::reason);
        assert_eq!(found, case["reason"].as_str(), "{}", case["name"]);
    }
}

#[test]
fn jobs() {
    let vectors = vectors("job");
    for party in cases(&vectors, "parties") {
        let hpke = HpkeKey::from_seed(array(party, "hpke_seed"));
        assert_eq!(hpke.public().unwrap().to_vec(), bytes(party, "hpke"));
    }
    for case in cases(&vectors, "valid") {
        assert_eq!(read_job(&bytes(case, "job")).unwrap().digest.to_vec(), bytes(case, "digest"));
    }
    refuse(&vectors, |case| read_job(&bytes(case, "job")));
}

#[test]
fn approvals() {
    let vectors = vectors("approval");
    let job = read_job(&bytes(&vectors, "job")).unwrap();
    for case in cases(&vectors, "valid") {
        let party = approve(&job, &bytes(case, "approval")).unwrap();
        assert_eq!(party as u64, case["party"].as_u64().unwrap());
    }
    refuse(&vectors, |case| approve(&job, &bytes(case, "approval")));
}

#[test]
fn grants() {
    let vectors = vectors("grant");
    let job = read_job(&bytes(&vectors, "job")).unwrap();
    let instance = HpkeKey::from_seed(array(&vectors["instance"], "hpke_seed"));
    let open = |case: &Value| {
        let bytes = bytes(case, "grant");
        let grant = Grant::read(&job, &bytes)?;
        grant.verify(&job)?;
        Ok((grant.send, grant.open(&job, &instance)?))
    };
    for case in cases(&vectors, "valid") {
        let (send, granted) = open(case).unwrap();
        assert_eq!(send as u64, case["send"].as_u64().unwrap());
        assert_eq!(granted.key.to_vec(), bytes(case, "key"));
        assert_eq!(granted.commitment.to_vec(), bytes(case, "commitment"));
    }
    refuse(&vectors, open);
}

#[test]
fn sealed_files() {
    let vectors = vectors("sealed");
    for case in cases(&vectors, "valid") {
        let length = case["length"].as_u64().unwrap();
        let plaintext = match case.get("plaintext") {
            Some(_) => bytes(case, "plaintext"),
            None => (0..length).map(|i| (i % 251) as u8).collect(),
        };
        let key = array(case, "key");
        let made = Sealed::create(&key, &array(case, "salt"), length);
        assert_eq!(made.header().to_vec(), bytes(case, "header"));
        let mut file = made.header().to_vec();
        for number in 0..made.chunks() {
            let (offset, bytes) = made.chunk(number).unwrap();
            let mut text = plaintext[offset..][..bytes].to_vec();
            let tag = made.encrypt(number, &mut text).unwrap();
            file.extend(text);
            file.extend(tag);
        }
        assert_eq!(Sha256::digest(&file).to_vec(), bytes(case, "commitment"));
        assert_eq!(unseal(&key, &file), plaintext);
    }
    refuse(&vectors, |case| {
        let file = bytes(case, "sealed");
        let sealed = Sealed::open(&array(case, "key"), file[..HEADER].try_into().unwrap())?;
        for (number, chunk) in chunks(&file).enumerate() {
            sealed.decrypt(
                number as u64,
                chunk,
                &mut vec![0; chunk.len().saturating_sub(CHUNK_TAG)],
            )?;
        }
        Ok(())
    });
}

#[test]
fn report_data_of_evidence() {
    for case in cases(&vectors("report-data"), "valid") {
        let [nonce, job] = [array(case, "nonce"), array(case, "job")];
        let found = report_data(&nonce, &array(case, "hpke"), &array(case, "sign"), &job);
        assert_eq!(found.to_vec(), bytes(case, "report_data"));
    }
}

#[test]
fn outputs() {
    let vectors = vectors("output");
    let job = read_job(&bytes(&vectors, "job")).unwrap();
    let hpke = HpkeKey::from_seed(array(&vectors["receiver"], "hpke_seed"));
    let receiver = Client { hpke, ..Client::new("", 1) };
    let key = open_output(&receiver, &job.digest, &bytes(&vectors, "envelope"));
    assert_eq!(key.to_vec(), bytes(&vectors, "key"));
    assert_eq!(unseal(&key, &bytes(&vectors, "sealed")), bytes(&vectors, "plaintext"));
}

#[test]
fn receipts() {
    let vectors = vectors("receipt");
    let job = read_job(&bytes(&vectors, "job")).unwrap();
    let theirs = bytes(&vectors, "receipt");
    let theirs = Envelope::read(&theirs, "myelin/receipt/1").unwrap();
    theirs.verify(&array(&vectors["instance"], "sign")).unwrap();
    let score = &vectors["score"];
    let key = SigningKey::generate(&mut Generator::new(&[1; 32])).unwrap();
    let ours = Receipt {
        job: &job,
        steps: vectors["steps"].as_u64().unwrap(),
        score: Some(Score {
            total: score["total"].as_u64().unwrap(),
            correct: score["correct"].as_u64().unwrap(),
        }),
        inputs: &|i| unhex(vectors["commitments"][i].as_str()?).try_into().ok(),
        output: array(&vectors, "output"),
    };
    let mut out = [0; 8_192];
    let length = ours.write(&mut out, &key).unwrap();
    let ours = Envelope::read(&out[..length], "myelin/receipt/1").unwrap();
    ours.verify(&key.public().unwrap()).unwrap();
    assert_eq!(ours.body, theirs.body);
    Reader::document(ours.body, |reader| reader.skip()).unwrap();
}

#[test]
fn evidence() {
    let vectors = vectors("evidence");
    let (evidence, fields) = (bytes(&vectors, "evidence"), &vectors["fields"]);
    // The enclave makes no such document and reads none; its keys and report data are in it.
    let [job, nonce] = [array(fields, "job"), array(fields, "nonce")];
    let (hpke, sign) = (array(fields, "hpke"), array(fields, "sign"));
    let quote = bytes(fields, "quote");
    Reader::document(&evidence, |reader| {
        reader.map(7)?;
        assert_eq!(*reader.key("job")?.fixed::<32>()?, job);
        assert_eq!(reader.key("tee")?.text()?, "sgx");
        assert_eq!(reader.key("hpke")?.fixed::<1216>()?, &hpke);
        assert_eq!(reader.key("sign")?.fixed::<65>()?, &sign);
        reader.key("type")?.kind("myelin/evidence/1")?;
        assert_eq!(*reader.key("nonce")?.fixed::<32>()?, nonce);
        reader.key("quote")?.skip()?;
        Ok(())
    })
    .unwrap();
    assert!(evidence.ends_with(&quote));
    // Report data: the last 64 bytes of the report body, which follows 48 bytes of quote header.
    assert_eq!(quote[48 + 320..48 + 384], report_data(&nonce, &hpke, &sign, &job));
}
