//! What is to outlive a coordinator, and where it is kept.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tonic::async_trait;

/// What was decided by operators.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// Workers that are drained, and why.
    pub drained: BTreeMap<String, String>,
}

/// Why something is not kept, or cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("what operators have decided cannot be read or kept: {0}")]
pub struct RecordError(pub String);

/// Where records are kept.
#[async_trait]
pub trait Keeper: fmt::Debug + Send + Sync {
    /// All of them.
    ///
    /// # Errors
    /// If nobody can say.
    async fn read(&self) -> Result<Records, RecordError>;

    /// A worker is drained for this reason, or no more.
    ///
    /// # Errors
    /// If that is not kept, or nobody can say whether it is.
    async fn mark(&self, worker: &str, drained: Option<&str>) -> Result<(), RecordError>;
}

/// Records that end with their process.
#[derive(Debug, Default)]
pub struct InMemory(Mutex<Records>);

impl InMemory {
    fn lock(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Keeper for InMemory {
    async fn read(&self) -> Result<Records, RecordError> {
        Ok(self.lock().clone())
    }

    async fn mark(&self, worker: &str, drained: Option<&str>) -> Result<(), RecordError> {
        let mut records = self.lock();
        match drained {
            Some(why) => drop(records.drained.insert(worker.to_owned(), why.to_owned())),
            None => drop(records.drained.remove(worker)),
        }
        Ok(())
    }
}
