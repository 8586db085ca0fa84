// Products of rows with a matrix: out (rows, n) = x (rows, k) * weight^T.
//
// `matvec_*` takes few rows and reads each weight once per eight of them: memory is what it waits for.
// `tile_*` takes many rows on the tensor cores: quantized weights, and experts; plain matrices go to cuBLAS.

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
    // Rows of `x_stride` elements. Of quantized weights, the rows are in `bytes`, k elements each.
    const T* x;
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

__device__ __forceinline__ void put(const Product& p, int row, int column, float sum) {
    if (p.bias) sum += p.bias[column];
    size_t at = (size_t)target_row(p, row) * p.out_stride + column;
    if (p.epilogue == STORE_VALUES) {
        ((float*)p.out)[at] = sum;
        return;
    }
    T* out = (T*)p.out + at;
    if (p.epilogue == ADD) sum += widen(*out);
    if (p.epilogue == ACTIVATED) sum = activate(p.act, sum);
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
            put(p, row, outputs[0], sum[0][m]);
            if (2 * pair + 1 < n) put(p, row, outputs[1], sum[1][m]);
        }
    }
}

#define MATVEC(NAME, ...) \
    extern "C" __global__ void __launch_bounds__(256) NAME(Product p) { matvec<__VA_ARGS__>(p); }
MATVEC(matvec_f32_1, Dense<float, 1>, 1)
MATVEC(matvec_f32_2, Dense<float, 2>, 2)
MATVEC(matvec_f32_4, Dense<float, 4>, 4)
MATVEC(matvec_f32_8, Dense<float, 8>, 8)
MATVEC(matvec_bf16_1, Dense<bf16, 1>, 1)
MATVEC(matvec_bf16_2, Dense<bf16, 2>, 2)
MATVEC(matvec_bf16_4, Dense<bf16, 4>, 4)
MATVEC(matvec_bf16_8, Dense<bf16, 8>, 8)
MATVEC(matvec_f16_1, Dense<f16, 1>, 1)
MATVEC(matvec_f16_2, Dense<f16, 2>, 2)
MATVEC(matvec_f16_4, Dense<f16, 4>, 4)
MATVEC(matvec_f16_8, Dense<f16, 8>, 8)
MATVEC(matvec_int8_1, Int8<1>, 1)
MATVEC(matvec_int8_2, Int8<2>, 2)
MATVEC(matvec_int8_4, Int8<4>, 4)
MATVEC(matvec_int8_8, Int8<8>, 8)
MATVEC(matvec_int4_1, Int4<1>, 1)
MATVEC(matvec_int4_2, Int4<2>, 2)
MATVEC(matvec_int4_4, Int4<4>, 4)
MATVEC(matvec_int4_8, Int4<8>, 8)

// Rows of x as bytes. One warp per group.
extern "C" __global__ void quantize_rows(Bytes out, const T* x, int x_stride, int k, int rows) {
    int groups = k / GROUP;
    int task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (task >= rows * groups) return;
    int row = task / groups, group = task % groups;
    group_bytes(out, task, widen(x[(size_t)row * x_stride + group * GROUP + lane]));
}

// --- on the tensor cores ---

#define TILE_ROWS 64
#define TILE_OUTPUTS 64
// Bytes of each row of a tile in one stage, and from row to row: four words past a power of two, so that the lanes of a
// fragment meet 32 different banks.
#define STAGE_BYTES 128
#define STAGE_STRIDE 144
// Groups of int8 in a stage.
#define STAGE_GROUPS (STAGE_BYTES / GROUP)

struct TileShared {
    u8 x[TILE_ROWS][STAGE_STRIDE];
    u8 w[TILE_OUTPUTS][STAGE_STRIDE];
    float x_factor[TILE_ROWS][STAGE_GROUPS], x_sum[TILE_ROWS][STAGE_GROUPS];
    float w_factor[TILE_OUTPUTS][STAGE_GROUPS], w_least[TILE_OUTPUTS][STAGE_GROUPS];
};

// FORMAT 0: weights of format T, 16 bits wide; 3: int8; 4: int4. 128 threads, a warp per 32 x 32 of the tile.
template <int FORMAT>
__device__ __forceinline__ void tile(const Product& all) {
    __shared__ TileShared s;
    Task span = rows_of_block(all, TILE_ROWS);
    if (span.count <= 0) return;
    Product p = of_expert(all, span.expert);
    constexpr bool QUANTIZED = FORMAT != 0;
    // Of the rows of a tile; those of int4 weights take half of them.
    int row_bytes = QUANTIZED ? p.weight.k : p.weight.k * 2;
    int groups = p.weight.k / GROUP;
    int n = p.weight.n, first_output = blockIdx.x * TILE_OUTPUTS;
    const u8* weights = p.weight.values;
    const u8* factors = p.weight.factors;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int g = lane / 4, t = lane % 4;
    int warp_row = warp / 2 * 32, warp_output = warp % 2 * 32;
    float acc[2][4][4] = {};
    const uint4 zero = make_uint4(0, 0, 0, 0);

    // Each thread carries four pieces of 16 bytes of the rows, and four (of int4: two) of the weights.
    constexpr int W_PIECES = FORMAT == 4 ? 2 : 4;
    uint4 next_x[4], next_w[W_PIECES];
    auto fetch = [&](int stage) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int piece = i * 128 + threadIdx.x, row = piece / 8, at = stage * STAGE_BYTES + piece % 8 * 16;
            bool there = row < span.count && at < row_bytes;
            next_x[i] = zero;
            if (there) {
                size_t source = source_row(p, span.first + row);
                const u8* from = QUANTIZED ? (const u8*)p.bytes.values + source * p.weight.k
                                           : (const u8*)(p.x + source * p.x_stride);
                next_x[i] = *(const uint4*)(from + at);
            }
        }
#pragma unroll
        for (int i = 0; i < W_PIECES; i++) {
            int piece = i * 128 + threadIdx.x;
            next_w[i] = zero;
            if constexpr (FORMAT == 4) {
                int output = first_output + piece / 4, group = stage * STAGE_GROUPS + piece % 4;
                if (output < n && group < groups)
                    next_w[i] = *(const uint4*)(weights + ((size_t)output * groups + group) * (GROUP / 2));
            } else {
                int output = first_output + piece / 8, at = stage * STAGE_BYTES + piece % 8 * 16;
                if (output < n && at < row_bytes) next_w[i] = *(const uint4*)(weights + (size_t)output * row_bytes + at);
            }
        }
    };
    int stages = (row_bytes + STAGE_BYTES - 1) / STAGE_BYTES;
    fetch(0);
    for (int stage = 0; stage < stages; stage++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int piece = i * 128 + threadIdx.x;
            *(uint4*)&s.x[piece / 8][piece % 8 * 16] = next_x[i];
        }
#pragma unroll
        for (int i = 0; i < W_PIECES; i++) {
            int piece = i * 128 + threadIdx.x;
            if constexpr (FORMAT == 4) {
                uint4 w = next_w[i];
                u8* to = &s.w[piece / 4][piece % 4 * GROUP];
                *(uint4*)to = make_uint4(w.x & 0x0f0f0f0f, (w.x >> 4) & 0x0f0f0f0f, w.y & 0x0f0f0f0f, (w.y >> 4) & 0x0f0f0f0f);
                *(uint4*)(to + 16) = make_uint4(w.z & 0x0f0f0f0f, (w.z >> 4) & 0x0f0f0f0f, w.w & 0x0f0f0f0f, (w.w >> 4) & 0x0f0f0f0f);
            } else {
                *(uint4*)&s.w[piece / 8][piece % 8 * 16] = next_w[i];
            }
        }
        if constexpr (QUANTIZED) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int piece = i * 128 + threadIdx.x, row = piece / STAGE_GROUPS, part = piece % STAGE_GROUPS;
                int group = stage * STAGE_GROUPS + part;
                bool there = group < groups;
                size_t x = there && row < span.count ? (size_t)source_row(p, span.first + row) * groups + group : 0;
                s.x_factor[row][part] = there && row < span.count ? p.bytes.factors[x] : 0.0f;
                if (FORMAT == 4) s.x_sum[row][part] = there && row < span.count ? p.bytes.sums[x] : 0.0f;
                int output = first_output + row;
                size_t w = (size_t)output * groups + group;
                const u16* all = (const u16*)factors;
                there = there && output < n;
                s.w_factor[row][part] = there ? half_to_float(all[FORMAT == 4 ? 2 * w : w]) : 0.0f;
                if (FORMAT == 4) s.w_least[row][part] = there ? half_to_float(all[2 * w + 1]) : 0.0f;
            }
        }
        if (stage + 1 < stages) fetch(stage + 1);
        __syncthreads();
#pragma unroll
        for (int slab = 0; slab < STAGE_BYTES / 32; slab++) {
            u32 a[2][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u8* at = &s.x[warp_row + i * 16 + g][slab * 32 + t * 4];
                a[i][0] = *(const u32*)at;
                a[i][1] = *(const u32*)(at + 8 * STAGE_STRIDE);
                a[i][2] = *(const u32*)(at + 16);
                a[i][3] = *(const u32*)(at + 8 * STAGE_STRIDE + 16);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u8* at = &s.w[warp_output + j * 8 + g][slab * 32 + t * 4];
                b[j][0] = *(const u32*)at;
                b[j][1] = *(const u32*)(at + 16);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if constexpr (QUANTIZED) {
                        int d[4] = {0, 0, 0, 0};
                        mma_s8(d, a[i], b[j]);
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            int row = warp_row + i * 16 + g + c / 2 * 8, output = warp_output + j * 8 + t * 2 + c % 2;
                            acc[i][j][c] += (float)d[c] * (s.x_factor[row][slab] * s.w_factor[output][slab]);
                            if (FORMAT == 4) acc[i][j][c] += s.w_least[output][slab] * s.x_sum[row][slab];
                        }
                    } else {
#if ELEMENT == 1
                        mma_bf16(acc[i][j], a[i], b[j]);
#elif ELEMENT == 2
                        mma_f16(acc[i][j], a[i], b[j]);
#endif
                    }
                }
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
                if (row < span.count && output < n) put(p, span.first + row, output, acc[i][j][c]);
            }
}

extern "C" __global__ void __launch_bounds__(128) tile_int8(Product p) { tile<3>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_int4(Product p) { tile<4>(p); }
#if ELEMENT != 0
extern "C" __global__ void __launch_bounds__(128) tile_dense(Product p) { tile<0>(p); }
#endif
