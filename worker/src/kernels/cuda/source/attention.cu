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
    // The rows that this launch computes, and how many; null where it computes tokens, whatever their rows.
    const u32* rows;
    int count;
    int heads, kv_heads;
    float scale;
    // Scores become cap * tanh(score / cap); 0 for no cap.
    float softcap;
    // Positions that a query sees: -1 for all, 0 for those up to its own, so many up to its own if it is more, and if it is
    // less than -1, those at most -2 - window from its own on both sides.
    int window;
    // Parts of a sequence that are attended to side by side, and what each yields: the largest score, the sum of the
    // weights, and the weighted sum of values, per place and head. The places of a launch are its rows, which then have one
    // token each, or its tokens.
    int splits;
    float* partial;
    // Added to scores by bucket of the distance and head; null for nothing. Only `attention_plain` adds it.
    const float* bias;
    // Queries, keys and values of what stands for distances, rows of `q_stride`; null for nothing. Only `attention_plain` meets
    // them. Which row minus `first_distant` is that of a query so far behind a key, from -reach on.
    const T* distant;
    const u32* rows_of;
    int first_distant, reach;
    // Whether scores fall with the distance, as `Slopes` of ops.rs; and the factor on what is rounded, or 0 if nothing is. Only
    // `attention_plain` does it.
    int sloped;
    float rounded;
};

// The bucket of two positions, as `bucket` of ops.rs.
__device__ __forceinline__ int bucket_of(int query, int key) {
    int distance = abs(query - key), bucket = min(distance, 8);
    bucket += (distance >= 12) + (distance >= 16) + (distance >= 23) + (distance >= 32) + (distance >= 46) + (distance >= 64) +
              (distance >= 91);
    return key > query ? bucket + 16 : bucket;
}

// The nearest bf16 of a number that is finite.
__device__ __forceinline__ float to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    return __uint_as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

// The slope of a head, as `Slopes::of` of ops.rs.
__device__ __forceinline__ float slope_of(const Attend& a, int head) {
    int power = 1 << (31 - __clz(a.heads)), behind = head - power;
    float share = behind < 0 ? (head + 1) / (float)power : (2 * behind + 1) / (float)(2 * power);
    float slope = exp2f(-8.0f * share);
    return a.rounded > 0.0f ? to_bf16(slope) : slope;
}

// What is added to the score of a key, as `Slopes::addend` of ops.rs.
__device__ __forceinline__ float addend_of(const Attend& a, float slope, int query, int key) {
    if (a.rounded > 0.0f) return a.rounded * to_bf16(slope * to_bf16((float)key));
    return slope * (float)(key - query);
}

#define PARTIAL (HEAD_DIM + 2)

struct Seen {
    int from, to;
};

__device__ __forceinline__ Seen seen_by(const Attend& a, int position, int end) {
    if (a.window == -1) return {0, end};
    if (a.window < 0) return {max(0, position + 2 + a.window), min(end, position - 1 - a.window)};
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

// log2(e): scores are taken times it, and powers of two instead of powers of e.
#define LOG2_E 1.44269504f

// tanh by one power and one quotient: off by 1e-7 at most, which is as much of the cap.
__device__ __forceinline__ float capped(float score, float cap) {
    return cap * (1.0f - __fdividef(2.0f, power_of_two(2.0f * LOG2_E * __fdividef(score, cap)) + 1.0f));
}

// A score (a dot product) as it is compared, in units of log2(e).
__device__ __forceinline__ float score_of(const Attend& a, float dot) {
    float score = dot * a.scale;
    return (a.softcap > 0.0f ? capped(score, a.softcap) : score) * LOG2_E;
}

// What a sum with maximum `from` is multiplied by to have maximum `to`.
__device__ __forceinline__ float rescale(float from, float to) { return from == NEG_INF ? 0.0f : power_of_two(from - to); }

// A block of four warps per token, head and split; the warps take turns at the positions.
extern "C" __global__ void __launch_bounds__(128) attention_plain(Attend a) {
    constexpr int EACH = (HEAD_DIM + WARP - 1) / WARP, WARPS = 4;
    __shared__ float sums[WARPS][EACH * WARP], maxima[WARPS], totals[WARPS];
    follow();
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
    float most = NEG_INF, total = 0.0f, slope = a.sloped ? slope_of(a, head) : 0.0f;
    for (int position = from + warp; position < to; position += WARPS) {
        const T* key = cached(a, row, kv_head, position, false);
        const T* value = cached(a, row, kv_head, position, true);
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (e * WARP + lane < HEAD_DIM) dot = fmaf(q[e], widen(key[e * WARP + lane]), dot);
        if (a.distant) {
            size_t at = a.rows_of[a.places.positions[token] - position + a.reach] - a.first_distant;
            const T* query_there = a.distant + (at * (a.heads + 2 * a.kv_heads) + head) * HEAD_DIM;
            const T* key_there = a.distant + (at * (a.heads + 2 * a.kv_heads) + a.heads + kv_head) * HEAD_DIM;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (e * WARP + lane < HEAD_DIM) {
                    dot = fmaf(q[e], widen(key_there[e * WARP + lane]), dot);
                    dot = fmaf(widen(key[e * WARP + lane]), widen(query_there[e * WARP + lane]), dot);
                }
        }
        float score = score_of(a, warp_sum(dot));
        if (a.bias) score += a.bias[bucket_of(a.places.positions[token], position) * a.heads + head] * LOG2_E;
        if (a.sloped) score += addend_of(a, slope, a.places.positions[token], position) * LOG2_E;
        float larger = fmaxf(most, score);
        float keep = rescale(most, larger), weight = power_of_two(score - larger);
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

// Puts the splits together, in order. One block per place and head.
extern "C" __global__ void __launch_bounds__(128) attention_combine(Attend a) {
    __shared__ float shares[MAX_SPLITS];
    let_next_come();
    int place = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
    size_t token = a.rows ? a.row_first[a.rows[place]] : place;
    wait_for_previous();
    const float* partial = a.partial + (size_t)blockIdx.x * a.splits * PARTIAL;
    if (threadIdx.x < WARP) {
        float maxima[MAX_SPLITS / WARP], most = NEG_INF;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) {
            int s = i * WARP + threadIdx.x;
            maxima[i] = s < a.splits ? partial[s * PARTIAL] : NEG_INF;
            most = fmaxf(most, maxima[i]);
        }
        most = warp_max(most);
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) {
            int s = i * WARP + threadIdx.x;
            // Of a part that saw nothing, nothing was written.
            maxima[i] = rescale(maxima[i], most);
            if (maxima[i] > 0.0f) total += partial[s * PARTIAL + 1] * maxima[i];
        }
        total = warp_sum(total);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) shares[i * WARP + threadIdx.x] = maxima[i] / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        float y = 0.0f;
#pragma unroll 8
        for (int s = 0; s < a.splits; s++)
            if (shares[s] > 0.0f) y = fmaf(partial[s * PARTIAL + 2 + i], shares[s], y);
        a.out[(token * a.heads + head) * HEAD_DIM + i] = narrowed(y);
    }
}

#if ELEMENT != 0 && HEAD_DIM % 16 == 0

#define KEYS 64
// From row to row of a tile in shared memory: eight elements past a power of two, so that the eight rows of a matrix lie in
// different banks.
#define ROW (HEAD_DIM + 8)
// Pieces of 16 bytes in a row of a tile, and those of 64 rows that each of 128 threads copies.
#define PIECES (HEAD_DIM / 8)
#define COPIES (KEYS * PIECES / 128)

// Where the keys of one row and key-value head are: of a cache, blocks of 16 positions; of an encoder, rows of `qkv`.
struct Source {
    const T* keys;
    const T* values;
    // Null in an encoder.
    const u32* table;
    // Elements from block to block, and from position to position.
    size_t block;
    int position;
};

__device__ __forceinline__ Source source_of(const Attend& a, int row, int kv_head) {
    if (!a.cache.keys) {
        int width = (a.heads + 2 * a.kv_heads) * HEAD_DIM;
        const T* first = a.qkv + (size_t)a.row_first[row] * width + (a.heads + kv_head) * HEAD_DIM;
        return {first, first + a.kv_heads * HEAD_DIM, nullptr, (size_t)BLOCK_TOKENS * width, width};
    }
    size_t head = (size_t)kv_head * BLOCK_TOKENS * HEAD_DIM;
    return {a.cache.keys + head, a.cache.values + head, a.places.tables + a.places.first_block[row],
            (size_t)a.kv_heads * BLOCK_TOKENS * HEAD_DIM, HEAD_DIM};
}

// The numbers of a tile's four blocks, one per lane; the other lanes repeat them.
__device__ __forceinline__ u32 blocks_of(const Source& source, int first, int end) {
    int block = first / BLOCK_TOKENS + threadIdx.x % (KEYS / BLOCK_TOKENS);
    if (!source.table) return block;
    return block * BLOCK_TOKENS < end ? source.table[block] : 0;
}

// 64 positions of keys or values on their way into a tile; zeros past the end.
__device__ __forceinline__ void copy_tile(const Source& source, const T* all, u32 blocks, T* tile, int first, int end) {
    // Positions that all threads copy at a time; where blocks are whole turns, a turn is of one block.
    constexpr int EACH = 128 / PIECES;
    if constexpr (128 % PIECES == 0 && BLOCK_TOKENS % EACH == 0) {
        int mine = threadIdx.x / PIECES, part = threadIdx.x % PIECES * 8;
        const T* from = all + mine * source.position + part;
        T* to = tile + mine * ROW + part;
#pragma unroll
        for (int block = 0; block < KEYS / BLOCK_TOKENS; block++) {
            const T* at = from + __shfl_sync(FULL, blocks, block) * source.block;
#pragma unroll
            for (int i = 0; i < BLOCK_TOKENS; i += EACH) {
                int row = block * BLOCK_TOKENS + i;
                copy_async16(to + row * ROW, at + i * source.position, first + mine + row < end);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int piece = i * 128 + threadIdx.x, row = piece / PIECES, part = piece % PIECES * 8;
            size_t block = __shfl_sync(FULL, blocks, row / BLOCK_TOKENS);
            const T* from = all + block * source.block + row % BLOCK_TOKENS * source.position + part;
            copy_async16(tile + row * ROW + part, from, first + row < end);
        }
    }
}

// 128 threads. PREFILL: each of four warps has 16 of 64 rows of queries, and all of them go over all keys of a tile. Otherwise
// all have the same 16 rows, and each a quarter of the keys. CAPPED: scores have a soft cap.
template <bool PREFILL, bool CAPPED>
__device__ __forceinline__ void attend_tile(const Attend& a) {
    constexpr int ROWS = PREFILL ? 64 : 16, COLUMNS = PREFILL ? KEYS : KEYS / 4, BLOCKS = COLUMNS / 8, DIMS = HEAD_DIM / 8;
    T* queries = (T*)dynamic_shared;
    T* keys = queries + ROWS * ROW;
    T* values = keys + KEYS * ROW;
    let_next_come();
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int group = a.heads / a.kv_heads;
    // Row and key-value head are the quick parts of the number of a block; tiles of queries that see most come first.
    int pairs = a.count * a.kv_heads, pair = blockIdx.x % pairs, place = pair / a.kv_heads, kv_head = pair % a.kv_heads;
    int part_number = (int)(gridDim.x / pairs) - 1 - (int)(blockIdx.x / pairs);
    int row = a.rows[place], tile = part_number / a.splits, split = part_number % a.splits;
    int count = a.row_count[row], start = a.row_start[row], end = start + count;
    int first_row = tile * ROWS, all_rows = count * group;
    int last_row = min(first_row + ROWS, all_rows) - 1;
    Seen least = seen_by(a, start + first_row / group, end), last = seen_by(a, start + last_row / group, end);
    int lo = least.from, hi = last.to;
    // Tiles begin at multiples of 64, wherever the window does.
    int first_tile = lo / KEYS, tiles = (hi + KEYS - 1) / KEYS - first_tile;
    int part = (tiles + a.splits - 1) / a.splits;
    int from_tile = first_tile + split * part, to_tile = min(first_tile + tiles, from_tile + part);
    // In tiles up to here, and from there on, some row does not see every position.
    int whole_from = (last.from + KEYS - 1) / KEYS, whole_to = least.to / KEYS;

    float out[DIMS][4] = {}, most[2] = {NEG_INF, NEG_INF}, total[2] = {};
    const T* my_queries = queries + (PREFILL ? warp * 16 : 0) * ROW + lane % 16 * ROW + lane / 16 * 8;
    int my_first = PREFILL ? 0 : warp * COLUMNS;
    const T* my_keys = keys + (my_first + lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8;
    const T* my_values = values + (my_first + lane % 16) * ROW + lane / 16 * 8;
    const float scale = CAPPED ? LOG2_E : a.scale * LOG2_E;

    // What was in the cache before this step is asked for while the kernel before still runs.
    Source source = source_of(a, row, kv_head);
    bool any = first_row < all_rows && from_tile < to_tile, early = any && source.table && (from_tile + 1) * KEYS <= start;
    u32 blocks = any ? blocks_of(source, from_tile * KEYS, hi) : 0;
    if (early) {
        copy_tile(source, source.keys, blocks, keys, from_tile * KEYS, hi);
        copy_tile(source, source.values, blocks, values, from_tile * KEYS, hi);
    }
    wait_for_previous();
    if (first_row >= all_rows) return;
    int width = a.heads + 2 * a.kv_heads;
    // Row r of the tile is head r % group of token r / group.
    for (int i = threadIdx.x; i < ROWS * PIECES; i += 128) {
        int r = first_row + i / PIECES, part = i % PIECES * 8;
        bool there = r < all_rows;
        size_t token = a.row_first[row] + (there ? r / group : 0);
        const T* from = a.qkv + (token * width + kv_head * group + (there ? r % group : 0)) * HEAD_DIM + part;
        copy_async16(queries + i / PIECES * ROW + part, from, there);
    }
    if (any && !early) copy_tile(source, source.keys, blocks, keys, from_tile * KEYS, hi);
    copy_async_commit();
    if (any && !early) copy_tile(source, source.values, blocks, values, from_tile * KEYS, hi);
    copy_async_commit();
#pragma unroll 1
    for (int at = from_tile; at < to_tile; at++) {
        bool more = at + 1 < to_tile;
        if (more) blocks = blocks_of(source, (at + 1) * KEYS, hi);
        // Of what was asked for, all but the last has come: queries and keys.
        copy_async_wait<1>();
        __syncthreads();
        float scores[BLOCKS][4] = {};
#pragma unroll(PREFILL ? 4 : HEAD_DIM / 16)
        for (int d = 0; d < HEAD_DIM; d += 16) {
            u32 q[4];
            ldmatrix4(q, my_queries + d);
#pragma unroll
            for (int b = 0; b < BLOCKS; b += 2) {
                u32 k[4];
                ldmatrix4(k, my_keys + b * 8 * ROW + d);
                u32 low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
                mma(scores[b], q, low);
                mma(scores[b + 1], q, high);
            }
        }
        __syncthreads();
        if (more) copy_tile(source, source.keys, blocks, keys, (at + 1) * KEYS, hi);
        copy_async_commit();
        if constexpr (CAPPED) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int c = 0; c < 4; c++) scores[b][c] = capped(scores[b][c] * a.scale, a.softcap);
        }
        if (at < whole_from || at >= whole_to) {
            int first = at * KEYS + my_first + t * 2;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int r = first_row + (PREFILL ? warp * 16 : 0) + g + h * 8;
                // All rows of a token see the same.
                Seen seen = !PREFILL ? least : r < all_rows ? seen_by(a, start + r / group, end) : Seen{0, 0};
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        int position = first + b * 8 + c;
                        if (position < seen.from || position >= seen.to) scores[b][2 * h + c] = NEG_INF;
                    }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = NEG_INF;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) largest = fmaxf(largest, fmaxf(scores[b][2 * h], scores[b][2 * h + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
            largest = fmaxf(most[h], largest * scale);
            // A row that has seen nothing has no maximum to be taken off.
            float base = largest == NEG_INF ? 0.0f : largest, keep = power_of_two(most[h] - base);
            most[h] = largest;
            total[h] *= keep;
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                out[d][2 * h] *= keep;
                out[d][2 * h + 1] *= keep;
            }
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; c++) {
                    scores[b][c] = power_of_two(fmaf(scores[b][c], scale, -base));
                    total[h] += scores[b][c];
                }
        }
        copy_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            u32 p[4] = {two_elements(scores[b][0], scores[b][1]), two_elements(scores[b][2], scores[b][3]),
                        two_elements(scores[b + 1][0], scores[b + 1][1]), two_elements(scores[b + 1][2], scores[b + 1][3])};
#pragma unroll
            for (int d = 0; d < DIMS; d += 2) {
                u32 v[4];
                ldmatrix4_transposed(v, my_values + b * 8 * ROW + d * 8);
                u32 low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
                mma(out[d], p, low);
                mma(out[d + 1], p, high);
            }
        }
        __syncthreads();
        if (more) copy_tile(source, source.values, blocks, values, (at + 1) * KEYS, hi);
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
                *(u32*)(to + d * 8 + t * 2) = two_elements(out[d][2 * h] / total[h], out[d][2 * h + 1] / total[h]);
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
            // A row of one token: the rows of the tile are heads.
            int head = kv_head * group + first_row + r;
            if (a.splits == 1) {
                a.out[((size_t)a.row_first[row] * a.heads + head) * HEAD_DIM + d] = narrowed(sum / weight);
                continue;
            }
            float* partial = a.partial + (((size_t)place * a.heads + head) * a.splits + split) * PARTIAL;
            partial[2 + d] = sum;
            if (d == 0) {
                partial[0] = largest;
                partial[1] = weight;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 3) attention_prefill(Attend a) { attend_tile<true, false>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) attention_prefill_capped(Attend a) { attend_tile<true, true>(a); }
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode(Attend a) { attend_tile<false, false>(a); }
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_capped(Attend a) { attend_tile<false, true>(a); }

#endif
