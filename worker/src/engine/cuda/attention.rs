//! Attention of a step: queries, keys and values to their places, then every row over the cache.

use super::{
    pass::{Pass, ROW_THREADS, raw_norm},
    state::Inputs,
    weights::Block,
    workspace::Scratch,
};
use crate::{
    engine::StepError,
    kernels::{
        cuda::{
            launch::{Attend, Bytes, Heads, Kernels, Places, RawCache, attention_bytes, follow},
            limits::{MAX_SPLITS, PARTIALS},
            memory::Ptr,
            product::{Epilogue, Rows},
        },
        ops::{AttentionMask, Distances},
    },
    model::architecture::{Attention, NormOver, Position, Slot},
};

impl Pass<'_> {
    /// Turns queries and keys, and puts keys and values into the cache of the stage's layer `index`.
    pub fn place(&self, attention: &Attention, index: usize, block: &Block) -> Result<(), StepError> {
        let kernels = self.head_kernels(attention)?;
        let Scratch { qkv, ref angles, .. } = self.state.scratch;
        let Inputs { positions, row_of, first_block, tables, .. } = self.inputs;
        let (table, pairs) = match attention.position {
            Position::None | Position::Buckets | Position::Distances(_) | Position::Slopes(_) => {
                (Ptr::NULL, 0)
            }
            Position::Rope(set) => (angles[set], self.tower.ropes[set].pairs() as i32),
        };
        let sharpening = match attention.position {
            Position::Rope(set) => self.tower.ropes[set].sharpening.as_ref(),
            Position::None | Position::Buckets | Position::Distances(_) | Position::Slopes(_) => None,
        };
        let plain = Heads {
            heads: attention.heads as i32,
            kv_heads: attention.kv_heads as i32,
            pairs,
            period: sharpening.map_or(0, |s| s.period as i32),
            beta: sharpening.map_or(0.0, |s| s.beta),
            clip: attention.clip.unwrap_or(0.0),
            ..Heads::default()
        };
        let all = attention.heads + 2 * attention.kv_heads;
        let grid = (self.tokens as u32, all.div_ceil(4) as u32, 1);
        let places = Places { positions, row_of, first_block, tables };
        let store = |heads: Heads, cache: RawCache| follow!(self.gpu, kernels.rope_store, grid, 128, 0; qkv, heads, table, places, cache);
        let Some(qk) = attention.qk_norm else { return Ok(store(plain, self.cache(index))?) };
        let norm = |slot| Ok::<_, StepError>(raw_norm(qk.norm, block.norm(slot)?));
        let each = i32::from(qk.over == NormOver::EachHead);
        let normed = Heads { query: norm(Slot::QueryNorm)?, key: norm(Slot::KeyNorm)?, each, ..plain };
        // What is turned first is not turned again.
        let (first, last) = match (qk.over, qk.turned) {
            (NormOver::Head | NormOver::EachHead, false) => (None, normed),
            (NormOver::Head | NormOver::EachHead, true) => {
                (Some(Heads { period: 0, ..plain }), Heads { pairs: 0, ..normed })
            }
            (NormOver::All, false) => (None, plain),
            (NormOver::All, true) => (Some(Heads { period: 0, ..plain }), Heads { pairs: 0, ..plain }),
        };
        if let Some(first) = first {
            store(first, RawCache::default())?;
        }
        if qk.over == NormOver::All {
            let grid = (self.tokens as u32, 2, 1);
            follow!(self.gpu, kernels.norm_heads_together, grid, 256, 0; qkv, normed)?;
        }
        Ok(store(last, self.cache(index))?)
    }

    fn head_kernels(&self, attention: &Attention) -> Result<&Kernels, StepError> {
        self.state.kernels.get(&attention.head_dim).ok_or(StepError::Weights)
    }

    fn cache(&self, index: usize) -> RawCache {
        self.state.cache.of(index).copied().unwrap_or_default()
    }

    /// Attention of the stage's layer `index`, rows of one token with kernels for one and the others with those for
    /// several.
    pub fn attend_rows(&self, attention: &Attention, index: usize, block: &Block) -> Result<(), StepError> {
        let (kernels, cache) = (self.head_kernels(attention)?, self.cache(index));
        let Scratch { qkv, attention: out, partials, .. } = self.state.scratch;
        let Inputs {
            positions, row_of, first_block, tables, by_length, row_first, row_start, row_count, ..
        } = self.inputs;
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let distant = match attention.position {
            Position::Distances(distances) => self.at_distances((attention, distances), block)?,
            _ => Distant::default(),
        };
        let slopes = match attention.position {
            Position::Slopes(slopes) => Some(slopes),
            _ => None,
        };
        let bias = block.table(Slot::PositionBias).map_or(Ptr::NULL, |table| table.values);
        let call = Attend {
            qkv,
            out,
            cache,
            places: Places { positions, row_of, first_block, tables },
            row_first,
            row_start,
            row_count,
            rows: Ptr::NULL,
            count: self.tokens as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            scale: attention.scale,
            softcap: attention.softcap.unwrap_or(0.0),
            window: match attention.mask {
                AttentionMask::Full => -1,
                AttentionMask::Causal => 0,
                AttentionMask::Window(window) => window as i32,
                AttentionMask::Near(most) => -2 - most as i32,
            },
            splits: 1,
            partial: partials,
            bias,
            distant: distant.rows,
            rows_of: distant.rows_of,
            first_distant: distant.first as i32,
            reach: distant.reach as i32,
            sloped: i32::from(slopes.is_some()),
            rounded: slopes.and_then(|slopes| slopes.rounded).unwrap_or(0.0),
        };
        // Parts, so that every multiprocessor has something to do: about two blocks of each; as many as the sums of all
        // places have room for.
        let splits = |blocks: usize, places: usize| {
            let room = PARTIALS as usize / (places * heads * (head_dim + 2) * 4).max(1);
            let wanted = (2 * self.gpu.multiprocessors as usize + blocks / 2) / blocks.max(1);
            wanted.min(room).clamp(1, MAX_SPLITS) as i32
        };
        let combine = |call: Attend| {
            if call.splits == 1 {
                return Ok(());
            }
            follow!(self.gpu, kernels.attention_combine, ((call.count * call.heads) as u32, 1, 1), 128, 0; call)
        };
        let tiles = kernels.tensor.as_ref().and_then(|tensor| tensor.attention.as_ref());
        let is_plain = bias == Ptr::NULL && distant.rows == Ptr::NULL && slopes.is_none();
        let Some(tiles) = tiles.filter(|_| is_plain) else {
            let call = Attend { splits: splits(self.tokens * heads, self.tokens), ..call };
            let grid = (self.tokens as u32, heads as u32, call.splits as u32);
            follow!(self.gpu, kernels.attention_plain, grid, 128, 0; call)?;
            return Ok(combine(call)?);
        };
        let (group, capped) = (heads / kv_heads, usize::from(attention.softcap.is_some()));
        let single = self.rows.iter().filter(|r| r.count == 1).count();
        let several = self.rows.len() - single;
        if single > 0 {
            let parts = group.div_ceil(16);
            let call = Attend {
                rows: by_length,
                count: single as i32,
                splits: splits(parts * kv_heads * single, single),
                ..call
            };
            let blocks = (parts * kv_heads * single) as u32 * call.splits as u32;
            follow!(self.gpu, tiles.decode[capped], (blocks, 1, 1), 128, attention_bytes(16, head_dim); call)?;
            combine(call)?;
        }
        if several > 0 {
            let longest = self.rows.iter().map(|r| r.count as usize).max().unwrap_or(1);
            let rows = by_length.offset(4 * single as u64);
            let call = Attend { rows, count: several as i32, ..call };
            let blocks = ((longest * group).div_ceil(64) * kv_heads * several) as u32;
            follow!(self.gpu, tiles.prefill[capped], (blocks, 1, 1), 128, attention_bytes(64, head_dim); call)?;
        }
        Ok(())
    }

    /// Queries, keys and values that the layer makes of the vectors for distances, as far as the longest row needs them.
    fn at_distances(
        &self,
        (attention, distances): (&Attention, Distances),
        block: &Block,
    ) -> Result<Distant, StepError> {
        let scratch = self.state.scratch.distances.as_ref().ok_or(StepError::Weights)?;
        let table = block.table(Slot::Distances).ok_or(StepError::Weights)?;
        let product = block.product(Slot::Qkv, 0)?;
        let (width, stride, size) = (self.tower.width, attention.qkv_width(), self.state.element.size());
        let longest = self.rows.iter().map(|row| row.count as usize).max().unwrap_or(1);
        let (first, last) = (distances.row(0, longest - 1), distances.row(longest - 1, 0));
        let count = last + 1 - first;
        self.narrow(scratch.vectors, table.values.offset((4 * first * width) as u64), count * width)?;
        if let Some(norm) = distances.norm {
            let norm = raw_norm(norm, block.norm(Slot::DistanceNorm)?);
            let grid = (count as u32, 1, 1);
            follow!(self.gpu, self.kernels()?.norm_rows, grid, ROW_THREADS, 0;
                scratch.vectors, scratch.vectors, Ptr::NULL, norm, width as i32, 0, Bytes::default())?;
        }
        // No more rows at a time than a step may have tokens.
        let most = self.state.scratch.tokens;
        for at in (0..count).step_by(most) {
            let x = Rows::new(scratch.vectors.offset((at * width) as u64 * size), width);
            let out = scratch.rows.offset((at * stride) as u64 * size);
            self.product(&product, most.min(count - at), x, (out, stride), Epilogue::Store)?;
        }
        Ok(Distant { rows: scratch.rows, rows_of: scratch.rows_of.ptr(), first, reach: self.tower.context })
    }
}

/// What stands for distances, as kernels take it: see `Attend` of `attention.cu`.
#[derive(Clone, Copy, Default)]
struct Distant {
    rows: Ptr,
    rows_of: Ptr,
    first: usize,
    reach: usize,
}
