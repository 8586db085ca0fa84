//! What a worker says of itself in etcd, as JSON.

use serde::{Deserialize, Serialize};
use strata_proto::v1;

use super::error::EtcdError;

/// Longest record that is read, in bytes.
const MAX_RECORD: usize = 256 << 10;

/// What a worker says of itself. Fields that a reader does not know are passed over, and those that it misses are empty, so
/// that versions can be mixed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Its name: the same after a restart.
    pub name: String,
    /// Where it answers coordinators: `HOST:PORT`.
    pub address: String,
    /// Changes with every start of its process.
    pub boot_id: String,
    /// Its place among the workers: plans keep this order, and it stays the same after a restart.
    pub rank: u64,
    /// Its devices.
    #[serde(default)]
    pub devices: Vec<DeviceRecord>,
    /// The weights that it holds.
    #[serde(default)]
    pub resident: Vec<Resident>,
}

/// A device of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Unique within the worker: `cpu`, `cuda:0`.
    pub id: String,
    /// Physical bytes.
    pub bytes: u64,
}

/// Weights that a device holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// Which device.
    pub device: String,
    /// Name of the model.
    pub model: String,
    /// Its content.
    pub fingerprint: String,
    /// Which layers: the first, and the one after the last.
    pub layers: [u32; 2],
    /// Format of weights that are not quantized.
    pub dtype: String,
    /// What weights were turned into, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
}

impl WorkerRecord {
    /// The record that lies at a key.
    ///
    /// # Errors
    /// If it is too long, no record, or one of another worker than the key says.
    pub(super) fn read(key: &str, value: &[u8]) -> Result<Self, EtcdError> {
        let nonsense = |why: String| EtcdError::Nonsense { key: key.to_owned(), why };
        if value.len() > MAX_RECORD {
            return Err(nonsense(format!(
                "{} bytes; a worker's record has at most {MAX_RECORD}",
                value.len()
            )));
        }
        let record: WorkerRecord = serde_json::from_slice(value)
            .map_err(|error| nonsense(format!("no worker's record: {error}")))?;
        match key.rsplit_once('/') {
            Some((_, name)) if name == record.name => Ok(record),
            _ => Err(nonsense(format!("the record of worker {:?}", record.name))),
        }
    }

    /// As it is written.
    pub(super) fn written(&self) -> Vec<u8> {
        // Strings and numbers alone: this cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl From<&v1::Device> for DeviceRecord {
    fn from(device: &v1::Device) -> Self {
        DeviceRecord { id: device.id.clone(), bytes: device.total_bytes }
    }
}

impl From<&v1::StageSpec> for Resident {
    fn from(spec: &v1::StageSpec) -> Self {
        let layers = spec.layers.unwrap_or_default();
        Resident {
            device: spec.device.clone(),
            model: spec.model.clone(),
            fingerprint: spec.fingerprint.clone(),
            layers: [layers.first, layers.end],
            dtype: spec.dtype.clone(),
            quantization: (!spec.quantization.is_empty()).then(|| spec.quantization.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_back_and_others_are_refused_by_key() {
        let spec = v1::StageSpec {
            model: "m".into(),
            fingerprint: "f".into(),
            device: "cpu".into(),
            layers: Some(v1::LayerRange { first: 2, end: 5 }),
            dtype: "bf16".into(),
            quantization: "int8".into(),
            ..v1::StageSpec::default()
        };
        let device = v1::Device { id: "cpu".into(), total_bytes: 1 << 30, ..v1::Device::default() };
        let record = WorkerRecord {
            name: "a".into(),
            address: "10.0.0.7:7801".into(),
            boot_id: "b".into(),
            rank: 7,
            devices: vec![(&device).into()],
            resident: vec![(&spec).into()],
        };
        assert_eq!(WorkerRecord::read("/strata/c/workers/a", &record.written()).unwrap(), record);
        assert_eq!((record.resident[0].layers, record.devices[0].bytes), ([2, 5], 1 << 30));
        let refused = |key: &str, value: &[u8]| WorkerRecord::read(key, value).unwrap_err().to_string();
        assert!(
            refused("/strata/c/workers/b", &record.written()).ends_with("holds the record of worker \"a\"")
        );
        assert!(
            refused("/strata/c/workers/a", b"{}").contains("holds no worker's record: missing field `name`")
        );
        assert!(refused("/strata/c/workers/a", &vec![b' '; MAX_RECORD + 1]).contains("at most 262144"));
        // Of a later version, and of one that says less.
        let other = br#"{"name":"a","address":"h:1","boot_id":"b","rank":1,"color":"red"}"#;
        assert!(WorkerRecord::read("/strata/c/workers/a", other).unwrap().resident.is_empty());
    }
}
