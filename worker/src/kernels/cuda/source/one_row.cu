// Products of one row (`Product` of product.cu): memory is what they wait for, so weights are asked for long before they are
// used, and before the kernel before has ended.

// A row as its product takes it, in shared memory.
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

// Kinds of weights. A lane takes 16 bytes of each of four outputs at a time, `COUNT` elements from `at` on, and the word with
// their factors; `element` says where in the matrix they begin. `FACTOR` is the bytes of a factor.
template <class W>
struct DensePiece {
    static constexpr int COUNT = Pack<W>::COUNT, FACTOR = 0;
    static __device__ __forceinline__ size_t bytes(size_t element) { return element * sizeof(W); }

    static __device__ __forceinline__ void add(const uint4 (&weights)[4], const u32 (&)[4], const Staged<false>& x, int at, const size_t (&)[4],
                                               float (&sum)[4]) {
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
        for (int r = 0; r < 4; r++) {
            union { uint4 raw; Pack<W> pack; } both = {weights[r]};
#pragma unroll
            for (int i = 0; i < COUNT; i++) sum[r] = fmaf(widen(both.pack.at[i]), wide[i], sum[r]);
        }
    }
};

struct Int8Piece {
    static constexpr int COUNT = 16, FACTOR = 2;
    static __device__ __forceinline__ size_t bytes(size_t element) { return element; }

    static __device__ __forceinline__ void add(const uint4 (&weights)[4], const u32 (&factors)[4], const Staged<true>& x, int at,
                                               const size_t (&element)[4], float (&sum)[4]) {
        int4 row = *(const int4*)(x.bytes.values + at);
        float scale = x.bytes.factors[at / GROUP];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int4 w = make_int4(weights[r].x, weights[r].y, weights[r].z, weights[r].w);
            // Two factors lie in a word.
            u16 factor = (u16)(factors[r] >> (element[r] / GROUP % 2 * 16));
            sum[r] = fmaf((float)dot16(w, row, 0), half_to_float(factor) * scale, sum[r]);
        }
    }
};

struct Int4Piece {
    static constexpr int COUNT = 32, FACTOR = 4;
    static __device__ __forceinline__ size_t bytes(size_t element) { return element / 2; }

    static __device__ __forceinline__ void add(const uint4 (&weights)[4], const u32 (&factors)[4], const Staged<true>& x, int at,
                                               const size_t (&)[4], float (&sum)[4]) {
        const int4* row = (const int4*)(x.bytes.values + at);
        int4 first = row[0], second = row[1];
        float scale = x.bytes.factors[at / GROUP], total = x.bytes.sums[at / GROUP];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int4 w = make_int4(weights[r].x, weights[r].y, weights[r].z, weights[r].w);
            float factor = half_to_float((u16)factors[r]), least = half_to_float((u16)(factors[r] >> 16));
            sum[r] += (float)dot32(w, first, second) * (factor * scale) + least * total;
        }
    }
};

// Warps of a block, and how often each has asked for weights that it has not used yet.
#define ONE_ROW_WARPS 8
#define ONE_ROW_DEPTH 4
// Fours of outputs of a block between two meetings of its warps.
#define ONE_ROW_ROUND 16
// Packs of the row that a thread reads at a time.
#define ONE_ROW_STAGED 8

// One row by a block of eight warps, which holds it in shared memory. As many warps as there is work for share out k, the
// others have outputs of their own, four at a time. Blocks share out the outputs, each a run of them.
template <class Piece, bool QUANTIZED>
__device__ __forceinline__ void one_row(Product p) {
    __shared__ float scratch[WARP], partial[2][ONE_ROW_ROUND][4][ONE_ROW_WARPS];
    constexpr int EACH = WARP * Piece::COUNT, SLOT = 4 * WARP * (16 + (Piece::FACTOR ? 4 : 0));
    let_next_come();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int n = p.weight.n, k = p.weight.k, half = n / 2;
    bool gated = p.epilogue == GATED;
    int pairs = gated ? half : (n + 1) / 2, pieces = (k + EACH - 1) / EACH, fours = (pairs + 1) / 2;
    // As `one_row` of product.rs.
    int share = pieces >= 8 ? 8 : pieces >= 4 ? 4 : pieces >= 2 ? 2 : 1;
    int groups = ONE_ROW_WARPS / share, group = warp / share, chunks = (pieces + share - 1) / share;
    int first = (int)((u64)fours * blockIdx.x / gridDim.x), end = (int)((u64)fours * (blockIdx.x + 1) / gridDim.x);
    int first_at = (warp % share * WARP + lane) * Piece::COUNT, step_at = share * EACH;
    // From output to output of a pair, and from pair to pair, in rows of the matrix. Missing ones of the last are others again.
    const size_t to_second = gated ? half : 1, to_pair = gated ? 1 : 2;
    const bool odd_pairs = pairs % 2, odd_outputs = !gated && n % 2;

    const int row_bytes = ((QUANTIZED ? k + k / GROUP * 8 : k * (int)sizeof(T)) + 15) / 16 * 16;
    u8* ring = dynamic_shared + row_bytes + warp * ONE_ROW_DEPTH * SLOT;
    int next_four = first + group, next_chunk = 0;
    // The first element of a row of the matrix that a lane takes, by output of a four.
    auto element_of = [&](int four, int r, int at) {
        bool last = four == fours - 1;
        size_t row = (size_t)four * 2 * to_pair + (r >= 2 && !(last && odd_pairs) ? to_pair : 0);
        bool single = odd_outputs && last && (r >= 2 || odd_pairs);
        return (row + (r % 2 && !single ? to_second : 0)) * k + at;
    };
    auto load = [&](int slot) {
        int at = first_at + next_chunk * step_at;
        if (next_four < end && at < k) {
            u8* to = ring + slot * SLOT;
#pragma unroll
            for (int r = 0; r < 4; r++) {
                size_t element = element_of(next_four, r, at);
                copy_async16(to + (r * WARP + lane) * 16, p.weight.values + Piece::bytes(element), true);
                // Of int8, the word that the factor lies in.
                size_t factor = element / GROUP * Piece::FACTOR & ~(size_t)3;
                if constexpr (Piece::FACTOR != 0) copy_async4(to + 4 * WARP * 16 + (r * WARP + lane) * 4, p.weight.factors + factor);
            }
        }
        copy_async_commit();
        if (++next_chunk == chunks) {
            next_chunk = 0;
            next_four += groups;
        }
    };
    bool alone = !p.tasks;
    if (alone) {
#pragma unroll
        for (int i = 0; i < ONE_ROW_DEPTH; i++) load(i);
    }
    HeldNorm norm_weight;
    if (p.norm.weight) norm_weight.load(p.norm, k);
    wait_for_previous();
    Task task = rows_of_block(p, 1);
    if (task.count <= 0) return;
    if (!alone) {
        p = of_expert(p, task.expert);
#pragma unroll
        for (int i = 0; i < ONE_ROW_DEPTH; i++) load(i);
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
        norm_row(x, p.norm, norm_weight, k, scratch, staged);
    } else if (k % PACK == 0 && p.x_stride % PACK == 0) {
        for (int base = warp * WARP * PACK; base < k; base += ONE_ROW_STAGED * ONE_ROW_WARPS * WARP * PACK) {
            Pack<T> packs[ONE_ROW_STAGED];
#pragma unroll
            for (int s = 0; s < ONE_ROW_STAGED; s++) {
                int i = base + s * ONE_ROW_WARPS * WARP * PACK + lane * PACK;
                packs[s] = {};
                if (i < k) packs[s] = load16(x + i);
            }
#pragma unroll
            for (int s = 0; s < ONE_ROW_STAGED; s++) {
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
    int four = first + group, slot = 0;
#pragma unroll 1
    for (int begin = first, turn = 0; begin < end; begin += ONE_ROW_ROUND, turn ^= 1) {
        const int stop = min(end, begin + ONE_ROW_ROUND);
#pragma unroll 1
        for (; four < stop; four += groups) {
            float sum[4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk++) {
                int at = first_at + chunk * step_at;
                copy_async_wait<ONE_ROW_DEPTH - 1>();
                if (at < k) {
                    const u8* from = ring + slot * SLOT;
                    size_t element[4];
                    uint4 weights[4];
                    u32 factors[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        element[r] = element_of(four, r, at);
                        weights[r] = *(const uint4*)(from + (r * WARP + lane) * 16);
                        if constexpr (Piece::FACTOR != 0)
                            factors[r] = *(const u32*)(from + 4 * WARP * 16 + (r * WARP + lane) * 4);
                    }
                    Piece::add(weights, factors, staged, at, element, sum);
                }
                load(slot);
                slot = (slot + 1) % ONE_ROW_DEPTH;
            }
            float all = warp_sums(sum);
            if (lane % 8 == 0) partial[turn][four - begin][lane / 8][warp % share] = all;
        }
        // The warps' sums meet. What is written in their place next comes after another meeting.
        __syncthreads();
        int pair = 2 * begin + threadIdx.x, at = threadIdx.x / 2, side = threadIdx.x % 2 * 2;
        if (at >= stop - begin || pair >= pairs) continue;
        float one = 0.0f, other = 0.0f;
        for (int w = 0; w < share; w++) {
            one += partial[turn][at][side][w];
            other += partial[turn][at][side + 1][w];
        }
        if (gated) {
            float gate = one + (p.bias ? p.bias[pair] : 0.0f), up = other + (p.bias ? p.bias[pair + half] : 0.0f);
            ((T*)p.out)[(size_t)row * p.out_stride + pair] = narrowed(activate(p.act, gate) * up);
        } else {
            put(p, row, 2 * pair, one);
            if (2 * pair + 1 < n) put(p, row, 2 * pair + 1, other);
        }
    }
    copy_async_wait<0>();
}

#define ONE_ROW(NAME, QUANTIZED, ...) \
    extern "C" __global__ void __launch_bounds__(WARP * ONE_ROW_WARPS, 2) NAME(Product p) { one_row<__VA_ARGS__, QUANTIZED>(p); }
ONE_ROW(matvec_f32_1, false, DensePiece<float>)
ONE_ROW(matvec_bf16_1, false, DensePiece<bf16>)
ONE_ROW(matvec_f16_1, false, DensePiece<f16>)
ONE_ROW(matvec_int8_1, true, Int8Piece)
ONE_ROW(matvec_int4_1, true, Int4Piece)
