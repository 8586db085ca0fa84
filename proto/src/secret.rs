//! The secret that coordinators and workers of a cluster share, and the proof that a call comes from one who has it.
//!
//! A proof is two keyed BLAKE3 hashes in the call's metadata: one over the time, by which a caller is known before anything else
//! of the call is read, and one over time, method and message (of a stream, the first). It authenticates who calls and what for; it
//! hides nothing, and what a stream carries behind its first message is not covered: whoever can change packets on the way needs to
//! be kept away by the network, until there is TLS. Who has seen a call can make the same one again for a minute.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message;
use tonic::{
    Status,
    metadata::{Ascii, MetadataMap, MetadataValue},
};

/// Fewest bytes of a secret.
const MIN_SECRET_BYTES: usize = 16;
/// Most bytes of a secret.
const MAX_SECRET_BYTES: usize = 1024;

/// Metadata key of a proof.
const PROOF: &str = "strata-proof";
/// What the key is for, as BLAKE3 wants to know it of a derived key.
const CONTEXT: &str = "strata 2026-11 calls between coordinator and workers";
/// How far the clocks of two machines may differ, and how long a call may be under way.
const TOLERANCE: Duration = Duration::from_secs(60);

/// A shared secret. Its `Debug` does not show it.
#[derive(Clone)]
pub struct Secret([u8; blake3::KEY_LEN]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What is wrong with a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a cluster's secret has {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, this one {0}; `openssl rand -hex 32` makes one"
)]
pub struct BadSecret(usize);

impl Secret {
    /// A secret from the text of a file or variable; white space around it does not count.
    ///
    /// # Errors
    /// If it is too short to be one, or too long.
    pub fn new(text: &str) -> Result<Self, BadSecret> {
        let text = text.trim().as_bytes();
        match text.len() {
            MIN_SECRET_BYTES..=MAX_SECRET_BYTES => Ok(Secret(blake3::derive_key(CONTEXT, text))),
            length => Err(BadSecret(length)),
        }
    }

    /// Adds the proof for a call of `method` with `message`, or with a stream that begins with it, to its metadata.
    pub fn sign(&self, metadata: &mut MetadataMap, method: &str, message: &impl Message) {
        let now = now();
        let proof =
            format!("{now}-{}-{}", self.caller(now).to_hex(), self.call(now, method, message).to_hex());
        // Digits and dashes are always a value.
        if let Ok(value) = MetadataValue::<Ascii>::try_from(proof) {
            metadata.insert(PROOF, value);
        }
    }

    /// Whether a call comes from one who has the secret; what it says is still to be [checked](Self::check).
    ///
    /// # Errors
    /// UNAUTHENTICATED, with what is wrong.
    pub fn check_caller(&self, metadata: &MetadataMap) -> Result<(), Status> {
        self.check_caller_at(now(), metadata).map(drop)
    }

    /// Whether a call is as one made it who has the secret.
    ///
    /// # Errors
    /// UNAUTHENTICATED, with what is wrong.
    pub fn check(&self, metadata: &MetadataMap, method: &str, message: &impl Message) -> Result<(), Status> {
        let (time, call) = self.check_caller_at(now(), metadata)?;
        // In constant time.
        if call != self.call(time, method, message) {
            let why = "the proof is of another call: it was changed on its way, or made by another version; run the same \
                       version everywhere";
            return Err(Status::unauthenticated(format!("{method}: {why}")));
        }
        Ok(())
    }

    /// The time of a proof, and its hash of the call.
    fn check_caller_at(&self, now: u64, metadata: &MetadataMap) -> Result<(u64, blake3::Hash), Status> {
        let refused = |why: &str| Status::unauthenticated(why.to_owned());
        let proof = metadata.get(PROOF).ok_or_else(|| {
            refused("there is a cluster secret here, and the call proves none; give the caller the same --secret-file")
        })?;
        let bad = || refused("the proof of the cluster secret is none");
        let parts: Vec<_> = proof.to_str().map_err(|_| bad())?.splitn(3, '-').collect();
        let [time, caller, call] = parts[..] else { return Err(bad()) };
        let time: u64 = time.parse().map_err(|_| bad())?;
        let hash = |text: &str| blake3::Hash::from_hex(text).map_err(|_| bad());
        let (caller, call) = (hash(caller)?, hash(call)?);
        // In constant time.
        if caller != self.caller(time) {
            return Err(refused(
                "the caller has another cluster secret than there is here; give both the same --secret-file",
            ));
        }
        let apart = Duration::from_millis(now.abs_diff(time));
        if apart > TOLERANCE {
            return Err(refused(&format!(
                "the call is of another time, {apart:?} away; the clocks of both machines may differ by {TOLERANCE:?}"
            )));
        }
        Ok((time, call))
    }

    fn caller(&self, time: u64) -> blake3::Hash {
        blake3::keyed_hash(&self.0, &time.to_le_bytes())
    }

    fn call(&self, time: u64, method: &str, message: &impl Message) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&time.to_le_bytes());
        hasher.update(&(method.len() as u64).to_le_bytes());
        hasher.update(method.as_bytes());
        hasher.update(&message.encode_to_vec());
        hasher.finalize()
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    fn claim(term: u64) -> v1::Claim {
        v1::Claim { term, coordinator: "a".into(), resigned: false }
    }

    fn signed(secret: &Secret) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        secret.sign(&mut metadata, "Load", &claim(3));
        metadata
    }

    #[test]
    fn a_proof_holds_for_its_method_message_and_time_alone() {
        let secret = Secret::new("correct horse battery staple\n").unwrap();
        let metadata = signed(&secret);
        secret.check(&metadata, "Load", &claim(3)).unwrap();
        secret.check_caller(&metadata).unwrap();
        Secret::new(" correct horse battery staple").unwrap().check(&metadata, "Load", &claim(3)).unwrap();
        let said = |secret: &Secret, metadata: &MetadataMap, method: &str, message: &v1::Claim| {
            let status = secret.check(metadata, method, message).unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unauthenticated);
            status.message().to_owned()
        };
        // Whoever saw a call on its way has its proof, and nothing else to put it to.
        let resigned = v1::Claim { resigned: true, ..claim(3) };
        for refused in [
            said(&secret, &metadata, "Abort", &claim(3)),
            said(&secret, &metadata, "Load", &claim(4)),
            said(&secret, &metadata, "Load", &resigned),
        ] {
            assert!(refused.contains("of another call"), "{refused}");
        }
        let other = Secret::new("another horse battery staple").unwrap();
        assert!(said(&other, &metadata, "Load", &claim(3)).contains("another cluster secret"));
        assert!(other.check_caller(&metadata).unwrap_err().message().contains("another cluster secret"));
        assert!(said(&secret, &MetadataMap::new(), "Load", &claim(3)).contains("proves none"));
        for text in ["", "-", "1-", "1--", "1-zz-zz", "x-00-00", &"9".repeat(99)] {
            let mut metadata = MetadataMap::new();
            metadata.insert(PROOF, text.parse().unwrap());
            assert!(said(&secret, &metadata, "Load", &claim(3)).contains("is none"), "{text:?}");
        }
        let late = now() + TOLERANCE.as_millis() as u64 + 1000;
        let status = secret.check_caller_at(late, &metadata).unwrap_err();
        assert!(status.message().contains("of another time"), "{status:?}");
    }

    #[test]
    fn a_secret_has_a_length_and_is_not_shown() {
        assert_eq!(Secret::new("  short\n").unwrap_err(), BadSecret(5));
        assert_eq!(Secret::new(&"x".repeat(1025)).unwrap_err(), BadSecret(1025));
        assert_eq!(format!("{:?}", Secret::new(&"x".repeat(16)).unwrap()), "Secret");
    }
}
