// Attention of a step's tokens over their sequences, with an online softmax.
//
// `attention_plain` works for every format and width. `attention_prefill` and `attention_decode` do the same on the
// tensor cores for 16-bit formats: query heads that share a key-value head are rows of one tile.

struct Attend {
    // Rows of `q_stride`: queries, keys, values, each (heads, HEAD_DIM).
    const T* qkv;
    // (tokens, heads, HEAD_DIM).
    T* out;
    // No keys in an encoder, whose rows are whole sequences: then keys and values are those of `qkv`.
    Cache cache;
    Places places;
    const u32* row_first;
    const u32* row_start;
    // 0 for a row that pads a step: nothing is computed for its token.
    const u32* row_count;
    // The rows that this launch computes.
    const u32* rows;
    int heads, kv_heads;
    float scale;
    // Scores become cap * tanh(score / cap); 0 for no cap.
    float softcap;
    // Positions that a query sees: -1 for all, 0 for those up to its own, else so many up to its own.
    int window;
    // Parts of a sequence that are attended to side by side, and what each yields: the largest score, the sum of the
    // weights, and the weighted sum of values, per token and head.
    int splits;
    float* partial;
};

#define PARTIAL (HEAD_DIM + 2)

struct Seen {
    int from, to;
};

__device__ __forceinline__ Seen seen_by(const Attend& a, int position, int end) {
    if (a.window < 0) return {0, end};
    return {a.window > 0 ? max(0, position + 1 - a.window) : 0, position + 1};
}

// Key (or value) of a position of a row, for one key-value head.
__device__ __forceinline__ const T* cached(const Attend& a, int row, int kv_head, int position, bool value) {
    if (!a.cache.keys) {
        size_t token = a.row_first[row] + position;
        return a.qkv + (token * (a.heads + 2 * a.kv_heads) + a.heads + (value ? a.kv_heads : 0) + kv_head) * HEAD_DIM;
    }
    u32 block = a.places.tables[a.places.first_block[row] + position / BLOCK_TOKENS];
    return (value ? a.cache.values : a.cache.keys) +
           (((size_t)block * a.kv_heads + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS) * HEAD_DIM;
}

__device__ __forceinline__ float capped(const Attend& a, float dot) {
    float score = dot * a.scale;
    return a.softcap > 0.0f ? a.softcap * tanhf(score / a.softcap) : score;
}

// What a sum with maximum `from` is multiplied by to have maximum `to`.
__device__ __forceinline__ float rescale(float from, float to) { return from == NEG_INF ? 0.0f : expf(from - to); }

// A block of four warps per token, head and split; the warps take turns at the positions.
extern "C" __global__ void __launch_bounds__(128) attention_plain(Attend a) {
    constexpr int EACH = (HEAD_DIM + WARP - 1) / WARP, WARPS = 4;
    __shared__ float sums[WARPS][EACH * WARP], maxima[WARPS], totals[WARPS];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int token = blockIdx.x, head = blockIdx.y, split = blockIdx.z;
    int row = a.places.row_of[token], kv_head = head / (a.heads / a.kv_heads);
    if (a.row_count[row] == 0) return;
    Seen seen = seen_by(a, a.places.positions[token], a.row_start[row] + a.row_count[row]);
    int part = (seen.to - seen.from + a.splits - 1) / a.splits;
    int from = seen.from + split * part, to = min(seen.to, from + part);
    const T* query = a.qkv + ((size_t)token * (a.heads + 2 * a.kv_heads) + head) * HEAD_DIM;
    float q[EACH], sum[EACH] = {};
#pragma unroll
    for (int e = 0; e < EACH; e++) q[e] = e * WARP + lane < HEAD_DIM ? widen(query[e * WARP + lane]) : 0.0f;
    float most = NEG_INF, total = 0.0f;
    for (int position = from + warp; position < to; position += WARPS) {
        const T* key = cached(a, row, kv_head, position, false);
        const T* value = cached(a, row, kv_head, position, true);
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (e * WARP + lane < HEAD_DIM) dot = fmaf(q[e], widen(key[e * WARP + lane]), dot);
        float score = capped(a, warp_sum(dot));
        float larger = fmaxf(most, score);
        float keep = rescale(most, larger), weight = expf(score - larger);
        most = larger;
        total = total * keep + weight;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            float v = e * WARP + lane < HEAD_DIM ? widen(value[e * WARP + lane]) : 0.0f;
            sum[e] = fmaf(weight, v, sum[e] * keep);
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) sums[warp][e * WARP + lane] = sum[e];
    if (lane == 0) {
        maxima[warp] = most;
        totals[warp] = total;
    }
    __syncthreads();
    most = NEG_INF;
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, maxima[w]);
    total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += totals[w] * rescale(maxima[w], most);
    size_t place = (size_t)token * a.heads + head;
    float* partial = a.partial + (place * a.splits + split) * PARTIAL;
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        float y = 0.0f;
        for (int w = 0; w < WARPS; w++) y += sums[w][i] * rescale(maxima[w], most);
        if (a.splits == 1)
            a.out[place * HEAD_DIM + i] = narrowed(y / total);
        else
            partial[2 + i] = y;
    }
    if (a.splits > 1 && threadIdx.x == 0) {
        partial[0] = most;
        partial[1] = total;
    }
}

// Puts the splits of the tokens of `rows` together, in order. One block per row, token of it, and head.
extern "C" __global__ void attention_combine(Attend a) {
    int row = a.rows[blockIdx.x];
    if (blockIdx.z >= a.row_count[row]) return;
    size_t place = (size_t)(a.row_first[row] + blockIdx.z) * a.heads + blockIdx.y;
    const float* partial = a.partial + place * a.splits * PARTIAL;
    float most = NEG_INF, total = 0.0f;
    for (int s = 0; s < a.splits; s++) most = fmaxf(most, partial[s * PARTIAL]);
    for (int s = 0; s < a.splits; s++) total += partial[s * PARTIAL + 1] * rescale(partial[s * PARTIAL], most);
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        float y = 0.0f;
        for (int s = 0; s < a.splits; s++) {
            float share = rescale(partial[s * PARTIAL], most);
            // Of a part that saw nothing, nothing was written.
            if (share > 0.0f) y += partial[s * PARTIAL + 2 + i] * share;
        }
        a.out[place * HEAD_DIM + i] = narrowed(y / total);
    }
}

#if ELEMENT != 0 && HEAD_DIM % 16 == 0

#define KEYS 64
// From row to row of a tile in shared memory: eight elements past a power of two, so that the eight rows of a matrix lie in
// different banks.
#define ROW (HEAD_DIM + 8)

__device__ __forceinline__ void mma_t(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if ELEMENT == 1
    mma_bf16(d, a, b);
#else
    mma_f16(d, a, b);
#endif
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    return (u32)narrowed(low).bits | (u32)narrowed(high).bits << 16;
}

// 64 positions of keys or values on their way into a tile; zeros past the end.
__device__ __forceinline__ void copy_tile(const Attend& a, T* tile, int row, int kv_head, int first, int end, bool value) {
    constexpr int PIECES = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < KEYS * PIECES; i += blockDim.x) {
        int position = first + i / PIECES, part = i % PIECES * 8;
        bool there = position < end;
        const T* from = there ? cached(a, row, kv_head, position, value) + part : a.qkv;
        copy_async16(tile + i / PIECES * ROW + part, from, there);
    }
}

// Four warps. PREFILL: each has 16 of 64 rows of queries, and all of them go over all keys of a tile. Otherwise all have
// the same 16 rows, and each a quarter of the keys.
template <bool PREFILL>
__device__ __forceinline__ void attend_tile(const Attend& a) {
    constexpr int ROWS = PREFILL ? 64 : 16, COLUMNS = PREFILL ? KEYS : KEYS / 4, BLOCKS = COLUMNS / 8, DIMS = HEAD_DIM / 8;
    T* queries = (T*)dynamic_shared;
    T* keys = queries + ROWS * ROW;
    T* values = keys + KEYS * ROW;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int row = a.rows[blockIdx.z], kv_head = blockIdx.y, group = a.heads / a.kv_heads;
    int count = a.row_count[row], start = a.row_start[row], end = start + count;
    int tile = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
    int first_row = tile * ROWS, all_rows = count * group;
    if (first_row >= all_rows) return;
    int width = a.heads + 2 * a.kv_heads;
    // Row r of the tile is head r % group of token r / group.
    constexpr int PIECES = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
        int r = first_row + i / PIECES, part = i % PIECES * 8;
        bool there = r < all_rows;
        size_t token = a.row_first[row] + (there ? r / group : 0);
        const T* from = a.qkv + (token * width + kv_head * group + (there ? r % group : 0)) * HEAD_DIM + part;
        copy_async16(queries + i / PIECES * ROW + part, from, there);
    }
    int last_row = min(first_row + ROWS, all_rows) - 1;
    int lo = seen_by(a, start + first_row / group, end).from, hi = seen_by(a, start + last_row / group, end).to;
    // Tiles begin at multiples of 64, wherever the window does.
    int first_tile = lo / KEYS, tiles = (hi + KEYS - 1) / KEYS - first_tile;
    int part = (tiles + a.splits - 1) / a.splits;
    int from_tile = first_tile + split * part, to_tile = min(first_tile + tiles, from_tile + part);

    float out[DIMS][4] = {}, most[2] = {NEG_INF, NEG_INF}, total[2] = {};
    Seen seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = first_row + (PREFILL ? warp * 16 : 0) + g + h * 8;
        seen[h] = r < all_rows ? seen_by(a, start + r / group, end) : Seen{0, 0};
    }
    const T* my_queries = queries + (PREFILL ? warp * 16 : 0) * ROW + lane % 16 * ROW + lane / 16 * 8;
    int my_first = PREFILL ? 0 : warp * COLUMNS;

    if (from_tile < to_tile) copy_tile(a, keys, row, kv_head, from_tile * KEYS, hi, false);
    copy_async_commit();
    if (from_tile < to_tile) copy_tile(a, values, row, kv_head, from_tile * KEYS, hi, true);
    copy_async_commit();
    for (int at = from_tile; at < to_tile; at++) {
        // Of what was asked for, all but the last has come: queries and keys.
        copy_async_wait<1>();
        __syncthreads();
        float scores[BLOCKS][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 16) {
            u32 q[4];
            ldmatrix4(q, my_queries + d);
#pragma unroll
            for (int b = 0; b < BLOCKS; b += 2) {
                u32 k[4];
                ldmatrix4(k, keys + (my_first + b * 8 + lane / 16 * 8 + lane % 8) * ROW + d + lane / 8 % 2 * 8);
                u32 low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
                mma_t(scores[b], q, low);
                mma_t(scores[b + 1], q, high);
            }
        }
        __syncthreads();
        if (at + 1 < to_tile) copy_tile(a, keys, row, kv_head, (at + 1) * KEYS, hi, false);
        copy_async_commit();
        float largest[2] = {most[0], most[1]};
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int position = at * KEYS + my_first + b * 8 + t * 2 + c % 2;
                Seen range = seen[c / 2];
                bool visible = position >= range.from && position < range.to;
                scores[b][c] = visible ? capped(a, scores[b][c]) : NEG_INF;
                largest[c / 2] = fmaxf(largest[c / 2], scores[b][c]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(FULL, largest[h], 1));
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(FULL, largest[h], 2));
            float keep = rescale(most[h], largest[h]);
            most[h] = largest[h];
            total[h] *= keep;
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                out[d][2 * h] *= keep;
                out[d][2 * h + 1] *= keep;
            }
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                scores[b][c] = rescale(scores[b][c], most[c / 2]);
                total[c / 2] += scores[b][c];
            }
        }
        copy_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            u32 p[4] = {pair_of(scores[b][0], scores[b][1]), pair_of(scores[b][2], scores[b][3]),
                        pair_of(scores[b + 1][0], scores[b + 1][1]), pair_of(scores[b + 1][2], scores[b + 1][3])};
#pragma unroll
            for (int d = 0; d < DIMS; d += 2) {
                u32 v[4];
                ldmatrix4_transposed(v, values + (my_first + b * 8 + lane % 16) * ROW + d * 8 + lane / 16 * 8);
                u32 low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
                mma_t(out[d], p, low);
                mma_t(out[d + 1], p, high);
            }
        }
        __syncthreads();
        if (at + 1 < to_tile) copy_tile(a, values, row, kv_head, (at + 1) * KEYS, hi, true);
        copy_async_commit();
    }
    copy_async_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(FULL, total[h], 1);
        total[h] += __shfl_xor_sync(FULL, total[h], 2);
    }
    if constexpr (PREFILL) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = first_row + warp * 16 + g + h * 8;
            if (r >= all_rows) continue;
            T* to = a.out + ((size_t)(a.row_first[row] + r / group) * a.heads + kv_head * group + r % group) * HEAD_DIM;
#pragma unroll
            for (int d = 0; d < DIMS; d++)
                *(u32*)(to + d * 8 + t * 2) = pair_of(out[d][2 * h] / total[h], out[d][2 * h + 1] / total[h]);
        }
    } else {
        // The warps' quarters are put together in shared memory, of which keys and values are needed no longer.
        float* sums = (float*)dynamic_shared;
        __shared__ float maxima[4][16], totals[4][16];
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                float* to = sums + (warp * 16 + g + h * 8) * HEAD_DIM + d * 8 + t * 2;
                to[0] = out[d][2 * h];
                to[1] = out[d][2 * h + 1];
            }
            if (t == 0) {
                maxima[warp][g + h * 8] = most[h];
                totals[warp][g + h * 8] = total[h];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * HEAD_DIM; i += blockDim.x) {
            int r = i / HEAD_DIM, d = i % HEAD_DIM;
            if (first_row + r >= all_rows) break;
            float largest = NEG_INF, sum = 0.0f, weight = 0.0f;
            for (int w = 0; w < 4; w++) largest = fmaxf(largest, maxima[w][r]);
            for (int w = 0; w < 4; w++) {
                float share = rescale(maxima[w][r], largest);
                sum += sums[(w * 16 + r) * HEAD_DIM + d] * share;
                weight += totals[w][r] * share;
            }
            size_t token = a.row_first[row] + (first_row + r) / group;
            size_t place = token * a.heads + kv_head * group + (first_row + r) % group;
            if (a.splits == 1) {
                a.out[place * HEAD_DIM + d] = narrowed(sum / weight);
                continue;
            }
            float* partial = a.partial + (place * a.splits + split) * PARTIAL;
            partial[2 + d] = sum;
            if (d == 0) {
                partial[0] = largest;
                partial[1] = weight;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) attention_prefill(Attend a) { attend_tile<true>(a); }
extern "C" __global__ void __launch_bounds__(128) attention_decode(Attend a) { attend_tile<false>(a); }

#endif
