//! The secret that coordinators and workers of a cluster share, and the proof that a call comes from one who has it.
//!
//! A proof is a keyed BLAKE3 hash over method, fence and time, in the call's metadata. It authenticates who calls; it hides
//! nothing, and what a call carries beside its fence is not covered: whoever can change packets on the way needs to be kept
//! away by the network, until there is TLS.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tonic::{
    Status,
    metadata::{Ascii, MetadataMap, MetadataValue},
};

use crate::v1::Fence;

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

    /// Adds the proof for a call of `method` to its metadata.
    pub fn sign(&self, metadata: &mut MetadataMap, method: &str, fence: Option<&Fence>) {
        let now = now();
        let proof = format!("{now}-{}", self.mac(now, method, fence).to_hex());
        // Digits and a dash are always a value.
        if let Ok(value) = MetadataValue::<Ascii>::try_from(proof) {
            metadata.insert(PROOF, value);
        }
    }

    /// Whether a call comes from one who has the secret.
    ///
    /// # Errors
    /// UNAUTHENTICATED, with what is wrong.
    pub fn check(&self, metadata: &MetadataMap, method: &str, fence: Option<&Fence>) -> Result<(), Status> {
        self.check_at(now(), metadata, method, fence)
    }

    fn check_at(
        &self,
        now: u64,
        metadata: &MetadataMap,
        method: &str,
        fence: Option<&Fence>,
    ) -> Result<(), Status> {
        let refused = |why: &str| Status::unauthenticated(format!("{method}: {why}"));
        let proof = metadata.get(PROOF).ok_or_else(|| {
            refused("there is a cluster secret here, and the call proves none; give the caller the same --secret-file")
        })?;
        let bad = || refused("the proof of the cluster secret is none");
        let (time, mac) = proof.to_str().ok().and_then(|text| text.split_once('-')).ok_or_else(bad)?;
        let time: u64 = time.parse().map_err(|_| bad())?;
        let mac = blake3::Hash::from_hex(mac).map_err(|_| bad())?;
        // In constant time.
        if mac != self.mac(time, method, fence) {
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
        Ok(())
    }

    fn mac(&self, time: u64, method: &str, fence: Option<&Fence>) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&time.to_le_bytes());
        hasher.update(&(method.len() as u64).to_le_bytes());
        hasher.update(method.as_bytes());
        if let Some(Fence { term, pipeline, incarnation }) = fence {
            hasher.update(&term.to_le_bytes());
            hasher.update(&pipeline.to_le_bytes());
            hasher.update(&incarnation.to_le_bytes());
        }
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

    const FENCE: Fence = Fence { term: 3, pipeline: 1, incarnation: 7 };

    fn signed(secret: &Secret) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        secret.sign(&mut metadata, "Load", Some(&FENCE));
        metadata
    }

    #[test]
    fn a_proof_holds_for_its_method_fence_and_time_alone() {
        let secret = Secret::new("correct horse battery staple\n").unwrap();
        let metadata = signed(&secret);
        secret.check(&metadata, "Load", Some(&FENCE)).unwrap();
        Secret::new(" correct horse battery staple").unwrap().check(&metadata, "Load", Some(&FENCE)).unwrap();
        let said = |secret: &Secret, metadata: &MetadataMap, method: &str, fence: Option<&Fence>| {
            let status = secret.check(metadata, method, fence).unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unauthenticated);
            status.message().to_owned()
        };
        let other = Fence { term: 4, ..FENCE };
        for refused in [
            said(&secret, &metadata, "Abort", Some(&FENCE)),
            said(&secret, &metadata, "Load", Some(&other)),
            said(&secret, &metadata, "Load", None),
            said(&Secret::new("another horse battery staple").unwrap(), &metadata, "Load", Some(&FENCE)),
        ] {
            assert!(refused.contains("another cluster secret"), "{refused}");
        }
        assert!(said(&secret, &MetadataMap::new(), "Load", Some(&FENCE)).contains("proves none"));
        for text in ["", "-", "1-", "1-zz", "x-00", &"9".repeat(99)] {
            let mut metadata = MetadataMap::new();
            metadata.insert(PROOF, text.parse().unwrap());
            assert!(said(&secret, &metadata, "Load", Some(&FENCE)).contains("is none"), "{text:?}");
        }
        let late = now() + TOLERANCE.as_millis() as u64 + 1000;
        let status = secret.check_at(late, &metadata, "Load", Some(&FENCE)).unwrap_err();
        assert!(status.message().contains("of another time"), "{status:?}");
    }

    #[test]
    fn a_secret_has_a_length_and_is_not_shown() {
        assert_eq!(Secret::new("  short\n").unwrap_err(), BadSecret(5));
        assert_eq!(Secret::new(&"x".repeat(1025)).unwrap_err(), BadSecret(1025));
        assert_eq!(format!("{:?}", Secret::new(&"x".repeat(16)).unwrap()), "Secret");
    }
}
