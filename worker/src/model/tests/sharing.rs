//! A made-up model whose third layer reads the first one's keys and values, against the same model in plain loops.

use super::*;
use crate::{model::architecture::Norm, weights::PIECE};

const OWNER: usize = 0;
const SHARING: usize = 2;

/// The fixture's layers, of which one has queries alone.
fn made_up() -> (Checkpoint, Model) {
    let (checkpoint, mut model) = Model::open_dir(&models().join("shakespeare")).unwrap();
    model.tower.layers[SHARING].attention.shares = Some(OWNER);
    let queries = model.bound.get_mut(&(Site::Layer(SHARING), Slot::Qkv, 0)).unwrap();
    queries.retain(|bound| bound.first_row == 0);
    assert_eq!(queries.len(), 1);
    (checkpoint, model)
}

fn prompt() -> Vec<u32> {
    (0..37).map(|i| (i * 71 + i * i) % 2048).collect()
}

/// A model in plain loops, in f64.
struct Plain<'a> {
    checkpoint: &'a Checkpoint,
    model: &'a Model,
}

impl Plain<'_> {
    fn tensor(&self, name: &str) -> Vec<f64> {
        let tensor = self.checkpoint.tensor(name).unwrap();
        let (mut all, mut piece) = (Vec::new(), Vec::new());
        for offset in (0..tensor.bytes).step_by(PIECE) {
            self.checkpoint.read(tensor, offset, &mut piece).unwrap();
            all.extend(piece.chunks(2).map(|b| f64::from(half::bf16::from_le_bytes([b[0], b[1]]))));
        }
        all
    }

    /// The product of each row with the matrix called `name`.
    fn product(&self, name: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let weight = self.tensor(name);
        let dot = |w: &[f64], x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum();
        rows.iter().map(|x| weight.chunks(x.len()).map(|w| dot(w, x)).collect()).collect()
    }

    fn norm(&self, name: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let weight = self.tensor(name);
        let Some(Norm::Rms(eps)) = self.model.tower.norm else { panic!("the fixture has another norm") };
        let one = |x: &Vec<f64>| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = (mean + f64::from(eps)).sqrt().recip();
            x.iter().zip(&weight).map(|(x, w)| x * scale * w).collect()
        };
        rows.iter().map(one).collect()
    }

    /// Heads of each position turned by it.
    fn turned(&self, mut rows: Vec<Vec<f64>>, d: usize) -> Vec<Vec<f64>> {
        let frequencies = &self.model.tower.ropes[0].sets[0].inv_freq;
        for (position, row) in rows.iter_mut().enumerate() {
            for head in row.chunks_mut(d) {
                for (i, f) in frequencies.iter().enumerate() {
                    let (sin, cos) = (position as f64 * f64::from(*f)).sin_cos();
                    let (a, b) = (head[i], head[i + d / 2]);
                    (head[i], head[i + d / 2]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
        rows
    }

    /// Logits of the last token.
    fn logits(&self, ids: &[u32]) -> Vec<f64> {
        let width = self.model.tower.width;
        let embedding = self.tensor("model.embed_tokens.weight");
        let row = |id: &u32| embedding[*id as usize * width..][..width].to_vec();
        let mut x: Vec<Vec<f64>> = ids.iter().map(row).collect();
        let mut kept = Vec::new();
        let add = |x: &mut Vec<Vec<f64>>, y: Vec<Vec<f64>>| {
            x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
        };
        for (i, layer) in self.model.tower.layers.iter().enumerate() {
            let (a, at) = (&layer.attention, |name: &str| format!("model.layers.{i}.{name}.weight"));
            let d = a.head_dim;
            let input = self.norm(&at("input_layernorm"), &x);
            let queries = self.turned(self.product(&at("self_attn.q_proj"), &input), d);
            kept.push(match a.shares {
                Some(_) => (vec![], vec![]),
                None => (
                    self.turned(self.product(&at("self_attn.k_proj"), &input), d),
                    self.product(&at("self_attn.v_proj"), &input),
                ),
            });
            let (keys, values) = &kept[a.shares.unwrap_or(i)];
            let group = a.heads / a.kv_heads;
            let attended = queries.iter().enumerate().map(|(position, query)| {
                let head = |h: usize| {
                    let place = h / group * d..(h / group + 1) * d;
                    let score = |key: &Vec<f64>| {
                        let products = query[h * d..][..d].iter().zip(&key[place.clone()]);
                        (products.map(|(q, k)| q * k).sum::<f64>() * f64::from(a.scale)).exp()
                    };
                    let scores: Vec<f64> = keys[..=position].iter().map(score).collect();
                    let total: f64 = scores.iter().sum();
                    let mut out = vec![0.0; d];
                    for (score, value) in scores.iter().zip(values) {
                        let value = &value[place.clone()];
                        out.iter_mut().zip(value).for_each(|(o, v)| *o += score / total * v);
                    }
                    out
                };
                (0..a.heads).flat_map(head).collect()
            });
            let attended: Vec<Vec<f64>> = attended.collect();
            add(&mut x, self.product(&at("self_attn.o_proj"), &attended));
            let input = self.norm(&at("post_attention_layernorm"), &x);
            let (gate, up) =
                (self.product(&at("mlp.gate_proj"), &input), self.product(&at("mlp.up_proj"), &input));
            let inner = gate.iter().zip(&up).map(|(gate, up)| {
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<f64>>()
            });
            let inner: Vec<_> = inner.collect();
            add(&mut x, self.product(&at("mlp.down_proj"), &inner));
        }
        let last = self.norm("model.norm.weight", &x[x.len() - 1..]);
        self.product("model.embed_tokens.weight", &last).remove(0)
    }
}

fn worst(got: &[f32], want: &[f64]) -> f64 {
    got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

#[test]
fn a_layer_reads_an_earlier_layers_keys_and_values() {
    let (checkpoint, model) = made_up();
    let way = Way::new(DType::F32);
    let ids = prompt();
    let got = Pipeline::of(&checkpoint, &model, &[], way).step(&ids, 0, ids.len());
    let want = Plain { checkpoint: &checkpoint, model: &model }.logits(&ids);
    assert!(worst(&got, &want) < 1e-3, "{} off", worst(&got, &want));
    // That it has none of its own makes a difference, which this comparison sees.
    let own = Model::open_dir(&models().join("shakespeare")).unwrap().1;
    let other = Plain { checkpoint: &checkpoint, model: &own }.logits(&ids);
    assert!(worst(&got, &other) > 1e-2, "{} off", worst(&got, &other));
    let unshared = Pipeline::of(&checkpoint, &own, &[], way).step(&ids, 0, ids.len());
    assert!(worst(&unshared, &other) < 1e-3, "{} off", worst(&unshared, &other));
}

#[test]
fn a_shared_cache_gives_the_same_bits_under_every_chunking_and_cut_that_there_may_be() {
    let (checkpoint, model) = made_up();
    for way in Way::all() {
        let whole = Pipeline::of(&checkpoint, &model, &[], way).step(&prompt(), 0, 37);
        for cuts in [&[][..], &[3], &[3, 5]] {
            for chunk in [1, 7, 16] {
                let got = Pipeline::of(&checkpoint, &model, cuts, way).step(&prompt(), 0, chunk);
                assert!(got.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits()), "{way:?} {cuts:?}");
            }
        }
    }
}

#[test]
fn a_shared_cache_takes_no_bytes_and_is_not_cut_from_its_owner() {
    let (checkpoint, model) = made_up();
    let way = Way::new(DType::BF16);
    let profile = model.profile(&checkpoint, "m");
    assert_eq!(profile.layers[SHARING].states[0].shares, Some(OWNER as u32));
    assert_eq!(profile.cuts(), [true, false, false, true, true, true, true]);
    for (first, end, layers_with_their_own) in [(0, 6, 5), (0, 3, 2), (3, 6, 3)] {
        let spec = spec(&model, first, end, way);
        let state = State::new(&model, &spec, 3, 16, 2, way.cpu()).unwrap();
        let one_layer = 3 * (BLOCK_TOKENS * 2 * 2 * 32) as u64 * 2;
        assert_eq!(state.kv_bytes(), layers_with_their_own * one_layer);
        let room = StateRoom { positions: 3 * BLOCK_TOKENS as u64, slots: 0 };
        assert_eq!(profile.state_bytes(spec.layers, way.dtype, room).total(), state.kv_bytes());
        let counted = bytes::of_state(&model, &spec, 3, 16, 2);
        assert_eq!(counted, state.kv_bytes() + state.workspace_bytes());
        let weights = load(&checkpoint, &model, &spec);
        assert_eq!(weights.resident_bytes(), profile.weight_bytes(spec.layers, spec.format()));
    }
    for (first, end) in [(1, 6), (2, 6), (1, 3)] {
        let error = spec(&model, first, end, way).check(&model).unwrap_err().to_string();
        assert!(error.contains("layer 2, which reads the keys and values of layer 0"), "{error}");
    }
    let mut later = model.clone();
    later.tower.layers[SHARING].attention.shares = Some(SHARING);
    assert!(matches!(spec(&later, 0, 6, way).check(&later), Err(ModelError::SharedCache { .. })));
    let mut of_another_shape = model.clone();
    of_another_shape.tower.layers[OWNER].attention.kv_heads = 1;
    assert!(spec(&of_another_shape, 0, 6, way).check(&of_another_shape).is_err());
}
