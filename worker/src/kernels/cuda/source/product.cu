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

// What a lane has of the weights of four outputs: 16 bytes of each, from element `at` of their rows on.
template <class W>
struct DensePiece {
    static constexpr int COUNT = Pack<W>::COUNT;
    Pack<W> weights[4];

    __device__ __forceinline__ void load(const Product& p, const int (&outputs)[4], int at) {
#pragma unroll
        for (int r = 0; r < 4; r++) weights[r] = load16((const W*)p.weight.values + (size_t)outputs[r] * p.weight.k + at);
    }

    __device__ __forceinline__ void add(const Staged<false>& x, int at, float (&sum)[4]) const {
        float wide[COUNT];
        if constexpr (sizeof(W) == sizeof(T)) {
            Pack<T> pack = load16(x.elements + at);
#pragma unroll
            for (int i = 0; i < COUNT; i++) wide[i] = widen(pack.at[i]);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; i++) wide[i] = widen(x.elements[at + i]);
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int i = 0; i < COUNT; i++) sum[r] = fmaf(widen(weights[r].at[i]), wide[i], sum[r]);
    }
};

struct Int8Piece {
    static constexpr int COUNT = 16;
    int4 weights[4];
    u16 factors[4];

    __device__ __forceinline__ void load(const Product& p, const int (&outputs)[4], int at) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            size_t place = (size_t)outputs[r] * p.weight.k + at;
            weights[r] = *(const int4*)(p.weight.values + place);
            factors[r] = ((const u16*)p.weight.factors)[place / GROUP];
        }
    }

    __device__ __forceinline__ void add(const Staged<true>& x, int at, float (&sum)[4]) const {
        int4 row = *(const int4*)(x.bytes.values + at);
        float scale = x.bytes.factors[at / GROUP];
#pragma unroll
        for (int r = 0; r < 4; r++)
            sum[r] = fmaf((float)dot16(weights[r], row, 0), half_to_float(factors[r]) * scale, sum[r]);
    }
};

struct Int4Piece {
    static constexpr int COUNT = 32;
    int4 weights[4];
    u32 factors[4];

    __device__ __forceinline__ void load(const Product& p, const int (&outputs)[4], int at) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            size_t group = ((size_t)outputs[r] * p.weight.k + at) / GROUP;
            weights[r] = *(const int4*)(p.weight.values + group * (GROUP / 2));
            factors[r] = ((const u32*)p.weight.factors)[group];
        }
    }

    __device__ __forceinline__ void add(const Staged<true>& x, int at, float (&sum)[4]) const {
        const int4* row = (const int4*)(x.bytes.values + at);
        int4 first = row[0], second = row[1];
        float scale = x.bytes.factors[at / GROUP], total = x.bytes.sums[at / GROUP];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int4 w = weights[r];
            int dot = __dp4a(w.x & 0x0f0f0f0f, first.x, __dp4a((w.x >> 4) & 0x0f0f0f0f, first.y, 0));
            dot = __dp4a(w.y & 0x0f0f0f0f, first.z, __dp4a((w.y >> 4) & 0x0f0f0f0f, first.w, dot));
            dot = __dp4a(w.z & 0x0f0f0f0f, second.x, __dp4a((w.z >> 4) & 0x0f0f0f0f, second.y, dot));
            dot = __dp4a(w.w & 0x0f0f0f0f, second.z, __dp4a((w.w >> 4) & 0x0f0f0f0f, second.w, dot));
            float factor = half_to_float((u16)factors[r]), least = half_to_float((u16)(factors[r] >> 16));
            sum[r] += (float)dot * (factor * scale) + least * total;
        }
    }
};

#define ONE_ROW_WARPS 8

// One row by a block of eight warps, which holds it in shared memory. As many warps as there is work for share out k, the
// others are further groups of outputs; each warp has four outputs, two pairs. Blocks take turns at the outputs, and ask for
// the next weights before they sum up: the first ones while the kernel before still runs.
template <class Piece, bool QUANTIZED>
__device__ __forceinline__ void one_row(Product p) {
    __shared__ float scratch[WARP], partial[2][ONE_ROW_WARPS][4];
    constexpr int EACH = WARP * Piece::COUNT, AHEAD = 2;
    let_next_come();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int n = p.weight.n, k = p.weight.k, half = n / 2;
    bool gated = p.epilogue == GATED;
    int pairs = gated ? half : (n + 1) / 2, pieces = (k + EACH - 1) / EACH;
    // As `ONE_ROW_WARPS` of product.rs.
    int share = pieces >= 8 ? 8 : pieces >= 4 ? 4 : pieces >= 2 ? 2 : 1;
    int groups = ONE_ROW_WARPS / share, group = warp / share, chunks = (pieces + share - 1) / share;
    int tiles = (pairs + 2 * groups - 1) / (2 * groups);
    int first_at = (warp % share * WARP + lane) * Piece::COUNT, step_at = share * EACH;
    auto first_of = [&](int pair) { return gated ? pair : 2 * pair; };
    auto second_of = [&](int pair) { return gated ? pair + half : min(2 * pair + 1, n - 1); };

    Piece held[AHEAD];
    int next_tile = blockIdx.x, next_chunk = 0;
    auto load = [&](Piece& piece) {
        int at = first_at + next_chunk * step_at, pair = (next_tile * groups + group) * 2;
        if (next_tile < tiles && at < k) {
            int one = min(pair, pairs - 1), other = min(pair + 1, pairs - 1);
            const int outputs[4] = {first_of(one), second_of(one), first_of(other), second_of(other)};
            piece.load(p, outputs, at);
        }
        if (++next_chunk == chunks) {
            next_chunk = 0;
            next_tile += gridDim.x;
        }
    };
    bool alone = !p.tasks;
    if (alone) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) load(held[i]);
    }
    wait_for_previous();
    Task task = rows_of_block(p, 1);
    if (task.count <= 0) return;
    if (!alone) {
        p = of_expert(p, task.expert);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) load(held[i]);
    }
    int row = target_row(p, task.first);
    const T* x = p.x + (size_t)source_row(p, task.first) * p.x_stride;
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
        constexpr int STAGED = 2;
        for (int base = warp * WARP * PACK; base < k; base += STAGED * ONE_ROW_WARPS * WARP * PACK) {
            Pack<T> packs[STAGED];
#pragma unroll
            for (int s = 0; s < STAGED; s++) {
                int i = base + s * ONE_ROW_WARPS * WARP * PACK + lane * PACK;
                packs[s] = {};
                if (i < k) packs[s] = load16(x + i);
            }
#pragma unroll
            for (int s = 0; s < STAGED; s++) {
                int i = base + s * ONE_ROW_WARPS * WARP * PACK;
                if (i >= k) break;
                float values[PACK];
#pragma unroll
                for (int e = 0; e < PACK; e++) values[e] = widen(packs[s].at[e]);
                staged(i + lane * PACK, values, i + lane * PACK < k);
            }
        }
    } else {
        for (int base = warp * WARP; base < k; base += ONE_ROW_WARPS * WARP) {
            int i = base + lane;
            float value[1] = {i < k ? widen(x[i]) : 0.0f};
            staged(i, value, i < k);
        }
    }
    __syncthreads();
    float sum[4] = {};
    int tile = blockIdx.x, chunk = 0, turn = 0;
    while (tile < tiles) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (tile >= tiles) break;
            int at = first_at + chunk * step_at;
            if (at < k) held[i].add(staged, at, sum);
            load(held[i]);
            if (++chunk < chunks) continue;
#pragma unroll
            for (int r = 0; r < 4; r++) {
                sum[r] = warp_sum(sum[r]);
                if (lane == 0) partial[turn][warp][r] = sum[r];
                sum[r] = 0.0f;
            }
            __syncthreads();
            if (threadIdx.x < 2 * groups) {
                int from = threadIdx.x / 2 * share, side = threadIdx.x % 2 * 2, pair = tile * 2 * groups + threadIdx.x;
                float first = 0.0f, second = 0.0f;
                for (int w = from; w < from + share; w++) {
                    first += partial[turn][w][side];
                    second += partial[turn][w][side + 1];
                }
                if (pair < pairs && gated) {
                    float gate = first + (p.bias ? p.bias[pair] : 0.0f), up = second + (p.bias ? p.bias[pair + half] : 0.0f);
                    ((T*)p.out)[(size_t)row * p.out_stride + pair] = narrowed(activate_inline(p.act, gate) * up);
                } else if (pair < pairs) {
                    put(p, row, 2 * pair, first);
                    if (2 * pair + 1 < n) put(p, row, 2 * pair + 1, second);
                }
            }
            // What is written there next comes after another meeting of all warps.
            turn ^= 1;
            chunk = 0;
            tile += gridDim.x;
        }
    }
}

#define ONE_ROW(NAME, QUANTIZED, ...) \
    extern "C" __global__ void __launch_bounds__(WARP * ONE_ROW_WARPS, 2) NAME(Product p) { one_row<__VA_ARGS__, QUANTIZED>(p); }
ONE_ROW(matvec_f32_1, false, DensePiece<float>)
ONE_ROW(matvec_bf16_1, false, DensePiece<bf16>)
ONE_ROW(matvec_f16_1, false, DensePiece<f16>)
ONE_ROW(matvec_int8_1, true, Int8Piece)
ONE_ROW(matvec_int4_1, true, Int4Piece)

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

// Quantized weights and up to 64 rows, of whole steps: 32 outputs per block, whose warps share out k; blocks take turns at the
// outputs. Weights are the left operand (16 outputs), rows the right one (8 rows). Of four lanes, t takes bytes 4 t and
// 16 + 4 t of each group; where weights are half bytes, bytes 8 t and 8 t + 4, which a word holds: a product sums over k in any
// order.
#define TILE_OUTPUTS 32
// Groups that a warp takes at a time.
#define STEP_GROUPS 4
#define STEP_ELEMENTS (STEP_GROUPS * GROUP)

// What a warp has in shared memory of one step, on its way or there. Distances from row to row let the lanes of a fragment
// meet all banks.
template <bool INT4, int ROWS>
struct Step {
    static constexpr int BYTES = INT4 ? STEP_ELEMENTS / 2 : STEP_ELEMENTS, STRIDE = BYTES + 16;
    static constexpr int X_STRIDE = STEP_ELEMENTS + (INT4 ? 32 : 16);
    u8 weights[TILE_OUTPUTS][STRIDE];
    u8 x[ROWS][X_STRIDE];
    float x_factor[ROWS][STEP_GROUPS];
    float x_sum[INT4 ? ROWS : 1][STEP_GROUPS];
};

template <bool INT4, int ROWS>
struct TileShared {
    // Warps, and steps of each under way: what shared memory has room for.
    static constexpr int WARPS = ROWS == 64 ? 4 : 8, DEPTH = ROWS == 16 ? 3 : 2;
    Step<INT4, ROWS> steps[WARPS][DEPTH];
    float w_factor[WARPS][TILE_OUTPUTS][STEP_GROUPS], w_least[INT4 ? WARPS : 1][TILE_OUTPUTS][STEP_GROUPS];
    float sums[WARPS][ROWS][TILE_OUTPUTS];
};

template <bool INT4, int ROWS>
__device__ __forceinline__ void tile_quantized(Product p) {
    typedef TileShared<INT4, ROWS> Shared;
    typedef Step<INT4, ROWS> S;
    constexpr int COLUMNS = ROWS / 8, DEPTH = Shared::DEPTH, WARPS = Shared::WARPS;
    follow();
    Task span = rows_of_block(p, ROWS);
    if (span.count <= 0) return;
    p = of_expert(p, span.expert);
    Shared& s = *(Shared*)dynamic_shared;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int n = p.weight.n, k = p.weight.k, groups = k / GROUP, half = n / 2, steps = k / STEP_ELEMENTS;
    bool gated = p.epilogue == GATED;
    // Of gated products, the first 16 outputs of a tile are gates and the others what they are for.
    int wide = gated ? TILE_OUTPUTS / 2 : TILE_OUTPUTS, outputs = gated ? half : n, tiles = (outputs + wide - 1) / wide;
    auto output_of = [&](int tile, int r) {
        int output = min(tile * wide + (gated ? r % 16 : r), outputs - 1);
        return gated && r >= 16 ? half + output : output;
    };
    // Pieces of 16 bytes that each lane copies, and those of a row.
    constexpr int X_PIECES = ROWS * STEP_ELEMENTS / 16 / WARP, W_PIECES = TILE_OUTPUTS * S::BYTES / 16 / WARP;
    constexpr int IN_X_ROW = STEP_ELEMENTS / 16, IN_W_ROW = S::BYTES / 16;
    // Lanes keep where the rows are, two each if there are more than lanes.
    u32 source = source_row(p, span.first + min(lane, span.count - 1)), source_2 = 0;
    if (ROWS > WARP) source_2 = source_row(p, span.first + min(lane + WARP, span.count - 1));
    const int row_bytes = INT4 ? k / 2 : k;

    // A warp has every WARPS-th step of a tile. Tiles begin at different ones, so that not all blocks read the same rows at the
    // same time.
    const int my_steps = warp < steps ? (steps - warp + WARPS - 1) / WARPS : 0;
    auto step_of = [&](int tile, int i) { return warp + (i + tile % my_steps) % my_steps * WARPS; };
    int next_tile = blockIdx.x, next = 0;
    // Four factors of an output, of the step that comes next.
    uint4 next_factors = make_uint4(0, 0, 0, 0);
    auto fetch = [&](S& to) {
        if (next_tile < tiles && my_steps > 0) {
            int next_step = step_of(next_tile, next);
#pragma unroll
            for (int i = 0; i < W_PIECES; i++) {
                int r = i * (WARP / IN_W_ROW) + lane / IN_W_ROW, at = lane % IN_W_ROW * 16;
                const u8* from = p.weight.values + (size_t)output_of(next_tile, r) * row_bytes + next_step * S::BYTES + at;
                copy_async16(to.weights[r] + at, from, true);
            }
#pragma unroll
            for (int i = 0; i < X_PIECES; i++) {
                int r = i * (WARP / IN_X_ROW) + lane / IN_X_ROW, at = lane % IN_X_ROW * 16;
                size_t from = __shfl_sync(FULL, r < WARP ? source : source_2, r % WARP);
                copy_async16(to.x[r] + at, p.bytes.values + from * k + next_step * STEP_ELEMENTS + at, r < span.count);
            }
            size_t at = (size_t)source * groups + next_step * STEP_GROUPS;
            if (lane < ROWS) {
                copy_async16(to.x_factor[lane], p.bytes.factors + at, true);
                if (INT4) copy_async16(to.x_sum[lane], p.bytes.sums + at, true);
            }
            if constexpr (ROWS > WARP) {
                at = (size_t)source_2 * groups + next_step * STEP_GROUPS;
                copy_async16(to.x_factor[lane + WARP], p.bytes.factors + at, true);
                if (INT4) copy_async16(to.x_sum[lane + WARP], p.bytes.sums + at, true);
            }
            if (++next == my_steps) {
                next = 0;
                next_tile += gridDim.x;
            }
        }
        copy_async_commit();
    };
    auto fetch_factors = [&](int tile, int step) {
        size_t at = (size_t)output_of(tile, lane) * groups + step * STEP_GROUPS;
        if constexpr (INT4) {
            next_factors = *(const uint4*)(p.weight.factors + at * 4);
        } else {
            uint2 both = *(const uint2*)(p.weight.factors + at * 2);
            next_factors.x = both.x;
            next_factors.y = both.y;
        }
    };

    if (my_steps > 0 && (int)blockIdx.x < tiles) fetch_factors(blockIdx.x, step_of(blockIdx.x, 0));
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch(s.steps[warp][i]);
    int slot = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float acc[2][COLUMNS][4] = {};
#pragma unroll 1
        for (int i = 0; i < my_steps; i++) {
            // All lanes are done with the step before.
            __syncwarp();
            fetch(s.steps[warp][(slot + DEPTH - 1) % DEPTH]);
            float4* factor = (float4*)s.w_factor[warp][lane];
            if constexpr (INT4) {
                *factor = make_float4(half_to_float((u16)next_factors.x), half_to_float((u16)next_factors.y),
                                      half_to_float((u16)next_factors.z), half_to_float((u16)next_factors.w));
                *(float4*)s.w_least[warp][lane] =
                    make_float4(half_to_float((u16)(next_factors.x >> 16)), half_to_float((u16)(next_factors.y >> 16)),
                                half_to_float((u16)(next_factors.z >> 16)), half_to_float((u16)(next_factors.w >> 16)));
            } else {
                *factor = make_float4(half_to_float((u16)next_factors.x), half_to_float((u16)(next_factors.x >> 16)),
                                      half_to_float((u16)next_factors.y), half_to_float((u16)(next_factors.y >> 16)));
            }
            int then = i + 1 < my_steps ? tile : tile + gridDim.x;
            if (then < tiles) fetch_factors(then, step_of(then, i + 1 < my_steps ? i + 1 : 0));
            copy_async_wait<DEPTH - 1>();
            __syncwarp();
            const S& held = s.steps[warp][slot];
#pragma unroll(ROWS == 64 ? 1 : 2)
            for (int part = 0; part < STEP_GROUPS; part++) {
                u32 a[2][4];
                float wf[2][2], wl[2][2];
#pragma unroll
                for (int f = 0; f < 2; f++) {
                    if constexpr (INT4) {
                        u32 low = *(const u32*)(held.weights[f * 16 + g] + part * 16 + t * 4);
                        u32 high = *(const u32*)(held.weights[f * 16 + g + 8] + part * 16 + t * 4);
                        a[f][0] = low & 0x0f0f0f0f;
                        a[f][1] = high & 0x0f0f0f0f;
                        a[f][2] = low >> 4 & 0x0f0f0f0f;
                        a[f][3] = high >> 4 & 0x0f0f0f0f;
                    } else {
                        ldmatrix4(a[f], held.weights[f * 16 + lane % 16] + part * 32 + lane / 16 * 16);
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        wf[f][h] = s.w_factor[warp][f * 16 + g + h * 8][part];
                        if (INT4) wl[f][h] = s.w_least[warp][f * 16 + g + h * 8][part];
                    }
                }
#pragma unroll
                for (int j = 0; j < COLUMNS; j += 2) {
                    // Two columns of eight rows.
                    u32 b[2][2];
                    if constexpr (INT4) {
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            uint2 both = *(const uint2*)(held.x[(j + c) * 8 + g] + part * 32 + t * 8);
                            b[c][0] = both.x;
                            b[c][1] = both.y;
                        }
                    } else {
                        u32 four[4];
                        ldmatrix4(four, held.x[(j + lane / 16) * 8 + lane % 8] + part * 32 + lane / 8 % 2 * 16);
                        b[0][0] = four[0];
                        b[0][1] = four[1];
                        b[1][0] = four[2];
                        b[1][1] = four[3];
                    }
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        int row = (j + c) * 8 + t * 2;
                        float xf[2] = {held.x_factor[row][part], held.x_factor[row + 1][part]}, xs[2];
                        if (INT4) {
                            xs[0] = held.x_sum[row][part];
                            xs[1] = held.x_sum[row + 1][part];
                        }
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            int d[4];
                            mma_s8(d, a[f], b[c]);
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                float& sum = acc[f][j + c][e];
                                sum = fmaf((float)d[e], wf[f][e / 2] * xf[e % 2], sum);
                                if (INT4) sum = fmaf(wl[f][e / 2], xs[e % 2], sum);
                            }
                        }
                    }
                }
            }
            slot = (slot + 1) % DEPTH;
        }
        // The warps' sums meet.
#pragma unroll
        for (int f = 0; f < 2; f++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s.sums[warp][j * 8 + t * 2 + e % 2][f * 16 + g + e / 2 * 8] = acc[f][j][e];
        __syncthreads();
        auto sum_of = [&](int row, int r) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += s.sums[w][row][r];
            return sum;
        };
        int rows = min(ROWS, span.count);
        for (int i = threadIdx.x; i < rows * wide; i += WARPS * WARP) {
            int row = i / wide, r = i % wide, output = tile * wide + r;
            if (output >= outputs) continue;
            int target = target_row(p, span.first + row);
            if (gated) {
                float gate = sum_of(row, r) + (p.bias ? p.bias[output] : 0.0f);
                float up = sum_of(row, r + 16) + (p.bias ? p.bias[half + output] : 0.0f);
                ((T*)p.out)[(size_t)target * p.out_stride + output] = narrowed(activate_inline(p.act, gate) * up);
            } else {
                put(p, target, output, sum_of(row, r));
            }
        }
        __syncthreads();
    }
    copy_async_wait<0>();
}

#define TILE(NAME, WARPS, ...) \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1) NAME(Product p) { tile_quantized<__VA_ARGS__>(p); }
TILE(tile_int8_16, 8, false, 16)
TILE(tile_int8_32, 8, false, 32)
TILE(tile_int8_64, 4, false, 64)
TILE(tile_int4_16, 8, true, 16)
TILE(tile_int4_32, 8, true, 32)
TILE(tile_int4_64, 4, true, 64)

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
