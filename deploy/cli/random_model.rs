//! `strata random-model`: a model of a named shape with random weights, to measure with.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    panic::resume_unwind,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context, bail};
use half::bf16;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::args::{RandomModelArgs, Shape};

/// The configuration of a model of a named shape.
pub fn config(shape: Shape) -> Value {
    shape.llama().config()
}

/// Numbers of a Llama.
struct Llama {
    width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    context: usize,
}

impl Shape {
    fn llama(self) -> Llama {
        let [width, inner, layers, heads, kv_heads, vocab, context] = match self {
            Shape::Llama1m => [64, 160, 4, 4, 2, 512, 2048],
            Shape::Llama160m => [768, 2048, 12, 12, 12, 32000, 2048],
            Shape::Llama1_1b => [2048, 5632, 22, 32, 4, 32000, 2048],
            Shape::Llama3b => [3072, 8192, 28, 24, 8, 128_256, 8192],
            Shape::Llama8b => [4096, 14336, 32, 32, 8, 128_256, 8192],
        };
        Llama { width, inner, layers, heads, kv_heads, vocab, context }
    }
}

impl Llama {
    /// Tensors with their shapes, in the order of the file.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let head_dim = self.width / self.heads;
        let kv = self.kv_heads * head_dim;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.width])];
        for layer in 0..self.layers {
            let parts: [(&str, Vec<usize>); 9] = [
                ("input_layernorm", vec![self.width]),
                ("self_attn.q_proj", vec![self.width, self.width]),
                ("self_attn.k_proj", vec![kv, self.width]),
                ("self_attn.v_proj", vec![kv, self.width]),
                ("self_attn.o_proj", vec![self.width, self.width]),
                ("post_attention_layernorm", vec![self.width]),
                ("mlp.gate_proj", vec![self.inner, self.width]),
                ("mlp.up_proj", vec![self.inner, self.width]),
                ("mlp.down_proj", vec![self.width, self.inner]),
            ];
            tensors.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.width]));
        tensors.push(("lm_head.weight".to_owned(), vec![self.vocab, self.width]));
        tensors
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab, "max_position_embeddings": self.context, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "bos_token_id": 0, "eos_token_id": 1
        })
    }

    /// A byte-level BPE without merges, with a name for every row of the embedding.
    fn tokenizer(&self) -> Value {
        let special = ["<s>", "</s>"];
        let mut vocab = Map::new();
        let bytes = byte_letters().map(String::from);
        let fillers = (special.len() + 256..self.vocab).map(|i| format!("word{i}"));
        let names = special.map(str::to_owned).into_iter().chain(bytes).chain(fillers);
        for (id, name) in names.enumerate() {
            vocab.insert(name, id.into());
        }
        let added = special.iter().enumerate().map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        });
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true});
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Value>(),
            "normalizer": null, "pre_tokenizer": byte_level, "decoder": byte_level,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
        })
    }
}

/// The letter that stands for each byte in a byte-level tokenizer (GPT-2's `bytes_to_unicode`).
fn byte_letters() -> impl Iterator<Item = char> {
    let mut others = 0x100..;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => others.next().and_then(char::from_u32).unwrap_or(' '),
    })
}

/// `strata random-model`
pub fn write(args: &RandomModelArgs) -> anyhow::Result<()> {
    let directory = &args.directory;
    if directory.exists() {
        bail!("{}: exists already; name a directory that does not", directory.display());
    }
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    let model = args.shape.llama();
    for (name, json) in [("config.json", model.config()), ("tokenizer.json", model.tokenizer())] {
        let path = directory.join(name);
        fs::write(&path, json.to_string()).with_context(|| format!("writing {}", path.display()))?;
    }
    let path = directory.join("model.safetensors");
    weights(&path, &model, args.seed).with_context(|| format!("writing {}", path.display()))?;
    writeln!(std::io::stdout(), "{}", directory.display())?;
    Ok(())
}

/// The weights in bf16: norms are 1, all else is spread around 0 by 0.02 as of a model before its training.
fn weights(path: &Path, model: &Llama, seed: u64) -> anyhow::Result<()> {
    let (mut header, mut end) = (Map::new(), 0);
    let tensors = model.tensors();
    for (name, shape) in &tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]});
        header.insert(name.clone(), entry);
        end += bytes;
    }
    let mut header = Value::from(header).to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let chunks = chunks(&tensors, 8 + header.len());

    let style = ProgressStyle::with_template("{bar:32} {bytes:>11} / {total_bytes:11} {bytes_per_sec}");
    let bar = ProgressBar::new(end as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let next = AtomicUsize::new(0);
    let write = || -> io::Result<()> {
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let bytes: Vec<u8> = (0..chunk.values).flat_map(|i| chunk.value(seed, i).to_le_bytes()).collect();
            file.write_all_at(&bytes, chunk.at as u64)?;
            bar.inc(bytes.len() as u64);
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..threads).map(|_| scope.spawn(write)).collect();
        let ends = writers.into_iter().map(|w| w.join().unwrap_or_else(|panic| resume_unwind(panic)));
        ends.collect::<io::Result<()>>()
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// Values that a thread writes at once.
const CHUNK: usize = 1 << 19;

/// Values that are beside each other in the file.
struct Chunk {
    /// Where they begin in the file, in bytes.
    at: usize,
    values: usize,
    /// How many values were drawn before the first of them; None where all are 1.
    drawn: Option<u64>,
}

impl Chunk {
    /// The `i`-th of them, whoever asks for it and in whatever order.
    fn value(&self, seed: u64, i: usize) -> bf16 {
        self.drawn.map_or(bf16::ONE, |drawn| bf16::from_f32(0.02 * normal(seed, drawn + i as u64)))
    }
}

/// All values of all tensors, which begin at a place of the file.
fn chunks(tensors: &[(String, Vec<usize>)], mut at: usize) -> Vec<Chunk> {
    let (mut chunks, mut drawn) = (Vec::new(), 0);
    for (_, shape) in tensors {
        let count: usize = shape.iter().product();
        for first in (0..count).step_by(CHUNK) {
            let values = CHUNK.min(count - first);
            let random = shape.len() > 1;
            chunks.push(Chunk { at, values, drawn: random.then_some(drawn) });
            at += 2 * values;
            drawn += if random { values as u64 } else { 0 };
        }
    }
    chunks
}

/// About a standard normal deviate, the `index`-th one: the sum of four uniform ones, from SplitMix64.
fn normal(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let sum: f32 = (0..4).map(|i| f32::from((z >> (16 * i)) as u16)).sum();
    // The variance of each is (2^16)^2 / 12.
    (sum / 65536.0 - 2.0) * 3f32.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_parameters_of_their_models() {
        let millions = |shape: Shape| {
            let tensors = shape.llama().tensors();
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>() / 1_000_000
        };
        assert_eq!(millions(Shape::Llama8b), 8_030);
        assert_eq!(millions(Shape::Llama1_1b), 1_100);
        let eight = Shape::Llama8b.llama();
        assert_eq!(eight.config()["max_position_embeddings"], 8192);
        assert_eq!(eight.width / eight.heads, 128);
    }

    #[test]
    fn chunks_cover_the_file_and_draw_each_value_once() {
        let tensors =
            [("a".to_owned(), vec![3, CHUNK]), ("b".to_owned(), vec![5]), ("c".to_owned(), vec![2, 4])];
        let found: Vec<_> = chunks(&tensors, 100).iter().map(|c| (c.at, c.values, c.drawn)).collect();
        let (whole, drawn) = (2 * CHUNK, CHUNK as u64);
        let end = 100 + 3 * whole;
        let first = [0, 1, 2].map(|i| (100 + i * whole, CHUNK, Some(i as u64 * drawn)));
        assert_eq!(found, [&first[..], &[(end, 5, None), (end + 10, 8, Some(3 * drawn))]].concat());
    }
}
