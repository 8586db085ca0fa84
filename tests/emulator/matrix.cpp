// What tensor cores do: matrix fragments over the lanes of a warp, laid out as the PTX manual says for mma.m16n8k16 and
// ldmatrix.
#include "emulator.h"

#include <cstring>

#define EMULATOR_RUNTIME
#include "kernel.h"

#define EXPORT __attribute__((visibility("default")))

using namespace emulator;

namespace {

struct Product {
    void* d;
    const unsigned *a, *b;
};

void need_whole_warp(unsigned lanes) {
    if (lanes != all_lanes) emulator_trap("mma or ldmatrix without all 32 lanes");
}

__attribute__((target_clones("default", "arch=x86-64-v3"))) void multiply16(void* const* slots, bool half) {
    alignas(32) float a[16][16], b[16][8], c[16][8];
    auto value = [half](unsigned bits) { return half ? half_to_float(uint16_t(bits)) : bf16_to_float(uint16_t(bits)); };
    for (int lane = 0; lane < 32; lane++) {
        auto& p = *static_cast<Product*>(slots[lane]);
        auto* d = static_cast<float*>(p.d);
        int group = lane >> 2, pair = 2 * (lane & 3);
        for (int r = 0; r < 4; r++) {
            int row = group + (r & 1) * 8, k = pair + (r >> 1) * 8;
            a[row][k] = value(p.a[r] & 0xffff);
            a[row][k + 1] = value(p.a[r] >> 16);
            c[group + (r >> 1) * 8][pair + (r & 1)] = d[r];
        }
        for (int r = 0; r < 2; r++) {
            b[pair + r * 8][group] = value(p.b[r] & 0xffff);
            b[pair + r * 8 + 1][group] = value(p.b[r] >> 16);
        }
    }
    for (int row = 0; row < 16; row++) {
        // The products are summed before the accumulator joins, which is closer to what the hardware does.
        float sum[8] = {};
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
        for (int n = 0; n < 8; n++) c[row][n] += sum[n];
    }
    for (int lane = 0; lane < 32; lane++) {
        auto* d = static_cast<float*>(static_cast<Product*>(slots[lane])->d);
        int group = lane >> 2, pair = 2 * (lane & 3);
        for (int r = 0; r < 4; r++) d[r] = c[group + (r >> 1) * 8][pair + (r & 1)];
    }
}

void multiply_bf16(void* const* slots, unsigned lanes) {
    need_whole_warp(lanes);
    multiply16(slots, false);
}

void multiply_f16(void* const* slots, unsigned lanes) {
    need_whole_warp(lanes);
    multiply16(slots, true);
}

struct Load {
    unsigned* r;
    const void* row;
};

void load_matrices(void* const* slots, unsigned lanes, bool transposed) {
    need_whole_warp(lanes);
    uint16_t rows[32][8];
    for (int lane = 0; lane < 32; lane++) {
        const void* row = static_cast<Load*>(slots[lane])->row;
        if (reinterpret_cast<uintptr_t>(row) % 16) emulator_trap("ldmatrix with an address that is no multiple of 16");
        memcpy(rows[lane], row, 16);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            int row = lane / 4, column = 2 * (lane % 4);
            auto* m = rows + 8 * matrix;
            unsigned low = transposed ? m[column][row] : m[row][column];
            unsigned high = transposed ? m[column + 1][row] : m[row][column + 1];
            static_cast<Load*>(slots[lane])->r[matrix] = low | high << 16;
        }
}

void load_plain(void* const* slots, unsigned lanes) { load_matrices(slots, lanes, false); }
void load_transposed(void* const* slots, unsigned lanes) { load_matrices(slots, lanes, true); }

}  // namespace

extern "C" {

EXPORT void emulator_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    Product slot{d, a, b};
    emulator_sync_warp("mma_bf16", all_lanes, multiply_bf16, &slot);
}

EXPORT void emulator_mma_f16(float* d, const unsigned* a, const unsigned* b) {
    Product slot{d, a, b};
    emulator_sync_warp("mma_f16", all_lanes, multiply_f16, &slot);
}

EXPORT void emulator_ldmatrix4(unsigned* r, const void* row, bool transposed) {
    Load slot{r, row};
    emulator_sync_warp("ldmatrix4", all_lanes, transposed ? load_transposed : load_plain, &slot);
}

}  // extern "C"
