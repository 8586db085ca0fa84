// Operations on rows: embedding, norms, rotary positions and the write into the cache, activations, pooling.

// One row of a table of any format.
__device__ __forceinline__ float table_at(Matrix table, int format, size_t row, int column) {
    size_t at = row * table.k + column;
    switch (format) {
        case 0: return ((const float*)table.values)[at];
        case 1: return widen(((const bf16*)table.values)[at]);
        case 2: return widen(((const f16*)table.values)[at]);
        case 3: return (float)((const signed char*)table.values)[at] * half_to_float(((const u16*)table.factors)[at / GROUP]);
        default: {
            u32 word = ((const u32*)table.values)[at / 8];
            int part = at % 8;
            int value = (word >> (8 * (part % 4) + 4 * (part / 4))) & 15;
            const u16* factors = (const u16*)table.factors + at / GROUP * 2;
            return (float)value * half_to_float(factors[0]) + half_to_float(factors[1]);
        }
    }
}

struct Tables {
    Matrix tokens, positions, segments;
    int token_format, position_format, segment_format;
    // Row of the first position.
    int first_position;
    float scale;
};

// residual (tokens, width): the scaled row of each token's id, plus the rows of its position and its segment.
extern "C" __global__ void embed(T* residual, Tables tables, const u32* ids, const u32* positions, const u32* segments) {
    int token = blockIdx.x;
    int width = tables.tokens.k;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float x = table_at(tables.tokens, tables.token_format, ids[token], i) * tables.scale;
        if (tables.segments.values) x += table_at(tables.segments, tables.segment_format, segments[token], i);
        if (tables.positions.values)
            x += table_at(tables.positions, tables.position_format, tables.first_position + positions[token], i);
        residual[(size_t)token * width + i] = narrowed(x);
    }
}

struct Norm {
    const float* weight;
    // Null for none.
    const float* bias;
    float epsilon;
    // Whether the mean is taken off first (LayerNorm), or not (RMSNorm).
    int centred;
};

// Elements that a thread takes at a time, where rows are whole packs, and packs that it keeps of a row.
#define PACK (16 / (int)sizeof(T))
#define HELD 4

// What a thread keeps of a norm's weight, whose length is that of rows of whole packs that threads can keep. No kernel before
// writes it, so it can be asked for before that has ended.
struct HeldNorm {
    float4 at[HELD][PACK / 4];

    __device__ __forceinline__ void load(const Norm& norm, int width) {
        const int stride = blockDim.x * PACK, first = threadIdx.x * PACK;
        if (width % PACK || width > HELD * stride) return;
#pragma unroll
        for (int h = 0; h < HELD; h++)
#pragma unroll
            for (int e = 0; e < PACK / 4; e++) {
                at[h][e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (h * stride + first < width) at[h][e] = ((const float4*)(norm.weight + h * stride + first))[e];
            }
    }
    __device__ __forceinline__ float operator()(int h, int e) const {
        const float4& four = at[h][e / 4];
        return e % 4 == 0 ? four.x : e % 4 == 1 ? four.y : e % 4 == 2 ? four.z : four.w;
    }
};

// The norm of one row by a block. `put(i, values, there)` gets the values of COUNT elements from i on; all lanes of a warp
// call it together, those without elements too. `scratch` holds 32 floats. Rows of whole packs that threads can keep are
// read once.
template <class Put>
__device__ __forceinline__ void norm_row(const T* from, const Norm& norm, const HeldNorm& weight, int width, float* scratch,
                                         const Put& put) {
    const int stride = blockDim.x * PACK, first = threadIdx.x * PACK;
    if (width % PACK == 0 && width <= HELD * stride) {
        Pack<T> held[HELD];
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            held[h] = {};
            if (h * stride + first < width) held[h] = load16(from + h * stride + first);
        }
        float mean = 0.0f;
        if (norm.centred) {
            float sum = 0.0f;
#pragma unroll
            for (int h = 0; h < HELD; h++)
#pragma unroll
                for (int e = 0; e < PACK; e++) sum += widen(held[h].at[e]);
            mean = block_sum(sum, scratch) / width;
        }
        float squares = 0.0f;
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (h * stride + first < width) {
#pragma unroll
                for (int e = 0; e < PACK; e++) {
                    float d = widen(held[h].at[e]) - mean;
                    squares = fmaf(d, d, squares);
                }
            }
        float factor = rsqrtf(block_sum(squares, scratch) / width + norm.epsilon);
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            // Warps leave together.
            if (h * stride + (int)(threadIdx.x / WARP) * WARP * PACK >= width) break;
            int i = h * stride + first;
            float values[PACK];
#pragma unroll
            for (int e = 0; e < PACK; e++) {
                values[e] = (widen(held[h].at[e]) - mean) * factor * weight(h, e);
                if (norm.bias && i < width) values[e] += norm.bias[i + e];
            }
            put(i, values, i < width);
        }
        return;
    }
    float mean = 0.0f;
    if (norm.centred) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += widen(from[i]);
        mean = block_sum(sum, scratch) / width;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float d = widen(from[i]) - mean;
        squares = fmaf(d, d, squares);
    }
    float factor = rsqrtf(block_sum(squares, scratch) / width + norm.epsilon);
    for (int base = threadIdx.x / WARP * WARP; base < width; base += blockDim.x) {
        int i = base + threadIdx.x % WARP;
        float y[1] = {0.0f};
        if (i < width) y[0] = (widen(from[i]) - mean) * factor * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
        put(i, y, i < width);
    }
}

// COUNT values become elements, where they are `there`; the values become what these stand for.
template <int COUNT>
__device__ __forceinline__ void store_values(T* to, float (&values)[COUNT], bool there, bool add) {
    if (!there) return;
    if constexpr (COUNT == 1) {
        *to = narrowed(add ? widen(*to) + values[0] : values[0]);
        values[0] = widen(*to);
    } else {
        Pack<T> pack;
        if (add) pack = load16(to);
#pragma unroll
        for (int e = 0; e < COUNT; e++) {
            pack.at[e] = narrowed(add ? widen(pack.at[e]) + values[e] : values[e]);
            values[e] = widen(pack.at[e]);
        }
        store16(to, pack);
    }
}

struct PutRow {
    T* out;
    size_t row;
    bool add;
    Bytes bytes;
    template <int COUNT>
    __device__ __forceinline__ void operator()(int i, float (&values)[COUNT], bool there) const {
        store_values(out + row + i, values, there, add);
        if (bytes.values) group_bytes(bytes, row + i, values, there);
    }
};

// out (rows, width) = norm(x), or out += norm(x). With `index`, row r is that of index[r]. `out` may be `x`. If `bytes` are
// wanted, rows are whole groups, and a product with quantized weights can begin at once.
extern "C" __global__ void norm_rows(T* out, const T* x, const u32* index, Norm norm, int width, int add, Bytes bytes) {
    __shared__ float scratch[WARP];
    let_next_come();
    HeldNorm weight;
    weight.load(norm, width);
    wait_for_previous();
    const T* from = x + (size_t)(index ? index[blockIdx.x] : blockIdx.x) * width;
    norm_row(from, norm, weight, width, scratch, PutRow{out, (size_t)blockIdx.x * width, add != 0, bytes});
}

// out (rows, width) = x, or the rows of it that `index` names.
extern "C" __global__ void gather_rows(T* out, const T* x, const u32* index, int width) {
    size_t from = index ? index[blockIdx.x] : blockIdx.x;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[(size_t)blockIdx.x * width + i] = x[from * width + i];
}

// Cosines, then sines, of every token's angles: (tokens, 2 * pairs). As transformers, the product is f32.
extern "C" __global__ void angles(float* out, const float* inv_freq, const float* factors, const u32* positions,
                                  const u32* sets, int pairs, int set_count) {
    int token = blockIdx.x;
    int set = min((int)sets[token], set_count - 1);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        float sine, cosine;
        sincosf((float)positions[token] * inv_freq[set * pairs + i], &sine, &cosine);
        out[(size_t)token * 2 * pairs + i] = cosine * factors[set];
        out[(size_t)token * 2 * pairs + pairs + i] = sine * factors[set];
    }
}

// Where a step's tokens lie. Position p of row r lies in block tables[first_block[r] + p / 16] of the cache.
struct Places {
    const u32* positions;
    const u32* row_of;
    const u32* first_block;
    const u32* tables;
};

// Of a row that pads a step, and has no tokens to be attended to by.
#define NO_BLOCK 0xffffffffu

// Of one layer: (blocks, kv_heads, 16, HEAD_DIM) each.
struct Cache {
    T* keys;
    T* values;
};

struct Heads {
    int heads, kv_heads;
    // Pairs of dimensions that turn; 0 for none.
    int pairs;
    // Whether each head has factors of its own in a norm.
    int each;
    // Norms of queries and keys; a null weight for none.
    Norm query, key;
    // Queries at position p are multiplied by 1 + beta ln(1 + floor(p / period)), if there is a period.
    int period;
    float beta;
    // Queries, keys and values are cut off at this on both sides once they are normed; 0 for no bound.
    float clip;
};

// Norms of queries (blockIdx.y 0) and of keys, each of all heads together, in place.
extern "C" __global__ void norm_heads_together(T* qkv, Heads h) {
    __shared__ float scratch[WARP];
    follow();
    bool keys = blockIdx.y;
    int width = (keys ? h.kv_heads : h.heads) * HEAD_DIM;
    T* x = qkv + (size_t)blockIdx.x * (h.heads + 2 * h.kv_heads) * HEAD_DIM + (keys ? h.heads * HEAD_DIM : 0);
    const Norm& norm = keys ? h.key : h.query;
    float mean = 0.0f;
    if (norm.centred) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += widen(x[i]);
        mean = block_sum(sum, scratch) / width;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float d = widen(x[i]) - mean;
        squares = fmaf(d, d, squares);
    }
    float factor = rsqrtf(block_sum(squares, scratch) / width + norm.epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        x[i] = narrowed((widen(x[i]) - mean) * factor * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f));
}

// One warp per head: norm and rotation of queries and keys in place, and keys and values into the cache, if there is one.
extern "C" __global__ void rope_store(T* qkv, Heads h, const float* angles, Places places, Cache cache) {
    let_next_come();
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int token = blockIdx.x;
    int head = blockIdx.y * (blockDim.x / WARP) + warp;
    int all = h.heads + 2 * h.kv_heads;
    constexpr int EACH = (HEAD_DIM + WARP - 1) / WARP, TURNS = (HEAD_DIM / 2 + WARP - 1) / WARP;
    bool is_value = head >= h.heads + h.kv_heads;
    int pairs = is_value ? 0 : h.pairs;
    // What the step was given does not wait for the kernel before: the place in the cache, and the angles.
    T* to = nullptr;
    float cosines[TURNS], sines[TURNS], sharpen = 1.0f;
    if (head < all) {
        if (head >= h.heads && cache.keys) {
            u32 position = places.positions[token];
            u32 block = places.tables[places.first_block[places.row_of[token]] + position / BLOCK_TOKENS];
            size_t at = ((size_t)block * h.kv_heads + (head - h.heads) % h.kv_heads) * BLOCK_TOKENS + position % BLOCK_TOKENS;
            if (block != NO_BLOCK) to = (is_value ? cache.values : cache.keys) + at * HEAD_DIM;
        }
        if (head < h.heads && h.period) sharpen += h.beta * logf(1.0f + places.positions[token] / (u32)h.period);
        const float* of_token = angles + (size_t)token * 2 * h.pairs;
#pragma unroll
        for (int e = 0; e < TURNS; e++) {
            int i = e * WARP + lane;
            cosines[e] = i < pairs ? of_token[i] : 0.0f;
            sines[e] = i < pairs ? of_token[h.pairs + i] : 0.0f;
        }
    }
    wait_for_previous();
    if (head >= all) return;
    T* x = qkv + ((size_t)token * all + head) * HEAD_DIM;
    Norm norm = head < h.heads ? h.query : h.key;
    if (!is_value && norm.weight) {
        int own = h.each ? (head < h.heads ? head : head - h.heads) * HEAD_DIM : 0;
        float sum = 0.0f, squares = 0.0f, held[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int i = e * WARP + lane;
            held[e] = i < HEAD_DIM ? widen(x[i]) : 0.0f;
            sum += held[e];
        }
        float mean = norm.centred ? warp_sum(sum) / HEAD_DIM : 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            float d = e * WARP + lane < HEAD_DIM ? held[e] - mean : 0.0f;
            squares += d * d;
        }
        float factor = rsqrtf(warp_sum(squares) / HEAD_DIM + norm.epsilon);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int i = e * WARP + lane;
            if (i < HEAD_DIM)
                x[i] = narrowed((held[e] - mean) * factor * norm.weight[own + i] + (norm.bias ? norm.bias[own + i] : 0.0f));
        }
        __syncwarp();
    }
    if (h.clip > 0.0f) {
        for (int i = lane; i < HEAD_DIM; i += WARP) x[i] = narrowed(fminf(fmaxf(widen(x[i]), -h.clip), h.clip));
        __syncwarp();
    }
#pragma unroll
    for (int e = 0; e < TURNS; e++) {
        int i = e * WARP + lane;
        if (i >= pairs) break;
        float a = widen(x[i]), b = widen(x[i + pairs]);
        T one = narrowed((a * cosines[e] - b * sines[e]) * sharpen);
        T other = narrowed((b * cosines[e] + a * sines[e]) * sharpen);
        x[i] = one;
        x[i + pairs] = other;
        if (to) {
            to[i] = one;
            to[i + pairs] = other;
        }
    }
    if (sharpen != 1.0f)
        for (int i = 2 * pairs + lane; i < HEAD_DIM; i += WARP) x[i] = narrowed(widen(x[i]) * sharpen);
    // What is not turned.
    if (to)
        for (int i = 2 * pairs + lane; i < HEAD_DIM; i += WARP) to[i] = x[i];
}

// gate_up (rows, 2 * inner): act(gate) * up into the first half.
template <int COUNT>
__device__ __forceinline__ void gate_mul_by(T* row, int i, int inner, int act) {
    if constexpr (COUNT == 1) {
        row[i] = narrowed(activate(act, widen(row[i])) * widen(row[inner + i]));
    } else {
        Pack<T> gates = load16(row + i), ups = load16(row + inner + i);
        // One function for all of a pack, chosen once: calls in a row wait for each other.
        float values[COUNT];
#pragma unroll
        for (int e = 0; e < COUNT; e++) values[e] = widen(gates.at[e]);
        activate_all<COUNT>(act, values);
#pragma unroll
        for (int e = 0; e < COUNT; e++) gates.at[e] = narrowed(values[e] * widen(ups.at[e]));
        store16(row + i, gates);
    }
}
// The blocks of a row come first in the grid, so that rows have no bound.
extern "C" __global__ void gate_mul(T* gate_up, int inner, int act, int blocks) {
    follow();
    T* row = gate_up + (size_t)(blockIdx.x / blocks) * 2 * inner;
    int i = (blockIdx.x % blocks) * blockDim.x + threadIdx.x;
    if (inner % PACK == 0) {
        if (i * PACK < inner) gate_mul_by<PACK>(row, i * PACK, inner, act);
    } else {
        for (int e = i * PACK; e < min(inner, (i + 1) * PACK); e++) gate_mul_by<1>(row, e, inner, act);
    }
}

extern "C" __global__ void activate_rows(T* x, size_t count, int act) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) x[i] = narrowed(activate(act, widen(x[i])));
}

// out (rows, n) = bias, or out += bias.
template <class E>
__device__ __forceinline__ void bias_rows_of(E* out, const float* bias, int n, int add) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    E* at = out + (size_t)blockIdx.y * n + i;
    narrow(add ? widen(*at) + bias[i] : bias[i], *at);
}
extern "C" __global__ void bias_rows(T* out, const float* bias, int n, int add) { bias_rows_of(out, bias, n, add); }
extern "C" __global__ void bias_values(float* out, const float* bias, int n, int add) { bias_rows_of(out, bias, n, add); }

// Values become cap * tanh(scale * value / cap), or scale * value where cap is 0.
extern "C" __global__ void soft_cap(float* values, size_t count, float scale, float cap) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x = values[i] * scale;
    values[i] = cap == 0.0f ? x : cap * tanhf(x / cap);
}

// out += factor * x.
extern "C" __global__ void add_scaled(T* out, const T* x, size_t count, float factor) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = narrowed(widen(out[i]) + factor * widen(x[i]));
}

// One vector of x (tokens, width) per output, at distances of `stride`: pool 0 = first, 1 = last, 2 = mean, 3 = sum by the root
// of the count, 4 = mean weighted by position, 5 = max, over the tokens of its row from the output on.
extern "C" __global__ void pool_rows(float* values, int stride, const T* x, const u32* outputs, const u32* row_of,
                                     const u32* row_first, const u32* row_count, int width, int pool) {
    u32 begin = outputs[blockIdx.x], row = row_of[begin];
    int position = begin - row_first[row], count = row_count[row] - position;
    const T* first = x + (size_t)begin * width;
    float* to = values + (size_t)blockIdx.x * stride;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = widen(first[(size_t)(pool == 1 ? count - 1 : 0) * width + i]), total = 1.0f;
        if (pool == 4) y *= total = position + 1;
        if (pool >= 2) {
            for (int t = 1; t < count; t++) {
                float other = widen(first[(size_t)t * width + i]);
                float weight = pool == 4 ? position + t + 1 : 1.0f;
                y = pool == 5 ? fmaxf(y, other) : y + weight * other;
                total += weight;
            }
            if (pool != 5) y /= pool == 3 ? sqrtf(total) : total;
        }
        to[i] = y;
    }
}

// Vectors of `width` become ones of length 1; the least length by which one is divided is torch's.
extern "C" __global__ void normalize_values(float* values, int width) {
    __shared__ float scratch[WARP];
    float* x = values + (size_t)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += x[i] * x[i];
    float length = fmaxf(sqrtf(block_sum(squares, scratch)), 1e-12f);
    for (int i = threadIdx.x; i < width; i += blockDim.x) x[i] /= length;
}

// Between rows and values.
extern "C" __global__ void narrow_values(T* out, const float* values, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = narrowed(values[i]);
}
extern "C" __global__ void widen_rows(float* values, const T* x, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] = widen(x[i]);
}

extern "C" __global__ void activate_values(float* values, size_t count, int act) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] = activate(act, values[i]);
}

// out (rows, taken) = the first columns of x (rows, width).
extern "C" __global__ void take_columns(float* out, const float* x, int width, int taken) {
    for (int i = threadIdx.x; i < taken; i += blockDim.x)
        out[(size_t)blockIdx.x * taken + i] = x[(size_t)blockIdx.x * width + i];
}
