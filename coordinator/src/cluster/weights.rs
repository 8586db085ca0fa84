//! What the weights of the served model are, as the workers that loaded them first have read them.

use std::collections::{BTreeMap, BTreeSet};

use strata_proto::{Digest, ModuleId, root};

/// A module that a worker has read otherwise than another one did.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "its copy of the model is not that of worker {first}: the digest of {module} is {found:.16} where {expected:.16} was \
     loaded first; run `strata verify` on both copies, and copy the model again where it is damaged; if that is on {first}, \
     restart it and the coordinator too"
)]
pub struct WeightDifference {
    /// The first module that differs.
    pub module: ModuleId,
    /// What was read.
    pub found: Digest,
    /// What it should have been.
    pub expected: Digest,
    /// The worker that loaded that.
    pub first: String,
}

/// The digest of each module of a model: the first load of a module says what it is, each later one must say the same. So a
/// worker whose files are damaged where the fingerprint does not look cannot take a stage over from one whose files are
/// not.
#[derive(Debug, Default)]
pub struct WeightRecord {
    /// Of the model that the record is about.
    fingerprint: String,
    /// Digests, and the worker that named each first.
    modules: BTreeMap<ModuleId, (Digest, String)>,
    /// Workers whose weights differed when they were loaded last.
    refused: BTreeSet<String>,
}

impl WeightRecord {
    /// Compares what `worker` has read with what is known, and learns the rest. A model of another fingerprint begins a
    /// new record.
    ///
    /// # Errors
    /// The first module that differs; then nothing is learned.
    pub fn check(
        &mut self,
        fingerprint: &str,
        worker: &str,
        modules: impl Iterator<Item = (ModuleId, Digest)> + Clone,
    ) -> Result<(), WeightDifference> {
        if self.fingerprint != fingerprint {
            *self = WeightRecord { fingerprint: fingerprint.to_owned(), ..WeightRecord::default() };
        }
        for (module, found) in modules.clone() {
            match self.modules.get(&module) {
                Some((expected, first)) if *expected != found => {
                    self.refused.insert(worker.to_owned());
                    let (expected, first) = (*expected, first.clone());
                    return Err(WeightDifference { module, found, expected, first });
                }
                _ => {}
            }
        }
        for (module, digest) in modules {
            self.modules.entry(module).or_insert_with(|| (digest, worker.to_owned()));
        }
        self.refused.remove(worker);
        Ok(())
    }

    /// Whether it is about the model of this fingerprint, or about none yet.
    pub fn is_of(&self, fingerprint: &str) -> bool {
        self.fingerprint.is_empty() || self.fingerprint == fingerprint
    }

    /// Whether the weights of `worker` differed when it loaded last: then it is to read its files again, since somebody may
    /// have mended them.
    pub fn has_refused(&self, worker: &str) -> bool {
        self.refused.contains(worker)
    }

    /// The digest of the whole model; none until every module was loaded once.
    pub fn root(&self) -> Option<Digest> {
        // The last layer comes with the head, so that it is there if the head is.
        let ends = [ModuleId::Embedding, ModuleId::Head].iter().all(|end| self.modules.contains_key(end));
        let layers = self.modules.len().checked_sub(2).filter(|_| ends)? as u32;
        let whole = (0..layers).all(|layer| self.modules.contains_key(&ModuleId::Layer(layer)));
        whole.then(|| root(self.modules.iter().map(|(module, (digest, _))| (*module, *digest))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> Digest {
        Digest::from([byte; Digest::BYTES])
    }

    /// Embedding and layer 0, layers 1 and 2, head.
    fn stages() -> [Vec<(ModuleId, Digest)>; 2] {
        let first = vec![(ModuleId::Embedding, digest(1)), (ModuleId::Layer(0), digest(2))];
        let last = vec![(ModuleId::Layer(1), digest(3)), (ModuleId::Head, digest(4))];
        [first, last]
    }

    fn load(record: &mut WeightRecord, worker: &str, modules: &[(ModuleId, Digest)]) -> Result<(), String> {
        record.check("f", worker, modules.iter().copied()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_load_of_a_module_says_what_the_others_must_say() {
        let mut record = WeightRecord::default();
        let [first, last] = stages();
        load(&mut record, "a", &first).unwrap();
        load(&mut record, "b", &last).unwrap();
        let whole = [first.clone(), last.clone()].concat();
        load(&mut record, "c", &whole).unwrap();
        let mut damaged = whole.clone();
        damaged[2].1 = digest(9);
        let refused = load(&mut record, "c", &damaged).unwrap_err();
        for part in ["worker b", "layer 1 is 0909090909090909", "0303030303030303", "`strata verify`"] {
            assert!(refused.contains(part), "{part} is not in: {refused}");
        }
        assert!(record.has_refused("c") && !record.has_refused("b"));
        // Once its files are mended it is a worker like any other.
        load(&mut record, "c", &whole).unwrap();
        assert!(!record.has_refused("c"));
    }

    #[test]
    fn nothing_is_learned_of_a_worker_that_is_refused() {
        let mut record = WeightRecord::default();
        let [first, last] = stages();
        load(&mut record, "a", &first).unwrap();
        let mut damaged = [first, last.clone()].concat();
        damaged[0].1 = digest(9);
        damaged[3].1 = digest(9);
        load(&mut record, "b", &damaged).unwrap_err();
        load(&mut record, "c", &last).unwrap();
        assert!(record.root().is_some());
    }

    #[test]
    fn the_digest_of_the_whole_is_known_once_every_module_was_loaded() {
        let mut record = WeightRecord::default();
        let [first, last] = stages();
        assert_eq!(record.root(), None);
        load(&mut record, "b", &last).unwrap();
        assert_eq!(record.root(), None);
        load(&mut record, "a", &first).unwrap();
        assert_eq!(record.root(), Some(root([first, last].concat())));
        // Another model is another record.
        record.check("g", "a", std::iter::empty()).unwrap();
        assert_eq!(record.root(), None);
    }
}
