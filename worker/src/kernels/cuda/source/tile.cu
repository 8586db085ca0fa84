// Products of up to 64 rows on the tensor cores (`Product` of product.cu): of quantized weights, which become elements on
// their way to them, and of the experts of any format. Only for 16-bit rows.
#if ELEMENT != 0

enum TileFormat { TILE_ELEMENTS, TILE_INT8, TILE_INT4 };

// Outputs of a block, a quarter of them for each of its warps.
#define TILE_OUTPUTS 128
#define TILE_THREADS 128

// What a block has of one step in shared memory, or on its way there. The distances from row to row let the lanes that read
// together meet all banks.
template <TileFormat FORMAT, int ROWS>
struct TileStage {
    // Elements of k, and their bytes of an output.
    static constexpr int STEP = FORMAT == TILE_ELEMENTS ? 64 : 128;
    static constexpr int BYTES = FORMAT == TILE_INT8 ? STEP : FORMAT == TILE_INT4 ? STEP / 2 : STEP * 2;
    static constexpr int STRIDE = FORMAT == TILE_INT8 ? BYTES + 32 : BYTES + 16;
    static constexpr int X_BYTES = STEP * 2, X_STRIDE = FORMAT == TILE_ELEMENTS ? X_BYTES + 16 : X_BYTES + 64;
    // Of an output: f16 factors, of int4 each with what is added.
    static constexpr int GROUPS = STEP / GROUP, FACTORS = FORMAT == TILE_INT8 ? GROUPS * 2 : FORMAT == TILE_INT4 ? GROUPS * 4 : 0;
    u8 weights[TILE_OUTPUTS][STRIDE];
    u8 x[ROWS][X_STRIDE];
    static constexpr int OTHERS = TILE_OUTPUTS * STRIDE + ROWS * X_STRIDE, SUMS = ROWS * TILE_OUTPUTS * 4 - OTHERS;
    // At the end of a tile, the sums take the place of a stage.
    u8 factors[SUMS > TILE_OUTPUTS * FACTORS ? SUMS : FACTORS ? TILE_OUTPUTS * FACTORS : 16];
};

// Shared memory of a block: two of them fit a multiprocessor of data-centre GPUs, one any other.
#define TILE_ROOM (98 << 10)

// Stages under way: as many as there is room for, and two at least. As `tile_bytes` of launch.rs.
template <class Stage>
constexpr int TILE_DEPTH = TILE_ROOM / sizeof(Stage) < 2 ? 2 : TILE_ROOM / sizeof(Stage) > 6 ? 6 : TILE_ROOM / sizeof(Stage);

// What a lane has of the quantized weights of 16 outputs and a group: the operands of two products. Lane t of four takes elements
// 8 t to 8 t + 7 of each row; as it does so of x too, a product adds up what belongs together, in another order.
template <TileFormat FORMAT>
__device__ __forceinline__ void tile_weights(u32 (&a)[2][4], const u8* row, int half, const u8* factors) {
    if constexpr (FORMAT == TILE_INT8) {
        uint2 raw = *(const uint2*)row;
        a[0][half] = two_of_int8(__byte_perm(raw.x, 0, 0x4140));
        a[0][half + 2] = two_of_int8(__byte_perm(raw.x, 0, 0x4342));
        a[1][half] = two_of_int8(__byte_perm(raw.y, 0, 0x4140));
        a[1][half + 2] = two_of_int8(__byte_perm(raw.y, 0, 0x4342));
    } else {
        u32 both = *(const u32*)factors, elements[4];
        eight_of_int4(elements, *(const u32*)row, twice((u16)both), twice((u16)(both >> 16)));
        a[0][half] = elements[0];
        a[0][half + 2] = elements[1];
        a[1][half] = elements[2];
        a[1][half + 2] = elements[3];
    }
}

// Where blocks meet that share the outputs of a tile.
struct Meeting {
    // Of each block, room for the sums of two tiles.
    float4* sums;
    // Of each block, how many of those have come that share the tile that begins in it: 0 before and after each launch.
    u32* arrived;
};

// Blocks of one row of the grid share out tiles of outputs and the steps of each evenly: a block may begin and end in the
// middle of a tile. Blocks that share a tile leave their sums in memory, and the last one to come adds them up, in their order.
template <TileFormat FORMAT, int ROWS>
__device__ __forceinline__ void tile(Product p, const Meeting& meeting) {
    typedef TileStage<FORMAT, ROWS> Stage;
    constexpr int COLUMNS = ROWS / 8, DEPTH = TILE_DEPTH<Stage>;
    __shared__ bool is_last;
    Stage* stages = (Stage*)dynamic_shared;
    let_next_come();
    bool alone = !p.tasks;
    Task span = {0, 0, 0};
    if (!alone) {
        wait_for_previous();
        span = rows_of_block(p, ROWS);
        if (span.count <= 0) return;
        p = of_expert(p, span.expert);
    }
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
    const int n = p.weight.n, k = p.weight.k, half = n / 2;
    const bool gated = p.epilogue == GATED;
    // Of gated products, half of a tile are gates and the others what they are for.
    const int wide = gated ? TILE_OUTPUTS / 2 : TILE_OUTPUTS, outputs = gated ? half : n;
    const int tiles = (outputs + wide - 1) / wide, steps = (k + Stage::STEP - 1) / Stage::STEP, units = tiles * steps;
    const int first = (int)((u64)units * blockIdx.x / gridDim.x), end = (int)((u64)units * (blockIdx.x + 1) / gridDim.x);

    // Each thread carries 16 bytes of every `PASS`-th output of a tile. Of 32 outputs, of gated products the first 16 are gates
    // and the others what they are for.
    constexpr int IN_ROW = Stage::BYTES / 16, PASS = TILE_THREADS / IN_ROW, PASSES = TILE_OUTPUTS / PASS;
    const int in_pass = thread / IN_ROW, piece = thread % IN_ROW * 16;
    const u64 row_bytes = FORMAT == TILE_ELEMENTS ? (u64)k * 2 : FORMAT == TILE_INT8 ? k : k / 2;
    auto output_at = [&](int r) { return gated ? r / 32 * 16 + r % 16 : r; };
    auto is_up = [&](int r) { return gated && r % 32 >= 16; };
    // Where the next step of the tile that is asked for is, of this thread's first output; how many outputs are left from that
    // one on; and the factors of output `thread`.
    const u8 *next_weights, *next_factors;
    int next_left, next_tile = first / steps, next_step = first % steps;
    auto aim = [&]() {
        int output = next_tile * wide + output_at(in_pass);
        next_left = outputs - output;
        next_weights = p.weight.values + (output + (is_up(in_pass) ? half : 0)) * row_bytes + (u64)next_step * Stage::BYTES + piece;
        if constexpr (FORMAT != TILE_ELEMENTS) {
            int r = thread, of = min(next_tile * wide + output_at(r), outputs - 1) + (is_up(r) ? half : 0);
            next_factors = p.weight.factors + ((u64)of * steps + next_step) * Stage::FACTORS;
        }
    };
    aim();
    auto fetch_weights = [&](Stage& to) {
        const bool inside = FORMAT != TILE_ELEMENTS || next_step * Stage::BYTES + piece < k * 2;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            // Outputs from this thread's first one on.
            int on = PASS >= 32 ? i * (gated ? PASS / 2 : PASS) : gated ? i * PASS / 32 * 16 : i * PASS;
            u64 more = (on + (PASS < 32 && is_up(i * PASS) ? half : 0)) * row_bytes;
            bool there = on < next_left && inside;
            copy_async16(to.weights[i * PASS + in_pass] + piece, next_weights + more, there);
        }
        next_weights += Stage::BYTES;
        if constexpr (FORMAT != TILE_ELEMENTS) {
            u8* factors = to.factors + thread * Stage::FACTORS;
            if constexpr (FORMAT == TILE_INT8) copy_async8(factors, next_factors);
            else copy_async16(factors, next_factors, true);
            next_factors += Stage::FACTORS;
        }
        if (++next_step == steps) {
            next_step = 0;
            next_tile++;
            aim();
        }
    };
    constexpr int X_IN_ROW = Stage::X_BYTES / 16, X_PIECES = ROWS * X_IN_ROW / TILE_THREADS;
    const T* source[X_PIECES];
    auto fetch_x = [&](Stage& to, int step) {
        int at = step * Stage::STEP + thread % X_IN_ROW * 8;
#pragma unroll
        for (int i = 0; i < X_PIECES; i++) {
            int r = i * (TILE_THREADS / X_IN_ROW) + thread / X_IN_ROW;
            bool there = r < span.count && at < k;
            copy_async16(to.x[r] + thread % X_IN_ROW * 16, source[i] + at, there);
        }
    };

    // Weights are asked for while the kernel before still runs.
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++)
        if (first + i < end) fetch_weights(stages[i]);
    if (alone) {
        wait_for_previous();
        span = rows_of_block(p, ROWS);
    }
#pragma unroll
    for (int i = 0; i < X_PIECES; i++) {
        int r = i * (TILE_THREADS / X_IN_ROW) + thread / X_IN_ROW;
        source[i] = p.x + (size_t)source_row(p, span.first + min(r, span.count - 1)) * p.x_stride;
    }
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        if (first + i < end) fetch_x(stages[i], (first + i) % steps);
        copy_async_commit();
    }

    int unit = first, slot = 0;
    while (unit < end) {
        const int tile = unit / steps, begin = tile * steps, stop = min(end, begin + steps);
        float sum[2][COLUMNS][4] = {};
#pragma unroll 1
        for (; unit < stop; unit++) {
            copy_async_wait<DEPTH - 2>();
            // What all threads asked for is there, and nobody reads the stage before this one any more.
            __syncthreads();
            if (unit + DEPTH - 1 < end) {
                Stage& to = stages[slot == 0 ? DEPTH - 1 : slot - 1];
                fetch_x(to, next_step);
                fetch_weights(to);
            }
            copy_async_commit();
            const Stage& held = stages[slot];
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
            if constexpr (FORMAT == TILE_ELEMENTS) {
#pragma unroll
                for (int slab = 0; slab < Stage::STEP / 16; slab++) {
                    u32 a[2][4];
#pragma unroll
                    for (int f = 0; f < 2; f++)
                        ldmatrix4(a[f], held.weights[warp * 32 + f * 16 + lane % 16] + slab * 32 + lane / 16 * 16);
#pragma unroll
                    for (int j = 0; j < COLUMNS; j += 2) {
                        u32 four[4];
                        ldmatrix4(four, held.x[(j + lane / 16) * 8 + lane % 8] + slab * 32 + lane / 8 % 2 * 16);
                        const u32 x[2][2] = {{four[0], four[1]}, {four[2], four[3]}};
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            mma(sum[f][j], a[f], x[0]);
                            mma(sum[f][j + 1], a[f], x[1]);
                        }
                    }
                }
            } else {
#pragma unroll(ROWS == 64 && FORMAT == TILE_INT8 ? 1 : Stage::GROUPS)
                for (int part = 0; part < Stage::GROUPS; part++) {
                    u32 a[2][2][4];
                    float factor[2][2] = {};
#pragma unroll
                    for (int f = 0; f < 2; f++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            int r = warp * 32 + f * 16 + h * 8 + g;
                            const u8* factors = held.factors + r * Stage::FACTORS + part * (Stage::FACTORS / Stage::GROUPS);
                            tile_weights<FORMAT>(a[f], held.weights[r] + (part * 4 + t) * (Stage::BYTES / 16), h, factors);
                            if constexpr (FORMAT == TILE_INT8) factor[f][h] = half_to_float(*(const u16*)factors);
                        }
#pragma unroll
                    for (int j = 0; j < COLUMNS; j++) {
                        uint4 raw = *(const uint4*)(held.x[j * 8 + g] + part * 64 + t * 16);
                        const u32 x[2][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            if constexpr (FORMAT == TILE_INT8) {
                                // Whole numbers as elements are exact; so is their factor afterwards.
                                float d[4] = {};
                                mma(d, a[f][0], x[0]);
                                mma(d, a[f][1], x[1]);
#pragma unroll
                                for (int e = 0; e < 4; e++) sum[f][j][e] = fmaf(d[e], factor[f][e / 2], sum[f][j][e]);
                            } else {
                                mma(sum[f][j], a[f][0], x[0]);
                                mma(sum[f][j], a[f][1], x[1]);
                            }
                        }
                    }
                }
            }
        }
        // The sums take the place of the stage that was read last.
        float* sums = (float*)&stages[slot == 0 ? DEPTH - 1 : slot - 1];
        auto place_of = [&](int row, int r) { return row * TILE_OUTPUTS + (r ^ (row / 2 % 4 * 8)); };
        __syncthreads();
#pragma unroll
        for (int f = 0; f < 2; f++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sums[place_of(j * 8 + t * 2 + e % 2, warp * 32 + f * 16 + e / 2 * 8 + g)] = sum[f][j][e];
        __syncthreads();
        if (begin < first || stop < begin + steps) {
            // Others share the tile.
            const u64 blocks = gridDim.x, line = (blockIdx.z * gridDim.y + blockIdx.y) * blocks;
            auto block_of = [&](int unit) { return (int)(((u64)(unit + 1) * blocks - 1) / units); };
            const int from = block_of(begin), to = block_of(begin + steps - 1);
            constexpr int QUARTERS = ROWS * TILE_OUTPUTS / 4;
            // A block can leave the end of one tile and the beginning of another.
            auto left = [&](int block) { return meeting.sums + ((line + block) * 2 + (block == from ? 1 : 0)) * QUARTERS; };
            float4* mine = (float4*)sums;
            for (int i = thread; i < QUARTERS; i += TILE_THREADS) __stcg(left(blockIdx.x) + i, mine[i]);
            __threadfence();
            __syncthreads();
            if (thread == 0) is_last = atomicInc(meeting.arrived + line + from, to - from) == to - from;
            __syncthreads();
            if (!is_last) continue;
            __threadfence();
            constexpr int EACH = QUARTERS / TILE_THREADS;
            float4 all[EACH] = {};
#pragma unroll 2
            for (int block = from; block <= to; block++) {
                float4 part[EACH];
#pragma unroll
                for (int i = 0; i < EACH; i++) part[i] = __ldcg(left(block) + i * TILE_THREADS + thread);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    all[i].x += part[i].x;
                    all[i].y += part[i].y;
                    all[i].z += part[i].z;
                    all[i].w += part[i].w;
                }
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) mine[i * TILE_THREADS + thread] = all[i];
            __syncthreads();
        }
        // Eight outputs at a time.
        const int shift = gated ? 3 : 4;
        for (int i = thread; i < min(ROWS, span.count) << shift; i += TILE_THREADS) {
            int row = i >> shift, r = (i & (1 << shift) - 1) * 8, output = tile * wide + r;
            if (output >= outputs) continue;
            float values[8];
            auto take = [&](int r, int first) {
                float4 low = *(const float4*)(sums + place_of(row, r)), high = *(const float4*)(sums + place_of(row, r) + 4);
                values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
                values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
                if (p.bias)
#pragma unroll
                    for (int e = 0; e < 8; e++) values[e] += output + e < outputs ? p.bias[first + e] : 0.0f;
            };
            if (gated) {
                take(r / 16 * 32 + r % 16, output);
                float gates[8];
#pragma unroll
                for (int e = 0; e < 8; e++) gates[e] = activate(p.act, values[e]);
                take(r / 16 * 32 + r % 16 + 16, half + output);
#pragma unroll
                for (int e = 0; e < 8; e++) values[e] *= gates[e];
            } else {
                take(r, output);
            }
            put_pack(p, target_row(p, span.first + row), output, outputs - output, values);
        }
    }
    copy_async_wait<0>();
}

#define TILE(NAME, ...) \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) NAME(Product p, Meeting meeting) { \
        tile<__VA_ARGS__>(p, meeting); \
    }
TILE(tile_elements_16, TILE_ELEMENTS, 16)
TILE(tile_elements_32, TILE_ELEMENTS, 32)
TILE(tile_elements_64, TILE_ELEMENTS, 64)
TILE(tile_int8_16, TILE_INT8, 16)
TILE(tile_int8_32, TILE_INT8, 32)
TILE(tile_int8_64, TILE_INT8, 64)
TILE(tile_int4_16, TILE_INT4, 16)
TILE(tile_int4_32, TILE_INT4, 32)
TILE(tile_int4_64, TILE_INT4, 64)

#endif
