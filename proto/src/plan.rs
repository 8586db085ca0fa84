//! A plan: replicas, their stages, and what each stage costs.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};

use crate::{DType, FormatBytes, LayerRange, Quantization, StateBytes, error::quoted, v1};

/// How two neighbouring stages hand activations on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// Inside one process, through host memory.
    Loopback,
    /// Inside one process, from GPU to GPU.
    DeviceCopy,
    /// From GPU to GPU by a communicator of two ranks.
    Nccl,
    /// Framed over a TCP connection.
    Tcp,
}

impl LinkKind {
    /// All of them.
    pub const ALL: [LinkKind; 4] = [LinkKind::Loopback, LinkKind::DeviceCopy, LinkKind::Nccl, LinkKind::Tcp];

    /// The name used on the command line and in plans.
    pub fn name(self) -> &'static str {
        match self {
            LinkKind::Loopback => "loopback",
            LinkKind::DeviceCopy => "device-copy",
            LinkKind::Nccl => "nccl",
            LinkKind::Tcp => "tcp",
        }
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LinkKind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = LinkKind::ALL.into_iter().find(|kind| kind.name() == s);
        found
            .ok_or_else(|| format!("unknown link {}: expected loopback, device-copy, nccl or tcp", quoted(s)))
    }
}

impl From<LinkKind> for v1::LinkKind {
    fn from(kind: LinkKind) -> Self {
        match kind {
            LinkKind::Loopback => v1::LinkKind::Loopback,
            LinkKind::DeviceCopy => v1::LinkKind::DeviceCopy,
            LinkKind::Nccl => v1::LinkKind::Nccl,
            LinkKind::Tcp => v1::LinkKind::Tcp,
        }
    }
}

/// The link between two stages, and why it is that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkChoice {
    /// How activations travel.
    pub kind: LinkKind,
    /// What decided it, as a clause.
    pub why: String,
}

/// As `link` and `link_reason`, both null where there is no link.
fn link_fields<S: Serializer>(link: &Option<LinkChoice>, s: S) -> Result<S::Ok, S::Error> {
    let mut fields = s.serialize_map(Some(2))?;
    fields.serialize_entry("link", &link.as_ref().map(|l| l.kind))?;
    fields.serialize_entry("link_reason", &link.as_ref().map(|l| &l.why))?;
    fields.end()
}

/// One stage of a planned pipeline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StagePlan {
    /// Worker that runs it.
    pub worker: String,
    /// Device of that worker.
    pub device: String,
    /// Layers it holds.
    pub layers: LayerRange,
    /// Resident weights, embedding and head included where they belong.
    pub weight_bytes: u64,
    /// States of sequences, for the pipeline's capacity.
    #[serde(flatten)]
    pub states: StateBytes,
    /// Scratch for the largest step.
    pub workspace_bytes: u64,
    /// Predicted time of a one-row decode step, in milliseconds.
    pub predicted_ms: f64,
    /// What the device offered.
    pub budget_bytes: u64,
    /// Numerics class of the device's kernels at the plan's dtype.
    pub numerics: String,
    /// Link to the next stage; none on the last, or before links are chosen.
    #[serde(flatten, serialize_with = "link_fields")]
    pub link: Option<LinkChoice>,
    /// Its weights stay memory-mapped, because the device has too little memory.
    pub mapped: bool,
    /// What its weights would take in each format.
    pub footprint: FormatBytes,
}

impl StagePlan {
    /// Every byte the stage will hold.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.states.total() + self.workspace_bytes
    }
}

/// One pipeline: stages that together hold the whole model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replica {
    /// In order of layers.
    pub stages: Vec<StagePlan>,
    /// Token positions the cache holds: the same on every stage.
    pub kv_capacity_tokens: u64,
    /// Sequences whose states of fixed size it holds at once; 0 if no layer has any.
    pub state_slots: u32,
    /// How fast it is going to be.
    pub forecast: Forecast,
}

/// Predicted speed of a pipeline, in tokens per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Forecast {
    /// Of one stream.
    pub single: f64,
    /// Streams at once that `full` is about: those whose whole contexts the cache holds. Of an encoder: tokens of a
    /// step.
    pub batch: u32,
    /// Of all of them together.
    pub full: f64,
}

/// How a model is spread over devices.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Model name.
    pub model: String,
    /// Format of residual stream, wire and cache, and of weights that are not quantized.
    pub dtype: DType,
    /// What weights are turned into when they are loaded.
    pub quantization: Option<Quantization>,
    /// Whole copies of the model.
    pub replicas: Vec<Replica>,
    /// Module name to device as accelerate's `hf_device_map` shows it: an integer for a CUDA device, `cpu`, or
    /// `cpu:N` when there are several. Of the first replica.
    pub hf_device_map: BTreeMap<String, MapDevice>,
    /// What it costs that layers are on CPUs although there are GPUs; none if they are not.
    pub offload: Option<Offload>,
    /// What about it may surprise, in sentences.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Each replica by itself, as a plan of its own.
    pub fn apart(&self) -> impl Iterator<Item = Plan> {
        self.replicas.iter().map(|replica| Plan { replicas: vec![replica.clone()], ..self.clone() })
    }

    /// Predicted tokens per second: of one stream, and of as many as all replicas take.
    pub fn speed(&self) -> [f64; 2] {
        let forecasts = || self.replicas.iter().map(|replica| replica.forecast);
        [forecasts().map(|f| f.single).fold(0.0, f64::max), forecasts().map(|f| f.full).sum()]
    }
}

/// Layers on CPUs that are there because the GPUs are full. Of the first replica.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Offload {
    /// Layers on CPUs.
    pub layers: u32,
    /// Layers in all.
    pub of: u32,
    /// Bytes of the weights on CPUs.
    pub bytes: u64,
    /// Predicted tokens per second of one stream.
    pub tokens_per_second: f64,
    /// What they would be if the GPUs had the memory.
    pub without: f64,
    /// The mildest quantization with which all layers would be on GPUs, if there is one.
    pub quantize: Option<Quantization>,
}

/// A device as `hf_device_map` names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MapDevice {
    /// A CUDA device by number.
    Cuda(u32),
    /// Anything else by name.
    Named(String),
}

impl fmt::Display for MapDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapDevice::Cuda(n) => write!(f, "{n}"),
            MapDevice::Named(s) => f.write_str(s),
        }
    }
}

impl From<&Plan> for v1::Plan {
    fn from(plan: &Plan) -> Self {
        v1::Plan {
            model: plan.model.clone(),
            dtype: plan.dtype.name().to_owned(),
            quantization: Quantization::to_wire(plan.quantization),
            replicas: plan.replicas.iter().map(Into::into).collect(),
            hf_device_map: plan.hf_device_map.iter().map(|(k, v)| (k.clone(), v.to_string())).collect(),
            warnings: plan.warnings.clone(),
            offload: plan.offload.as_ref().map(|o| v1::Offload {
                layers: o.layers,
                of: o.of,
                bytes: o.bytes,
                tokens_per_second: o.tokens_per_second,
                without: o.without,
                quantize: Quantization::to_wire(o.quantize),
            }),
        }
    }
}

impl From<&Replica> for v1::Replica {
    fn from(replica: &Replica) -> Self {
        let stages = replica.stages.iter().map(|s| v1::PlannedStage {
            worker: s.worker.clone(),
            device: s.device.clone(),
            layers: Some(s.layers.into()),
            weight_bytes: s.weight_bytes,
            states: Some(s.states.into()),
            workspace_bytes: s.workspace_bytes,
            predicted_ms: s.predicted_ms,
            budget_bytes: s.budget_bytes,
            numerics: s.numerics.clone(),
            link: s.link.as_ref().map_or(String::new(), |l| l.kind.name().to_owned()),
            link_reason: s.link.as_ref().map_or(String::new(), |l| l.why.clone()),
            mapped: s.mapped,
            footprint: Some(s.footprint.into()),
        });
        let Forecast { single, batch, full } = replica.forecast;
        v1::Replica {
            stages: stages.collect(),
            kv_capacity_tokens: replica.kv_capacity_tokens,
            state_slots: replica.state_slots,
            forecast: Some(v1::Forecast { single, batch, full }),
        }
    }
}

impl TryFrom<v1::Plan> for Plan {
    type Error = String;

    fn try_from(plan: v1::Plan) -> Result<Self, String> {
        let map_device = |s: String| s.parse().map_or(MapDevice::Named(s), MapDevice::Cuda);
        let offload = |o: v1::Offload| {
            Ok::<_, String>(Offload {
                layers: o.layers,
                of: o.of,
                bytes: o.bytes,
                tokens_per_second: o.tokens_per_second,
                without: o.without,
                quantize: Quantization::from_wire(&o.quantize)?,
            })
        };
        Ok(Plan {
            warnings: plan.warnings,
            offload: plan.offload.map(offload).transpose()?,
            dtype: plan.dtype.parse()?,
            quantization: Quantization::from_wire(&plan.quantization)?,
            model: plan.model,
            replicas: plan.replicas.into_iter().map(Replica::try_from).collect::<Result<_, _>>()?,
            hf_device_map: plan.hf_device_map.into_iter().map(|(k, v)| (k, map_device(v))).collect(),
        })
    }
}

impl TryFrom<v1::Replica> for Replica {
    type Error = String;

    fn try_from(replica: v1::Replica) -> Result<Self, String> {
        let stage = |s: v1::PlannedStage| {
            Ok::<_, String>(StagePlan {
                layers: s.layers.ok_or("a planned stage has no layers")?.into(),
                link: match s.link.as_str() {
                    "" => None,
                    kind => Some(LinkChoice { kind: kind.parse()?, why: s.link_reason }),
                },
                mapped: s.mapped,
                worker: s.worker,
                footprint: s.footprint.unwrap_or_default().into(),
                device: s.device,
                weight_bytes: s.weight_bytes,
                states: s.states.unwrap_or_default().into(),
                workspace_bytes: s.workspace_bytes,
                predicted_ms: s.predicted_ms,
                budget_bytes: s.budget_bytes,
                numerics: s.numerics,
            })
        };
        Ok(Replica {
            stages: replica.stages.into_iter().map(stage).collect::<Result<_, _>>()?,
            kv_capacity_tokens: replica.kv_capacity_tokens,
            state_slots: replica.state_slots,
            forecast: replica.forecast.map_or(Forecast::default(), |f| Forecast {
                single: f.single,
                batch: f.batch,
                full: f.full,
            }),
        })
    }
}
