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
                        int dot = __dp4a(w.x & 0x0f0f0f0f, first.x, __dp4a((w.x >> 4) & 0x0f0f0f0f, first.y, 0));
                        dot = __dp4a(w.y & 0x0f0f0f0f, first.z, __dp4a((w.y >> 4) & 0x0f0f0f0f, first.w, dot));
                        dot = __dp4a(w.z & 0x0f0f0f0f, second.x, __dp4a((w.z >> 4) & 0x0f0f0f0f, second.y, dot));
                        dot = __dp4a(w.w & 0x0f0f0f0f, second.z, __dp4a((w.w >> 4) & 0x0f0f0f0f, second.w, dot));
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

// --- one row, held in shared memory ---

// A row as its product takes it.
template <bool QUANTIZED>
struct Staged {
    T* elements;
    Bytes bytes;
    template <int COUNT>
    __device__ __forceinline__ void operator()(int i, float (&values)[COUNT], bool there) const {
        if constexpr (QUANTIZED) {
            // Bytes are those of rounded elements, as everywhere.
#pragma unroll
            for (int e = 0; e < COUNT; e++) values[e] = widen(narrowed(values[e]));
            group_bytes(bytes, i, values, there);
        } else {
            store_values(elements + i, values, there, false);
        }
    }
};

// Blocks take turns at the pairs of outputs, so that each stages the row once. While the kernel before still runs, the first
// weights come nearer.
template <class Weights, bool QUANTIZED>
__device__ __forceinline__ void one_row(Product p, int row_bytes) {
    __shared__ float scratch[WARP];
    let_next_come();
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    int n = p.weight.n, k = p.weight.k, half = n / 2;
    bool gated = p.epilogue == GATED;
    int pairs = gated ? half : (n + 1) / 2, pair = blockIdx.x * warps + threadIdx.x / WARP;
    if (!p.tasks && pair < pairs && lane * 128 < row_bytes) {
        const u8* first = p.weight.values + lane * 128;
        prefetch(first + (size_t)(gated ? pair : 2 * pair) * row_bytes);
        prefetch(first + (size_t)(gated ? pair + half : min(2 * pair + 1, n - 1)) * row_bytes);
    }
    wait_for_previous();
    Task span = rows_of_block(p, 1);
    if (span.count <= 0) return;
    p = of_expert(p, span.expert);
    int row = target_row(p, span.first);
    const T* x = p.x + (size_t)source_row(p, span.first) * p.x_stride;
    Staged<QUANTIZED> staged;
    if constexpr (QUANTIZED) {
        staged.bytes.values = (signed char*)dynamic_shared;
        staged.bytes.factors = (float*)(dynamic_shared + k);
        staged.bytes.sums = staged.bytes.factors + k / GROUP;
    } else {
        staged.elements = (T*)dynamic_shared;
    }
    if (p.norm.weight) {
        norm_row(x, p.norm, k, scratch, staged);
    } else if (k % PACK == 0 && p.x_stride % PACK == 0) {
        for (int base = threadIdx.x / WARP * WARP * PACK; base < k; base += blockDim.x * PACK) {
            int i = base + lane * PACK;
            Pack<T> pack = {};
            if (i < k) pack = load16(x + i);
            float values[PACK];
#pragma unroll
            for (int e = 0; e < PACK; e++) values[e] = widen(pack.at[e]);
            staged(i, values, i < k);
        }
    } else {
        for (int base = threadIdx.x / WARP * WARP; base < k; base += blockDim.x) {
            int i = base + lane;
            float value[1] = {i < k ? widen(x[i]) : 0.0f};
            staged(i, value, i < k);
        }
    }
    __syncthreads();
    if constexpr (QUANTIZED) {
        p.bytes = staged.bytes;
    } else {
        p.x = staged.elements;
        // Rows of one are at any distance: one that does not keep weights from being read in packs.
        p.x_stride = 0;
    }
    const float* bias = p.bias;
    const int sources[1] = {0};
    for (; pair < pairs; pair += gridDim.x * warps) {
        int outputs[2] = {gated ? pair : 2 * pair, gated ? pair + half : min(2 * pair + 1, n - 1)};
        float sum[2][1] = {};
        Weights::sums(p, outputs, sources, sum);
        sum[0][0] = warp_sum(sum[0][0]);
        sum[1][0] = warp_sum(sum[1][0]);
        if (lane != 0) continue;
        if (gated) {
            float gate = sum[0][0] + (bias ? bias[outputs[0]] : 0.0f), up = sum[1][0] + (bias ? bias[outputs[1]] : 0.0f);
            ((T*)p.out)[(size_t)row * p.out_stride + pair] = narrowed(activate_inline(p.act, gate) * up);
        } else {
            put(p, row, outputs[0], sum[0][0]);
            if (2 * pair + 1 < n) put(p, row, outputs[1], sum[1][0]);
        }
    }
}

#define ONE_ROW(NAME, QUANTIZED, BYTES, ...) \
    extern "C" __global__ void __launch_bounds__(256, 3) NAME(Product p) { one_row<__VA_ARGS__, QUANTIZED>(p, BYTES); }
ONE_ROW(matvec_f32_1, false, p.weight.k * 4, Dense<float, 1>)
ONE_ROW(matvec_bf16_1, false, p.weight.k * 2, Dense<bf16, 1>)
ONE_ROW(matvec_f16_1, false, p.weight.k * 2, Dense<f16, 1>)
ONE_ROW(matvec_int8_1, true, p.weight.k, Int8<1>)
ONE_ROW(matvec_int4_1, true, p.weight.k / 2, Int4<1>)

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

// Rows first to first + count of quantized weights as elements of T: out (count, k). A thread turns 16 bytes.
template <bool INT4>
__device__ __forceinline__ void dequantize(T* out, const Matrix& weight, int first, int count) {
    follow();
    constexpr int EACH = INT4 ? 32 : 16;
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * EACH;
    if (at >= (size_t)count * weight.k) return;
    size_t from = (size_t)first * weight.k + at, group = from / GROUP;
    uint4 raw = *(const uint4*)(weight.values + (INT4 ? from / 2 : from));
    float values[EACH];
    if constexpr (INT4) {
        u32 both = ((const u32*)weight.factors)[group];
        float factor = half_to_float((u16)both), least = half_to_float((u16)(both >> 16));
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 32; i++) {
            u32 value = words[i / 8] >> (i % 4 * 8 + i % 8 / 4 * 4) & 15u;
            values[i] = fmaf((float)value, factor, least);
        }
    } else {
        float factor = half_to_float(((const u16*)weight.factors)[group]);
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 16; i++) values[i] = (float)(signed char)(words[i / 4] >> i % 4 * 8) * factor;
    }
#pragma unroll
    for (int i = 0; i < EACH; i += PACK) {
        Pack<T> pack;
#pragma unroll
        for (int e = 0; e < PACK; e++) pack.at[e] = narrowed(values[i + e]);
        store16(out + at + i, pack);
    }
}
extern "C" __global__ void dequantize_int8(T* out, Matrix weight, int first, int count) {
    dequantize<false>(out, weight, first, count);
}
extern "C" __global__ void dequantize_int4(T* out, Matrix weight, int first, int count) {
    dequantize<true>(out, weight, first, count);
}

// --- on the tensor cores ---

// Quantized weights and up to 64 rows: 32 outputs per block, whose warps share out k. Weights are the left operand (16
// outputs), rows the right one (8 rows). Of four lanes, t takes bytes 4 t and 16 + 4 t of each group; where weights are half
// bytes, bytes 8 t and 8 t + 4, which a word holds: a product sums over k in any order.
#define TILE_OUTPUTS 32
#define TILE_WARPS 8
// Groups that a warp has in shared memory at a time, and how many such steps are under way.
#define STEP_GROUPS 4
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
#define STEPS 2
#else
#define STEPS 3
#endif

template <bool INT4>
struct Step {
    static constexpr int BYTES = STEP_GROUPS * (INT4 ? GROUP / 2 : GROUP);
    // From output to output: lanes of a fragment meet all banks.
    static constexpr int STRIDE = BYTES + 16;
    static constexpr int SIZE = TILE_OUTPUTS * STRIDE;
};

// What a warp has in shared memory: steps of weights, and the factors of one step.
template <bool INT4, int ROWS>
struct WarpShared {
    u8 weights[STEPS][Step<INT4>::SIZE];
    float w_factor[STEP_GROUPS][TILE_OUTPUTS], w_least[INT4 ? STEP_GROUPS : 1][TILE_OUTPUTS];
    float x_factor[STEP_GROUPS][ROWS], x_sum[INT4 ? STEP_GROUPS : 1][ROWS];
};

template <bool INT4, int ROWS>
__device__ __forceinline__ void tile_quantized(Product p) {
    typedef WarpShared<INT4, ROWS> Shared;
    typedef Step<INT4> S;
    constexpr int COLUMNS = ROWS / 8, LANE_ROWS = (ROWS + WARP - 1) / WARP;
    follow();
    Task span = rows_of_block(p, ROWS);
    if (span.count <= 0) return;
    p = of_expert(p, span.expert);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    Shared& s = ((Shared*)dynamic_shared)[warp];
    int n = p.weight.n, k = p.weight.k, groups = k / GROUP, half = n / 2;
    bool gated = p.epilogue == GATED;
    // Of gated products, the first 16 are gates and the others what they are for.
    int first_output = blockIdx.x * (gated ? TILE_OUTPUTS / 2 : TILE_OUTPUTS);
    auto output_of = [&](int r) { return gated && r >= 16 ? half + first_output + r - 16 : first_output + r; };
    int outputs_left = gated ? half - first_output : n - first_output;
    auto there = [&](int r) { return (gated ? r % 16 : r) < outputs_left; };
    const u8* weights = p.weight.values;
    const u8* factors = p.weight.factors;
    int row_bytes = INT4 ? k / 2 : k, steps = (groups + STEP_GROUPS - 1) / STEP_GROUPS;

    size_t my_output = output_of(lane), my_row[LANE_ROWS];
    bool my_output_there = there(lane);
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++)
        my_row[i] = source_row(p, span.first + min(i * WARP + lane, span.count - 1));
    const signed char* x[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
        x[j] = p.bytes.values + (size_t)source_row(p, span.first + min(j * 8 + g, span.count - 1)) * k + t * (INT4 ? 8 : 4);

    auto rows_at = [&](int j, int group) {
        const signed char* at = x[j] + (size_t)group * GROUP;
        return INT4 ? *(const uint2*)at : make_uint2(*(const u32*)at, *(const u32*)(at + 16));
    };
    auto fetch = [&](int step, int slot) {
        constexpr int PIECES_OF_ROW = S::BYTES / 16;
#pragma unroll
        for (int i = 0; i < TILE_OUTPUTS * PIECES_OF_ROW / WARP; i++) {
            int piece = i * WARP + lane, r = piece / PIECES_OF_ROW, at = step * S::BYTES + piece % PIECES_OF_ROW * 16;
            bool in_range = there(r) && at < row_bytes;
            const u8* from = in_range ? weights + (size_t)output_of(r) * row_bytes + at : weights;
            copy_async16(s.weights[slot] + r * S::STRIDE + piece % PIECES_OF_ROW * 16, from, in_range);
        }
    };
    // A lane's share of a step's factors.
    float w_factor[STEP_GROUPS], w_least[STEP_GROUPS], x_factor[LANE_ROWS][STEP_GROUPS], x_sum[LANE_ROWS][STEP_GROUPS];
    auto fetch_factors = [&](int step) {
#pragma unroll
        for (int i = 0; i < STEP_GROUPS; i++) {
            int group = step * STEP_GROUPS + i;
            bool is = group < groups;
            size_t w = my_output * groups + group;
            if constexpr (INT4) {
                u32 both = is && my_output_there ? ((const u32*)factors)[w] : 0;
                w_factor[i] = half_to_float((u16)both);
                w_least[i] = half_to_float((u16)(both >> 16));
            } else {
                w_factor[i] = half_to_float(is && my_output_there ? ((const u16*)factors)[w] : (u16)0);
            }
#pragma unroll
            for (int r = 0; r < LANE_ROWS; r++) {
                x_factor[r][i] = is ? p.bytes.factors[my_row[r] * groups + group] : 0.0f;
                if (INT4) x_sum[r][i] = is ? p.bytes.sums[my_row[r] * groups + group] : 0.0f;
            }
        }
    };

    float acc[2][COLUMNS][4] = {};
    fetch_factors(warp);
#pragma unroll
    for (int i = 0; i < STEPS - 1; i++) {
        if (warp + i * TILE_WARPS < steps) fetch(warp + i * TILE_WARPS, i);
        copy_async_commit();
    }
    int slot = 0;
#pragma unroll 1
    for (int step = warp; step < steps; step += TILE_WARPS) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < STEP_GROUPS; i++) {
            s.w_factor[i][lane] = w_factor[i];
            if (INT4) s.w_least[i][lane] = w_least[i];
#pragma unroll
            for (int r = 0; r < LANE_ROWS; r++)
                if (r * WARP + lane < ROWS) {
                    s.x_factor[i][r * WARP + lane] = x_factor[r][i];
                    if (INT4) s.x_sum[i][r * WARP + lane] = x_sum[r][i];
                }
        }
        int ahead = step + (STEPS - 1) * TILE_WARPS;
        if (ahead < steps) fetch(ahead, (slot + STEPS - 1) % STEPS);
        copy_async_commit();
        if (step + TILE_WARPS < steps) fetch_factors(step + TILE_WARPS);
        uint2 b[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) b[j] = rows_at(j, step * STEP_GROUPS);
        copy_async_wait<STEPS - 1>();
        __syncwarp();
        const u8* held = s.weights[slot];
#pragma unroll
        for (int i = 0; i < STEP_GROUPS; i++) {
            int group = step * STEP_GROUPS + i;
            if (group >= groups) break;
            u32 a[2][4];
            float wf[2][2], wl[2][2];
#pragma unroll
            for (int f = 0; f < 2; f++) {
                if constexpr (INT4) {
                    const u8* at = held + (f * 16 + g) * S::STRIDE + i * 16 + t * 4;
                    u32 low = *(const u32*)at, high = *(const u32*)(at + 8 * S::STRIDE);
                    a[f][0] = low & 0x0f0f0f0f;
                    a[f][1] = high & 0x0f0f0f0f;
                    a[f][2] = low >> 4 & 0x0f0f0f0f;
                    a[f][3] = high >> 4 & 0x0f0f0f0f;
                } else {
                    ldmatrix4(a[f], held + (f * 16 + lane % 16) * S::STRIDE + i * 32 + lane / 16 * 16);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    wf[f][h] = s.w_factor[i][f * 16 + g + h * 8];
                    if (INT4) wl[f][h] = s.w_least[i][f * 16 + g + h * 8];
                }
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const u32 rows[2] = {b[j].x, b[j].y};
                // The next group's rows come while this one is computed.
                if (i + 1 < STEP_GROUPS && group + 1 < groups) b[j] = rows_at(j, group + 1);
                float2 xf = *(const float2*)&s.x_factor[i][j * 8 + t * 2], xs;
                if (INT4) xs = *(const float2*)&s.x_sum[i][j * 8 + t * 2];
#pragma unroll
                for (int f = 0; f < 2; f++) {
                    int d[4];
                    mma_s8(d, a[f], rows);
                    acc[f][j][0] = fmaf((float)d[0], wf[f][0] * xf.x, acc[f][j][0]);
                    acc[f][j][1] = fmaf((float)d[1], wf[f][0] * xf.y, acc[f][j][1]);
                    acc[f][j][2] = fmaf((float)d[2], wf[f][1] * xf.x, acc[f][j][2]);
                    acc[f][j][3] = fmaf((float)d[3], wf[f][1] * xf.y, acc[f][j][3]);
                    if (INT4) {
                        acc[f][j][0] = fmaf(wl[f][0], xs.x, acc[f][j][0]);
                        acc[f][j][1] = fmaf(wl[f][0], xs.y, acc[f][j][1]);
                        acc[f][j][2] = fmaf(wl[f][1], xs.x, acc[f][j][2]);
                        acc[f][j][3] = fmaf(wl[f][1], xs.y, acc[f][j][3]);
                    }
                }
            }
        }
        slot = (slot + 1) % STEPS;
    }
    copy_async_wait<0>();
    // The warps' sums meet in shared memory, of which the weights are needed no longer.
    __syncthreads();
    float* sums = (float*)dynamic_shared;
#pragma unroll
    for (int f = 0; f < 2; f++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int row = j * 8 + t * 2 + c % 2, r = f * 16 + g + c / 2 * 8;
                sums[(warp * ROWS + row) * TILE_OUTPUTS + r] = acc[f][j][c];
            }
    __syncthreads();
    auto sum_of = [&](int row, int r) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < TILE_WARPS; w++) sum += sums[(w * ROWS + row) * TILE_OUTPUTS + r];
        return sum;
    };
    const float* bias = p.bias;
    int wide = gated ? TILE_OUTPUTS / 2 : TILE_OUTPUTS;
    for (int i = threadIdx.x; i < ROWS * wide; i += TILE_WARPS * WARP) {
        int row = i / wide, r = i % wide;
        if (row >= span.count || r >= outputs_left) continue;
        int target = target_row(p, span.first + row), output = first_output + r;
        if (gated) {
            float gate = sum_of(row, r) + (bias ? bias[output] : 0.0f), up = sum_of(row, r + 16) + (bias ? bias[half + output] : 0.0f);
            ((T*)p.out)[(size_t)target * p.out_stride + output] = narrowed(activate(p.act, gate) * up);
        } else {
            put(p, target, output, sum_of(row, r));
        }
    }
}

#define TILE(NAME, ...) \
    extern "C" __global__ void __launch_bounds__(TILE_WARPS * WARP, 1) NAME(Product p) { tile_quantized<__VA_ARGS__>(p); }
TILE(tile_int8_16, false, 16)
TILE(tile_int8_32, false, 32)
TILE(tile_int8_64, false, 64)
TILE(tile_int4_16, true, 16)
TILE(tile_int4_32, true, 32)
TILE(tile_int4_64, true, 64)

#if ELEMENT != 0

// Experts of format T: 64 rows and 64 outputs per block of 128 threads, a warp per 32 x 32 of them.
#define DENSE_TILE 64
// Bytes of each row of a tile in one stage, and from row to row: four words past a power of two, so that the lanes of a
// fragment meet 32 different banks.
#define STAGE_BYTES 128
#define STAGE_STRIDE 144

extern "C" __global__ void __launch_bounds__(128) tile_dense(Product p) {
    __shared__ u8 tile_x[DENSE_TILE][STAGE_STRIDE], tile_w[DENSE_TILE][STAGE_STRIDE];
    follow();
    Task span = rows_of_block(p, DENSE_TILE);
    if (span.count <= 0) return;
    p = of_expert(p, span.expert);
    int row_bytes = p.weight.k * 2;
    int n = p.weight.n, first_output = blockIdx.x * DENSE_TILE;
    const u8* weights = p.weight.values;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int g = lane / 4, t = lane % 4;
    int warp_row = warp / 2 * 32, warp_output = warp % 2 * 32;
    float acc[2][4][4] = {};

    // Each thread carries four pieces of 16 bytes of the rows, and four of the weights.
    uint4 next_x[4], next_w[4];
    auto fetch = [&](int stage) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int piece = i * 128 + threadIdx.x, row = piece / 8, at = stage * STAGE_BYTES + piece % 8 * 16;
            next_x[i] = next_w[i] = make_uint4(0, 0, 0, 0);
            if (at >= row_bytes) continue;
            if (row < span.count)
                next_x[i] = *(const uint4*)((const u8*)(p.x + (size_t)source_row(p, span.first + row) * p.x_stride) + at);
            if (first_output + row < n) next_w[i] = *(const uint4*)(weights + (size_t)(first_output + row) * row_bytes + at);
        }
    };
    int stages = (row_bytes + STAGE_BYTES - 1) / STAGE_BYTES;
    fetch(0);
    for (int stage = 0; stage < stages; stage++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int piece = i * 128 + threadIdx.x;
            *(uint4*)&tile_x[piece / 8][piece % 8 * 16] = next_x[i];
            *(uint4*)&tile_w[piece / 8][piece % 8 * 16] = next_w[i];
        }
        if (stage + 1 < stages) fetch(stage + 1);
        __syncthreads();
#pragma unroll
        for (int slab = 0; slab < STAGE_BYTES / 32; slab++) {
            u32 a[2][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u8* at = &tile_x[warp_row + i * 16 + g][slab * 32 + t * 4];
                a[i][0] = *(const u32*)at;
                a[i][1] = *(const u32*)(at + 8 * STAGE_STRIDE);
                a[i][2] = *(const u32*)(at + 16);
                a[i][3] = *(const u32*)(at + 8 * STAGE_STRIDE + 16);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u8* at = &tile_w[warp_output + j * 8 + g][slab * 32 + t * 4];
                b[j][0] = *(const u32*)at;
                b[j][1] = *(const u32*)(at + 16);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
#if ELEMENT == 1
                    mma_bf16(acc[i][j], a[i], b[j]);
#else
                    mma_f16(acc[i][j], a[i], b[j]);
#endif
                }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int row = warp_row + i * 16 + g + c / 2 * 8, output = first_output + warp_output + j * 8 + t * 2 + c % 2;
                if (row < span.count && output < n) put(p, target_row(p, span.first + row), output, acc[i][j][c]);
            }
}

#endif
