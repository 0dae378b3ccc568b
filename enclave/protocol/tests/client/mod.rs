//! What parties do, for tests: documents, grants and sealed files from fixed seeds.
#![allow(dead_code, reason = "each test file uses its part")]

use myelin_noise::Generator;
use myelin_protocol::cbor::{Reader, Writer, writer};
use myelin_protocol::{
    CHUNK, CHUNK_TAG, Envelope, HEADER, Hpke, HpkeKey, Job, Refusal, Sealed, SigningKey, seal_to,
};

/// A party; its keys come from its number.
pub struct Client {
    pub name: &'static str,
    pub number: u8,
    pub sign: SigningKey,
    pub hpke: HpkeKey,
}

impl Client {
    pub fn new(name: &'static str, number: u8) -> Self {
        let [sign, hpke] = Self::seeds(number);
        let mut stream = Generator::new(&[number; 32]);
        let key = SigningKey::generate(&mut stream).unwrap();
        assert_eq!(sign.len(), 32);
        Client { name, number, sign: key, hpke: HpkeKey::from_seed(hpke) }
    }

    /// The P-256 scalar and the X-Wing seed.
    pub fn seeds(number: u8) -> [[u8; 32]; 2] {
        let mut seeds = [[0; 32]; 2];
        Generator::new(&[number; 32]).fill(seeds.as_flattened_mut());
        seeds
    }

    pub fn approval(&self, job: &[u8; 32]) -> Vec<u8> {
        let body = encode(|w| {
            w.map(2)?.str("job")?.bytes(job)?;
            w.str("sign")?.bytes(&self.sign.public().unwrap())?;
            Ok(())
        });
        signed("myelin/approval/1", &body, &self.sign)
    }

    pub fn grant(&self, grant: &GrantOf<'_>) -> Vec<u8> {
        let mut ct = encode(|w| {
            w.map(3)?.str("key")?.bytes(grant.key)?;
            w.str("uses")?.u64(grant.uses)?;
            w.str("commitment")?.bytes(&grant.commitment)?;
            Ok(())
        });
        let random = &mut Generator::new(&[99; 32]);
        let (enc, tag) =
            seal_to(grant.instance, "myelin/grant/1", grant.sealed_for, &mut ct, random).unwrap();
        ct.extend(tag);
        let body = encode(|w| {
            w.map(5)?.str("ct")?.bytes(&ct)?.str("enc")?.bytes(&enc)?;
            w.str("job")?.bytes(grant.job)?.str("slot")?.str(grant.slot)?;
            w.str("party")?.u64(grant.party)?;
            Ok(())
        });
        signed("myelin/grant/1", &body, &self.sign)
    }
}

/// A job that was read.
pub fn read_job(document: &[u8]) -> Result<Job, Refusal> {
    let mut job = Job::default();
    job.read(document).map(|()| job)
}

/// What a grant says.
#[derive(Clone)]
pub struct GrantOf<'a> {
    pub instance: &'a Hpke,
    pub job: &'a [u8; 32],
    /// The job in the HPKE info.
    pub sealed_for: &'a [u8; 32],
    pub slot: &'a str,
    pub party: u64,
    pub key: &'a [u8; 32],
    pub uses: u64,
    pub commitment: [u8; 32],
}

/// What a job says.
#[derive(Clone)]
pub struct JobOf<'a> {
    pub parties: Vec<&'a Client>,
    pub sends: Vec<(&'a str, u64, u64)>,
    pub receives: Vec<(&'a str, Option<u64>)>,
    pub steps: u64,
    pub epsilon: u64,
    pub max_batch: u64,
    pub sample_rate: u64,
    pub max_grad_norm: u64,
    pub expected_batch: u64,
    pub noise_multiplier: u64,
    pub weights: [u8; 32],
}

impl JobOf<'_> {
    pub fn document(&self) -> Vec<u8> {
        encode(|w| {
            w.map(7)?.str("type")?.str("myelin/job/1")?;
            w.str("image")?.map(2)?.str("digest")?.bytes(&[1; 32])?;
            w.str("measurement")?.bytes(&[2; 32])?;
            w.str("sends")?.array(self.sends.len() as u64)?;
            for (slot, party, capacity) in &self.sends {
                w.map(3)?.str("slot")?.str(slot)?.str("party")?.u64(*party)?;
                w.str("capacity")?.u64(*capacity)?;
            }
            w.str("parties")?.array(self.parties.len() as u64)?;
            for party in &self.parties {
                w.map(3)?.str("hpke")?.bytes(&party.hpke.public().unwrap())?;
                w.str("name")?.str(party.name)?;
                w.str("sign")?.bytes(&party.sign.public().unwrap())?;
            }
            w.str("privacy")?.map(10)?.str("delta")?.u64(10_000_000)?;
            w.str("steps")?.u64(self.steps)?.str("epsilon")?.u64(self.epsilon)?;
            w.str("sampler")?.str("poisson")?.str("max_batch")?.u64(self.max_batch)?;
            w.str("sample_rate")?.u64(self.sample_rate)?;
            w.str("max_grad_norm")?.u64(self.max_grad_norm)?;
            w.str("expected_batch")?.u64(self.expected_batch)?;
            w.str("noise_multiplier")?.u64(self.noise_multiplier)?;
            w.str("neighboring_relation")?.str("add-or-remove-one")?;
            w.str("weights")?.bytes(&self.weights)?;
            w.str("receives")?.array(self.receives.len() as u64)?;
            for (slot, party) in &self.receives {
                w.map(2)?.str("slot")?.str(slot)?.str("party")?;
                match party {
                    Some(party) => w.u64(*party)?,
                    None => w.null()?,
                };
            }
            Ok(())
        })
    }
}

/// The plaintext of a `records` or `test` file; padding is zero.
pub fn records(capacity: u32, record: u32, rows: &[Vec<u8>]) -> Vec<u8> {
    let mut file = b"MYRECORD".to_vec();
    for word in [rows.len() as u32, capacity, record] {
        file.extend(word.to_le_bytes());
    }
    file.resize(64, 0);
    file.extend(rows.iter().flatten());
    file.resize(64 + capacity as usize * record as usize, 0);
    file
}

/// A whole sealed file.
pub fn seal(key: &[u8; 32], plaintext: &[u8]) -> Vec<u8> {
    let sealed = Sealed::create(key, &[7; 32], plaintext.len() as u64);
    let mut file = sealed.header().to_vec();
    for (i, text) in plaintext.chunks(CHUNK).enumerate() {
        let mut text = text.to_vec();
        let tag = sealed.encrypt(i as u64, &mut text).unwrap();
        file.extend(text);
        file.extend(tag);
    }
    file
}

/// The chunks of a sealed file, tags included.
pub fn chunks(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file[HEADER..].chunks(CHUNK + CHUNK_TAG)
}

/// The plaintext of a sealed file.
pub fn unseal(key: &[u8; 32], file: &[u8]) -> Vec<u8> {
    let sealed = Sealed::open(key, file[..HEADER].try_into().unwrap()).unwrap();
    let mut plaintext = Vec::new();
    for (i, chunk) in chunks(file).enumerate() {
        let mut text = vec![0; chunk.len() - CHUNK_TAG];
        sealed.decrypt(i as u64, chunk, &mut text).unwrap();
        plaintext.extend(text);
    }
    assert_eq!(plaintext.len() as u64, sealed.length());
    plaintext
}

/// Opens an output envelope; gives the file's key.
pub fn open_output(receiver: &Client, job: &[u8; 32], envelope: &[u8]) -> [u8; 32] {
    Reader::document(envelope, |r| {
        r.map(6)?;
        let ct = r.key("ct")?.bytes()?;
        let enc = r.key("enc")?.fixed()?;
        assert_eq!(r.key("job")?.fixed::<32>()?, job);
        assert_eq!(r.key("slot")?.text()?, "weights");
        r.key("type")?.kind("myelin/output/1")?;
        r.key("party")?.unsigned()?;
        let mut plain = vec![0; ct.len() - 16];
        receiver.hpke.open("myelin/output/1", job, enc, ct, &mut plain)?;
        Reader::document(&plain, |r| {
            r.map(1)?;
            Ok(*r.key("key")?.fixed()?)
        })
    })
    .unwrap()
}

pub fn signed(kind: &str, body: &[u8], key: &SigningKey) -> Vec<u8> {
    let mut out = vec![0; body.len() + 256];
    let length = Envelope::write(&mut out, kind, body, key).unwrap();
    out.truncate(length);
    out
}

pub fn encode(write: impl FnOnce(&mut Writer<'_>) -> Result<(), Refusal>) -> Vec<u8> {
    let mut out = vec![0; 1 << 17];
    let mut w = writer(&mut out);
    write(&mut w).unwrap();
    let length = w.writer().position();
    out.truncate(length);
    out
}

/// Every change of one bit, and every truncation, of `message`.
pub fn damaged(message: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    let flips = (0..message.len() * 8).map(|bit| {
        let mut changed = message.to_vec();
        changed[bit / 8] ^= 1 << (bit % 8);
        changed
    });
    let cuts = (0..message.len()).map(|length| message[..length].to_vec());
    let longer = [0, 0xff].map(|byte| [message, &[byte]].concat());
    flips.chain(cuts).chain(longer)
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

/// Little-endian float32 values.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}
