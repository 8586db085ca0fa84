//! What operators decide that is to outlive a coordinator, and where it is kept.

use std::{
    collections::BTreeMap,
    fmt,
    ops::RangeInclusive,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use strata_proto::{DType, limits, v1};
use tonic::async_trait;

use crate::{
    config::{self, Deployment},
    planner::Split,
};

/// Hexadecimal digits of a digest of weights.
const DIGEST_DIGITS: usize = 64;

/// What is deployed, as operators write it: all of it, where what is left out is as the flags of these names have it by
/// default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DeploymentRecord {
    /// Name of the model.
    pub model: String,
    /// Patterns of names of tensors that it may have without a use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore_tensors: Vec<String>,
    /// Digest that its weights must have, as `strata verify` shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// How layers are split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Format of weights, activations and cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// What weights are turned into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
    /// Token positions that the cache holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_tokens: Option<u64>,
    /// Sequences of full context that it holds, instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sequences: Option<u32>,
    /// Longest sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Kind of link between stages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub links: Option<String>,
    /// Most copies of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// Devices to keep free for the stages of lost workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standbys: Option<u32>,
}

impl DeploymentRecord {
    /// Whether its values are what the flags of these names take, as far as it can be said without a model.
    ///
    /// # Errors
    /// What is wrong with a field.
    pub fn check(&self) -> Result<(), String> {
        if self.model.is_empty() {
            return Err("model: expected its name".into());
        }
        limits::check_ignored(&self.ignore_tensors)?;
        let is_digest = |d: &String| d.len() == DIGEST_DIGITS && d.bytes().all(|b| b.is_ascii_hexdigit());
        if self.weights.as_ref().is_some_and(|digest| !is_digest(digest)) {
            return Err(format!(
                "weights: expected the {DIGEST_DIGITS} hexadecimal digits that `strata verify` shows"
            ));
        }
        if self.kv_tokens.is_some() && self.max_sequences.is_some() {
            return Err("kv-tokens, max-sequences: expected one of them, not both".into());
        }
        within("kv-tokens", self.kv_tokens, config::KV_TOKENS)?;
        within("max-sequences", self.max_sequences, config::SEQUENCES)?;
        within("context", self.context, config::CONTEXT)?;
        within("replicas", self.replicas, config::REPLICAS)?;
        within("standbys", self.standbys, config::STANDBYS)
    }

    /// The deployment; what a record does not say at all is as in `base`.
    ///
    /// # Errors
    /// What is wrong with a field.
    pub fn onto(&self, base: &Deployment) -> Result<Deployment, String> {
        /// The value of a word that has another one for none.
        fn read<T: std::str::FromStr<Err = String>>(
            name: &str,
            value: Option<&String>,
            none: &str,
        ) -> Result<Option<T>, String> {
            match value {
                Some(word) if word != none => {
                    word.parse().map(Some).map_err(|why| format!("{name}: {why}, or {none}"))
                }
                _ => Ok(None),
            }
        }
        self.check()?;
        let split = self.split.as_deref().map(str::parse).transpose();
        Ok(Deployment {
            model: self.model.clone(),
            ignore_tensors: self.ignore_tensors.clone(),
            weights: self.weights.as_ref().map(|digest| digest.to_ascii_lowercase()),
            split: split.map_err(|why: String| format!("split: {why}"))?.unwrap_or(Split::Auto),
            dtype: read::<DType>("dtype", self.dtype.as_ref(), "auto")?,
            quantization: read("quantize", self.quantize.as_ref(), "none")?,
            kv_tokens: self.kv_tokens,
            max_sequences: self.max_sequences,
            context: self.context,
            replicas: self.replicas,
            standbys: self.standbys.unwrap_or_default(),
            links: read("links", self.links.as_ref(), "auto")?,
            ..base.clone()
        })
    }
}

/// Refuses a value that its flag would refuse, too.
fn within<T: PartialOrd + fmt::Display>(
    name: &str,
    value: Option<T>,
    range: RangeInclusive<T>,
) -> Result<(), String> {
    match value {
        Some(value) if !range.contains(&value) => {
            Err(format!("{name}: {value}: expected {} to {}", range.start(), range.end()))
        }
        _ => Ok(()),
    }
}

impl From<&Deployment> for DeploymentRecord {
    fn from(deployment: &Deployment) -> Self {
        let split = match &deployment.split {
            // Its `Display` is for people.
            Split::DeviceMap(map) => serde_json::to_string(map).unwrap_or_default(),
            split => split.to_string(),
        };
        DeploymentRecord {
            model: deployment.model.clone(),
            ignore_tensors: deployment.ignore_tensors.clone(),
            weights: deployment.weights.clone(),
            split: Some(split),
            dtype: deployment.dtype.map(|dtype| dtype.name().to_owned()),
            quantize: deployment.quantization.map(|quantization| quantization.to_string()),
            kv_tokens: deployment.kv_tokens,
            max_sequences: deployment.max_sequences,
            context: deployment.context,
            links: deployment.links.map(|links| links.name().to_owned()),
            replicas: deployment.replicas,
            standbys: Some(deployment.standbys).filter(|standbys| *standbys > 0),
        }
    }
}

impl From<DeploymentRecord> for v1::Deployment {
    fn from(record: DeploymentRecord) -> Self {
        v1::Deployment {
            model: record.model,
            ignore_tensors: record.ignore_tensors,
            weights: record.weights.unwrap_or_default(),
            split: record.split.unwrap_or_default(),
            dtype: record.dtype.unwrap_or_default(),
            quantize: record.quantize.unwrap_or_default(),
            kv_tokens: record.kv_tokens.unwrap_or_default(),
            max_sequences: record.max_sequences.unwrap_or_default(),
            context: record.context.unwrap_or_default(),
            links: record.links.unwrap_or_default(),
            replicas: record.replicas.unwrap_or_default(),
            standbys: record.standbys.unwrap_or_default(),
        }
    }
}

impl From<v1::Deployment> for DeploymentRecord {
    fn from(wire: v1::Deployment) -> Self {
        fn given<T: Default + PartialEq>(value: T) -> Option<T> {
            (value != T::default()).then_some(value)
        }
        DeploymentRecord {
            model: wire.model,
            ignore_tensors: wire.ignore_tensors,
            weights: given(wire.weights),
            split: given(wire.split),
            dtype: given(wire.dtype),
            quantize: given(wire.quantize),
            kv_tokens: given(wire.kv_tokens),
            max_sequences: given(wire.max_sequences),
            context: given(wire.context),
            links: given(wire.links),
            replicas: given(wire.replicas),
            standbys: given(wire.standbys),
        }
    }
}

/// What was decided by operators.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// Workers that are drained, and why.
    pub drained: BTreeMap<String, String>,
    /// What is deployed, and which version of it that is; none before anything was.
    pub deployed: Option<(u64, DeploymentRecord)>,
}

/// Why something is not kept, or cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Whoever keeps them does not answer, or has something else.
    #[error("what operators have decided cannot be read or kept: {0}")]
    Unkept(String),
    /// Somebody else was faster.
    #[error("another deployment was recorded meanwhile: look at it in `strata status`, and apply again")]
    Outrun,
}

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

    /// Something is deployed, over the version `over` (0: over none); its version.
    ///
    /// # Errors
    /// If there is another version, or nobody can say.
    async fn deploy(&self, record: &DeploymentRecord, over: u64) -> Result<u64, RecordError>;
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

    async fn deploy(&self, record: &DeploymentRecord, over: u64) -> Result<u64, RecordError> {
        let mut records = self.lock();
        let version = records.deployed.as_ref().map_or(0, |(version, _)| *version);
        if version != over {
            return Err(RecordError::Outrun);
        }
        records.deployed = Some((version + 1, record.clone()));
        Ok(version + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CoordinatorConfig;

    #[test]
    fn a_record_says_all_of_a_deployment_and_comes_back_from_wherever_it_was() {
        let base = CoordinatorConfig::new("m", 1).deployment;
        let map = r#"{"model.layers.0": "cpu", "model": 1}"#;
        for (split, quantize) in [("2,2,2", None), ("balanced", Some("int4")), (map, Some("int8"))] {
            let record = DeploymentRecord {
                model: "n".into(),
                weights: Some("ab".repeat(32)),
                split: Some(split.into()),
                dtype: Some("f32".into()),
                quantize: quantize.map(str::to_owned),
                kv_tokens: Some(64),
                context: Some(32),
                links: Some("tcp".into()),
                replicas: Some(2),
                standbys: Some(1),
                ..DeploymentRecord::default()
            };
            let deployment = record.onto(&base).unwrap();
            let again = DeploymentRecord::from(&deployment);
            assert_eq!(again.onto(&base).unwrap(), deployment);
            assert_eq!(DeploymentRecord::from(v1::Deployment::from(again.clone())), again);
            let json = serde_json::to_vec(&again).unwrap();
            assert_eq!(serde_json::from_slice::<DeploymentRecord>(&json).unwrap(), again);
        }
        let least = DeploymentRecord { model: "m".into(), ..DeploymentRecord::default() };
        assert_eq!(least.onto(&base).unwrap(), base);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_name() {
        let base = CoordinatorConfig::new("m", 1).deployment;
        let good = DeploymentRecord { model: "m".into(), ..DeploymentRecord::default() };
        let word = |word: &str| Some(word.to_owned());
        for (bad, why) in [
            (DeploymentRecord::default(), "model: "),
            (DeploymentRecord { weights: word("12"), ..good.clone() }, "weights: "),
            (DeploymentRecord { split: word("half"), ..good.clone() }, "split: "),
            (DeploymentRecord { dtype: word("f8"), ..good.clone() }, "dtype: "),
            (DeploymentRecord { quantize: word("nf4"), ..good.clone() }, "quantize: "),
            (DeploymentRecord { links: word("radio"), ..good.clone() }, "links: "),
            (DeploymentRecord { context: Some(1), ..good.clone() }, "context: 1: expected 2 to "),
            (DeploymentRecord { kv_tokens: Some(0), ..good.clone() }, "kv-tokens: "),
            (DeploymentRecord { max_sequences: Some(65537), ..good.clone() }, "max-sequences: "),
            (DeploymentRecord { replicas: Some(0), ..good.clone() }, "replicas: 0: expected 1 to 64"),
            (DeploymentRecord { replicas: Some(65), ..good.clone() }, "replicas: "),
            (DeploymentRecord { standbys: Some(4_000_000_000), ..good.clone() }, "standbys: 4000000000: "),
            (
                DeploymentRecord { kv_tokens: Some(1), max_sequences: Some(1), ..good },
                "kv-tokens, max-sequences: ",
            ),
        ] {
            let refused = bad.onto(&base).unwrap_err();
            assert!(refused.starts_with(why), "{refused}");
        }
        let unknown =
            serde_json::from_str::<DeploymentRecord>(r#"{"model": "m", "color": "red"}"#).unwrap_err();
        assert!(unknown.to_string().contains("unknown field `color`"), "{unknown}");
    }

    #[tokio::test]
    async fn of_two_who_deploy_over_one_version_the_second_is_refused() {
        let (keeper, record) = (InMemory::default(), DeploymentRecord::default());
        assert_eq!(keeper.deploy(&record, 0).await, Ok(1));
        assert_eq!(keeper.deploy(&record, 0).await, Err(RecordError::Outrun));
        assert_eq!(keeper.deploy(&record, 1).await, Ok(2));
        assert_eq!(keeper.read().await.unwrap().deployed, Some((2, record)));
    }
}
