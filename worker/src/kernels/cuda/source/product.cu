// Products of rows with a matrix: out (rows, n) = x (rows, k) * weight^T.
//
// `matvec_*` takes few rows and reads each weight once per eight of them: memory is what it waits for. `matvec_*_1` can norm
// its row itself. `tile_*` takes more rows on the tensor cores: of quantized weights up to some hundred, and of experts any
// number; plain matrices of so many rows go to cuBLAS, quantized ones by way of `dequantize`.

// What becomes of a sum.
enum Epilogue {
    STORE = 0,        // out = T(sum + bias)
    ADD = 1,          // out = T(out + sum + bias)
    STORE_VALUES = 2, // out is f32
    GATED = 3,        // the first half of the outputs are gates: out = T(act(gate) * up)
    ACTIVATED = 4,    // out = T(act(sum + bias))
};

// Some rows of one expert: order[first..first + count].
struct Task {
    u32 expert, first;
    int count;
};

struct Product {
    Matrix weight;
    // (n), or null.
    const float* bias;
    // Rows of `x_stride` elements. Of quantized weights, the rows are in `bytes`, k elements each; `matvec_*_1` makes bytes
    // of its row itself.
    const T* x;
    // Of x, only for `matvec_*_1`; a null weight for none.
    Norm norm;
    Bytes bytes;
    void* out;
    int x_stride, out_stride;
    int rows;
    int epilogue, act;
    // Of experts: the rows in `order` of block y's task go through its expert; row r of these reads row r / divide of x
    // and writes row r of out. Null where all rows go through one matrix.
    const u32* order;
    const Task* tasks;
    int divide;
    // Bytes from expert to expert.
    u64 expert_values, expert_factors, expert_bias;
};

// The product of one matrix among those of the experts.
__device__ __forceinline__ Product of_expert(Product p, u32 expert) {
    p.weight.values += expert * p.expert_values;
    p.weight.factors += expert * p.expert_factors;
    if (p.bias) p.bias = (const float*)((const u8*)p.bias + expert * p.expert_bias);
    return p;
}

// The rows that a block computes, at most `tile`, and their expert. A task may be several tiles.
__device__ __forceinline__ Task rows_of_block(const Product& p, int tile) {
    Task task = {0, 0, p.rows};
    if (p.tasks) task = p.tasks[blockIdx.y];
    int first = (p.tasks ? blockIdx.z : blockIdx.y) * tile;
    return {task.expert, task.first + first, min(tile, task.count - first)};
}

__device__ __forceinline__ int source_row(const Product& p, int row) { return p.order ? p.order[row] / p.divide : row; }
__device__ __forceinline__ int target_row(const Product& p, int row) { return p.order ? p.order[row] : row; }

// Of row `row` of `out`.
__device__ __forceinline__ void put(const Product& p, int row, int column, float sum) {
    if (p.bias) sum += p.bias[column];
    size_t at = (size_t)row * p.out_stride + column;
    if (p.epilogue == STORE_VALUES) {
        ((float*)p.out)[at] = sum;
        return;
    }
    T* out = (T*)p.out + at;
    if (p.epilogue == ADD) sum += widen(*out);
    if (p.epilogue == ACTIVATED) sum = activate_inline(p.act, sum);
    *out = narrowed(sum);
}

// Eight outputs next to each other, or the first `left` of them, whose bias has been added; of a gated product, its results.
__device__ __forceinline__ void put_pack(const Product& p, int row, int column, int left, float (&values)[8]) {
    size_t at = (size_t)row * p.out_stride + column;
    if (p.epilogue == STORE_VALUES) {
        float* out = (float*)p.out + at;
        if (left >= 8 && p.out_stride % 4 == 0) {
            *(float4*)out = make_float4(values[0], values[1], values[2], values[3]);
            *(float4*)(out + 4) = make_float4(values[4], values[5], values[6], values[7]);
            return;
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (e < left) out[e] = values[e];
        return;
    }
    T* out = (T*)p.out + at;
    bool whole = left >= 8 && p.out_stride % 8 == 0;
    T old[8];
    if (p.epilogue == ADD) {
        if (whole && sizeof(T) == 2) *(uint4*)old = *(const uint4*)out;
        else
#pragma unroll
            for (int e = 0; e < 8; e++) old[e] = e < left ? out[e] : T{};
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
        if (p.epilogue == ADD) values[e] += widen(old[e]);
        if (p.epilogue == ACTIVATED) values[e] = activate(p.act, values[e]);
        old[e] = narrowed(values[e]);
    }
    if (whole && sizeof(T) == 2) *(uint4*)out = *(const uint4*)old;
    else
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (e < left) out[e] = old[e];
}

// Weights of two outputs times M rows, summed over the lanes of a warp.
template <class W, int M>
struct Dense {
    static constexpr int COUNT = Pack<W>::COUNT;
    static constexpr int UNROLL = M <= 2 ? 4 : M <= 4 ? 2 : 1;

    static __device__ __forceinline__ void sums(const Product& p, const int (&outputs)[2], const int (&sources)[M],
                                                float (&sum)[2][M]) {
        int lane = threadIdx.x % WARP, k = p.weight.k;
        const W* all = (const W*)p.weight.values;
        const W* w[2] = {all + (size_t)outputs[0] * k, all + (size_t)outputs[1] * k};
        // 16 bytes at a time need rows that begin at a multiple of 16 bytes.
        if (k % COUNT == 0 && (sizeof(W) != sizeof(T) || p.x_stride % COUNT == 0)) {
            for (int at = lane * COUNT; at < k; at += WARP * COUNT * UNROLL) {
                Pack<W> held[UNROLL][2];
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    int here = at + u * WARP * COUNT;
                    if (here < k) {
                        held[u][0] = load16(w[0] + here);
                        held[u][1] = load16(w[1] + here);
                    }
                }
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    int here = at + u * WARP * COUNT;
                    if (here >= k) break;
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        const T* x = p.x + (size_t)sources[m] * p.x_stride + here;
                        float wide[COUNT];
                        if constexpr (sizeof(W) == sizeof(T)) {
                            Pack<T> pack = load16(x);
#pragma unroll
                            for (int i = 0; i < COUNT; i++) wide[i] = widen(pack.at[i]);
                        } else {
#pragma unroll
                            for (int i = 0; i < COUNT; i++) wide[i] = widen(x[i]);
                        }
#pragma unroll
                        for (int i = 0; i < COUNT; i++) {
                            sum[0][m] = fmaf(widen(held[u][0].at[i]), wide[i], sum[0][m]);
                            sum[1][m] = fmaf(widen(held[u][1].at[i]), wide[i], sum[1][m]);
                        }
                    }
                }
            }
            return;
        }
        for (int i = lane; i < k; i += WARP) {
            float a = widen(w[0][i]), b = widen(w[1][i]);
#pragma unroll
            for (int m = 0; m < M; m++) {
                float x = widen(p.x[(size_t)sources[m] * p.x_stride + i]);
                sum[0][m] = fmaf(a, x, sum[0][m]);
                sum[1][m] = fmaf(b, x, sum[1][m]);
            }
        }
    }
};

__device__ __forceinline__ int dot16(int4 a, int4 b, int sum) {
    return __dp4a(a.w, b.w, __dp4a(a.z, b.z, __dp4a(a.y, b.y, __dp4a(a.x, b.x, sum))));
}

// Of 32 half bytes and as many bytes.
__device__ __forceinline__ int dot32(int4 w, int4 first, int4 second) {
    int sum = __dp4a(w.x & 0x0f0f0f0f, first.x, __dp4a((w.x >> 4) & 0x0f0f0f0f, first.y, 0));
    sum = __dp4a(w.y & 0x0f0f0f0f, first.z, __dp4a((w.y >> 4) & 0x0f0f0f0f, first.w, sum));
    sum = __dp4a(w.z & 0x0f0f0f0f, second.x, __dp4a((w.z >> 4) & 0x0f0f0f0f, second.y, sum));
    return __dp4a(w.w & 0x0f0f0f0f, second.z, __dp4a((w.w >> 4) & 0x0f0f0f0f, second.w, sum));
}

template <int M>
struct Int8 {
    static __device__ __forceinline__ void sums(const Product& p, const int (&outputs)[2], const int (&sources)[M],
                                                float (&sum)[2][M]) {
        int lane = threadIdx.x % WARP, k = p.weight.k, groups = k / GROUP;
        const signed char* all = (const signed char*)p.weight.values;
        const u16* factors = (const u16*)p.weight.factors;
        constexpr int UNROLL = M <= 2 ? 4 : 2;
        for (int at = lane * 16; at < k; at += WARP * 16 * UNROLL) {
            int4 held[UNROLL][2];
            float factor[UNROLL][2];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int here = at + u * WARP * 16;
                if (here < k) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        held[u][r] = *(const int4*)(all + (size_t)outputs[r] * k + here);
                        factor[u][r] = half_to_float(factors[(size_t)outputs[r] * groups + here / GROUP]);
                    }
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int here = at + u * WARP * 16;
                if (here >= k) break;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    int4 x = *(const int4*)(p.bytes.values + (size_t)sources[m] * k + here);
                    float scale = p.bytes.factors[(size_t)sources[m] * groups + here / GROUP];
#pragma unroll
                    for (int r = 0; r < 2; r++) sum[r][m] += (float)dot16(held[u][r], x, 0) * (factor[u][r] * scale);
                }
            }
        }
    }
};

template <int M>
struct Int4 {
    static __device__ __forceinline__ void sums(const Product& p, const int (&outputs)[2], const int (&sources)[M],
                                                float (&sum)[2][M]) {
        int lane = threadIdx.x % WARP, k = p.weight.k, groups = k / GROUP;
        const u8* all = p.weight.values;
        const u32* factors = (const u32*)p.weight.factors;
        constexpr int UNROLL = M <= 2 ? 4 : 2;
        for (int group = lane; group < groups; group += WARP * UNROLL) {
            int4 held[UNROLL][2];
            u32 both[UNROLL][2];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int here = group + u * WARP;
                if (here < groups) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        size_t place = (size_t)outputs[r] * groups + here;
                        held[u][r] = *(const int4*)(all + place * (GROUP / 2));
                        both[u][r] = factors[place];
                    }
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int here = group + u * WARP;
                if (here >= groups) break;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    size_t place = (size_t)sources[m] * groups + here;
                    const int4* x = (const int4*)(p.bytes.values + place * GROUP);
                    int4 first = x[0], second = x[1];
                    float scale = p.bytes.factors[place], total = p.bytes.sums[place];
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        int4 w = held[u][r];
                        int dot = dot32(w, first, second);
                        float factor = half_to_float((u16)both[u][r]), least = half_to_float((u16)(both[u][r] >> 16));
                        sum[r][m] += (float)dot * (factor * scale) + least * total;
                    }
                }
            }
        }
    }
};

// One warp per two outputs and M rows.
template <class Weights, int M>
__device__ __forceinline__ void matvec(const Product& all) {
    Task span = rows_of_block(all, M);
    Product p = of_expert(all, span.expert);
    int n = p.weight.n, half = n / 2;
    int pair = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    bool gated = p.epilogue == GATED;
    if (span.count <= 0 || (gated ? pair >= half : 2 * pair >= n)) return;
    int outputs[2] = {gated ? pair : 2 * pair, gated ? pair + half : min(2 * pair + 1, n - 1)};
    int sources[M];
#pragma unroll
    for (int m = 0; m < M; m++) sources[m] = source_row(p, span.first + min(m, span.count - 1));
    float sum[2][M] = {};
    Weights::sums(p, outputs, sources, sum);
#pragma unroll
    for (int m = 0; m < M; m++) {
        sum[0][m] = warp_sum(sum[0][m]);
        sum[1][m] = warp_sum(sum[1][m]);
    }
    if (threadIdx.x % WARP != 0) return;
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (m >= span.count) break;
        int row = span.first + m;
        if (gated) {
            float gate = sum[0][m] + (p.bias ? p.bias[outputs[0]] : 0.0f), up = sum[1][m] + (p.bias ? p.bias[outputs[1]] : 0.0f);
            ((T*)p.out)[(size_t)target_row(p, row) * p.out_stride + pair] = narrowed(activate(p.act, gate) * up);
        } else {
            put(p, target_row(p, row), outputs[0], sum[0][m]);
            if (2 * pair + 1 < n) put(p, target_row(p, row), outputs[1], sum[1][m]);
        }
    }
}

#define MATVEC(NAME, ...) \
    extern "C" __global__ void __launch_bounds__(256) NAME(Product p) { follow(); matvec<__VA_ARGS__>(p); }
MATVEC(matvec_f32_2, Dense<float, 2>, 2)
MATVEC(matvec_f32_4, Dense<float, 4>, 4)
MATVEC(matvec_f32_8, Dense<float, 8>, 8)
MATVEC(matvec_bf16_2, Dense<bf16, 2>, 2)
MATVEC(matvec_bf16_4, Dense<bf16, 4>, 4)
MATVEC(matvec_bf16_8, Dense<bf16, 8>, 8)
MATVEC(matvec_f16_2, Dense<f16, 2>, 2)
MATVEC(matvec_f16_4, Dense<f16, 4>, 4)
MATVEC(matvec_f16_8, Dense<f16, 8>, 8)
MATVEC(matvec_int8_2, Int8<2>, 2)
MATVEC(matvec_int8_4, Int8<4>, 4)
MATVEC(matvec_int8_8, Int8<8>, 8)
MATVEC(matvec_int4_2, Int4<2>, 2)
MATVEC(matvec_int4_4, Int4<4>, 4)
MATVEC(matvec_int4_8, Int4<8>, 8)

// Rows of x as bytes. One warp per group.
extern "C" __global__ void quantize_rows(Bytes out, const T* x, int x_stride, int k, int rows) {
    follow();
    int groups = k / GROUP;
    int task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (task >= rows * groups) return;
    int row = task / groups, group = task % groups;
    float value[1] = {widen(x[(size_t)row * x_stride + group * GROUP + lane])};
    group_bytes(out, (size_t)task * GROUP + lane, value, true);
}

#if ELEMENT != 0

// --- quantized weights as elements ---

#if ELEMENT == 1
#define ONE_TWICE 0x3f803f80
#define fma_two fma_two_bf16
#else
#define ONE_TWICE 0x3c003c00
#define fma_two fma_two_f16
#endif

// Two bytes or half bytes of a word as elements, whole numbers. `both` has them in the low bits of its halves.
//
// A small number in the low bits of the mantissa of a power of two adds itself to that. Bytes of bf16, whose mantissa has seven
// bits, take off twice as much if they are negative.
__device__ __forceinline__ u32 two_of_int8(u32 both) {
#if ELEMENT == 1
    return fma_two(and_or(both, 0x007f007f, 0x43004300), ONE_TWICE, and_or(both, 0x00800080, 0xc300c300));
#else
    return fma_two(both ^ 0x64806480, ONE_TWICE, 0xe480e480);
#endif
}

__device__ __forceinline__ u32 two_of_int4(u32 both) {
#if ELEMENT == 1
    return fma_two(and_or(both, 0x000f000f, 0x43004300), ONE_TWICE, 0xc300c300);
#else
    return fma_two(and_or(both, 0x000f000f, 0x64006400), ONE_TWICE, 0xe400e400);
#endif
}

__device__ __forceinline__ u32 two_elements(float low, float high) {
#if ELEMENT == 1
    return two_bf16(low, high);
#else
    return two_f16(low, high);
#endif
}

// The element nearest to an f16, twice.
__device__ __forceinline__ u32 twice(u16 half) {
#if ELEMENT == 1
    float wide = half_to_float(half);
    return two_bf16(wide, wide);
#else
    return half * 0x10001u;
#endif
}

// The eight half bytes of a word as elements, two and two: times a factor, plus something.
__device__ __forceinline__ void eight_of_int4(u32 (&out)[4], u32 word, u32 factor, u32 least) {
    u32 low = __byte_perm(word, 0, 0x4140), high = __byte_perm(word, 0, 0x4342);
    out[0] = fma_two(two_of_int4(low), factor, least);
    out[1] = fma_two(two_of_int4(high), factor, least);
    out[2] = fma_two(two_of_int4(low >> 4), factor, least);
    out[3] = fma_two(two_of_int4(high >> 4), factor, least);
}

#endif

// What eight quantized weights stand for: bytes in two words, or half bytes in the first of them.
template <bool INT4>
__device__ __forceinline__ void eight_elements(T* to, uint2 raw, u32 both) {
    float factor = half_to_float((u16)both), least = INT4 ? half_to_float((u16)(both >> 16)) : 0.0f;
#if ELEMENT != 0
    u32 out[4];
    if constexpr (INT4) {
        eight_of_int4(out, raw.x, twice((u16)both), twice((u16)(both >> 16)));
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 two = (i < 2 ? raw.x : raw.y) >> i % 2 * 16;
            out[i] = two_elements((float)(signed char)two * factor, (float)(signed char)(two >> 8) * factor);
        }
    }
    *(uint4*)to = make_uint4(out[0], out[1], out[2], out[3]);
#else
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if constexpr (INT4) to[i] = fmaf((float)(raw.x >> (i % 4 * 8 + i / 4 * 4) & 15u), factor, least);
        else to[i] = (float)(signed char)((i < 4 ? raw.x : raw.y) >> i % 4 * 8) * factor;
    }
#endif
}

// Threads of a block of `dequantize_*`, and how often each turns eight weights.
#define DEQUANTIZE_THREADS 256
#define DEQUANTIZE_TURNS 4

// Rows first to first + count of quantized weights as elements of T: out (count, k).
template <bool INT4>
__device__ __forceinline__ void dequantize(T* out, const Matrix& weight, int first, int count) {
    follow();
    size_t end = (size_t)count * weight.k / 8, before = (size_t)first * weight.k / 8;
    size_t begin = (size_t)blockIdx.x * DEQUANTIZE_THREADS * DEQUANTIZE_TURNS + threadIdx.x;
    uint2 raw[DEQUANTIZE_TURNS];
    u32 factor[DEQUANTIZE_TURNS];
#pragma unroll
    for (int i = 0; i < DEQUANTIZE_TURNS; i++) {
        size_t at = begin + i * DEQUANTIZE_THREADS, from = before + at;
        if (at >= end) break;
        raw[i] = INT4 ? make_uint2(((const u32*)weight.values)[from], 0) : ((const uint2*)weight.values)[from];
        factor[i] = INT4 ? ((const u32*)weight.factors)[from * 8 / GROUP] : ((const u16*)weight.factors)[from * 8 / GROUP];
    }
#pragma unroll
    for (int i = 0; i < DEQUANTIZE_TURNS; i++) {
        size_t at = begin + i * DEQUANTIZE_THREADS;
        if (at >= end) break;
        eight_elements<INT4>(out + at * 8, raw[i], factor[i]);
    }
}
extern "C" __global__ void dequantize_int8(T* out, Matrix weight, int first, int count) {
    dequantize<false>(out, weight, first, count);
}
extern "C" __global__ void dequantize_int4(T* out, Matrix weight, int first, int count) {
    dequantize<true>(out, weight, first, count);
}
