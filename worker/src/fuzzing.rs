//! What tests/fuzz throws at the worker: each function takes any bytes, and panics only if something is wrong with
//! Strata.

use candle_core::{Device, Tensor};
use serde_json::Value;
use strata_proto::{DType, Format, LayerRange, StateRoom, v1::Fence};

use crate::{
    kernels::{ops::TensorSpec, tensor::candle_dtype},
    model::Model,
    transport::{Activation, Payload, Tensors, tcp},
    weights::{Checkpoint, gguf, header},
};

const FENCE: Fence = Fence { term: 1, pipeline: 2, incarnation: 3 };
const STEP: u64 = 4;
const EXPECTED: [TensorSpec; 2] = [
    TensorSpec { dtype: DType::F32, rows: 2, columns: 3 },
    TensorSpec { dtype: DType::BF16, rows: 1, columns: 2 },
];

/// Frames that are read without complaint.
pub fn frames() -> Vec<Vec<u8>> {
    let tensor = |e: TensorSpec| Tensor::ones((e.rows, e.columns), candle_dtype(e.dtype), &Device::Cpu);
    let tensors = EXPECTED.into_iter().map(tensor).collect::<Result<_, _>>();
    let payloads = [
        tensors.ok().map(|tensors| Payload::Tensors(Tensors::Host(tensors))),
        Some(Payload::Poisoned("why".to_owned())),
    ];
    payloads.into_iter().flatten().map(|payload| frame_of(Activation { step: STEP, payload })).collect()
}

fn frame_of(activation: Activation) -> Vec<u8> {
    let mut bytes = Vec::new();
    let frame = tcp::Frame::of(&FENCE, activation);
    let written = frame.is_ok_and(|frame| frame.write(&mut bytes).is_ok());
    assert!(written, "a frame cannot be written");
    bytes
}

/// A frame with and without a checksum that fits: what is let in is what would be written.
pub fn frame(data: &[u8]) {
    let summed = [data, &crc32c::crc32c(data).to_le_bytes()].concat();
    for frame in [data, &summed] {
        let mut rest = frame;
        let Ok(activation) = tcp::read_activation(&mut rest, &FENCE, STEP, &EXPECTED) else { continue };
        let read = &frame[..frame.len() - rest.len()];
        if let Payload::Poisoned(reason) = &activation.payload
            && reason.contains(char::REPLACEMENT_CHARACTER)
        {
            continue;
        }
        // Signs of life may come before it.
        let written = frame_of(activation);
        let signs = read.strip_suffix(&written[..]).map(<[u8]>::len);
        assert!(signs.is_some_and(|n| n % tcp::HEARTBEAT_BYTES == 0), "reading and writing differ");
    }
}

/// The header of a file of weights, whose length is in its first bytes: tensors cover the data, each once.
pub fn header(data: &[u8]) {
    let Some((length, json)) = data.split_first_chunk() else { return };
    let (begin, length) = (8 + json.len() as u64, u64::from(u32::from_le_bytes(*length)));
    if length < begin {
        return;
    }
    if let Ok(tensors) = header::parse("file", 0, json, begin, length) {
        let bytes: u64 = tensors.iter().map(|(_, t)| t.bytes).sum();
        assert_eq!(bytes, length - begin, "a hole or an overlap");
    }
}

/// The header of a GGUF file, whose length is in its first bytes.
pub fn gguf(data: &[u8]) {
    let Some((length, header)) = data.split_first_chunk() else { return };
    // What is refused, is.
    let _ = gguf::fuzz(header, u64::from(u32::from_le_bytes(*length)));
}

/// A `config.json`, beside the weights of some model and by itself: it is refused, or its sizes can be counted.
pub fn config(data: &[u8], weights: &Checkpoint) {
    if std::fs::write(weights.dir().join("config.json"), data).is_err() {
        return;
    }
    let beside = Model::open(weights).ok();
    let alone = serde_json::from_slice::<Value>(data).ok().and_then(|v| Model::without_checkpoint(v).ok());
    for model in beside.iter().chain(&alone) {
        let profile = model.profile(weights, "model");
        let layers = LayerRange::new(0, profile.layer_count());
        let bytes = profile.weight_bytes(layers, Format::Float(DType::F32));
        assert!(bytes > 0, "a model without weights");
        let _ = profile.workspace_bytes(layers, 512, 8);
        let _ = profile.state_bytes(layers, DType::BF16, StateRoom { positions: 16, slots: 1 });
    }
}
