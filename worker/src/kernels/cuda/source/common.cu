// What all kernels share: element formats, warp reductions, and the few instructions that CUDA C++ has no words for.
//
// Compiled at start by NVRTC, without headers, once per format of the residual stream and width of the heads:
//   ELEMENT   0 = f32, 1 = bf16, 2 = f16: the format `T` of residual stream, activations and cache
//   HEAD_DIM  elements per attention head

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define FULL 0xffffffffu
#define NEG_INF (__int_as_float(0xff800000))

#ifndef STRATA_EMULATED

extern __shared__ __align__(128) u8 dynamic_shared[];

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// d += a * b for a (16, 16) by rows and b (16, 8) by columns, one fragment per lane.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], const void* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void ldmatrix4_transposed(u32 (&r)[4], const void* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// 16 bytes from global to shared memory, past the registers; zeros where there is nothing to read.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool in_range) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(at), "l"(global), "r"(in_range ? 16 : 0) : "memory");
}

// 4 and 8 bytes likewise.
__device__ __forceinline__ void copy_async4(void* shared, const void* global) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async8(void* shared, const void* global) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(at), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// 2 to the power of x; what is too small for a normal number is 0.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Kernels of one stream may overlap (programmatic dependent launch): blocks of the next one come as soon as all blocks of
// this one have called `let_next_come`; before `wait_for_previous` they must touch nothing that another such kernel wrote or
// reads. Plain kernels, which call neither, are over before what is started after them begins.
// INVARIANT: a kernel that calls `let_next_come` calls `wait_for_previous` in every block, or what comes two kernels later could
// overtake it.
__device__ __forceinline__ void let_next_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The bits of two floats in 16 bits each, rounded to nearest, ties to even; `low` in the low half.
__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ u32 two_f16(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// (a & b) | c as one instruction, which the compiler makes two of where b and c are constants.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// a * b + c of two elements at a time, rounded once.
__device__ __forceinline__ u32 fma_two_bf16(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 fma_two_f16(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

#endif

__device__ __forceinline__ void follow() {
    let_next_come();
    wait_for_previous();
}

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float widen(f16 x) { return half_to_float(x.bits); }

// To nearest, ties to even; NaN stays one.
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, bf16& out) { out.bits = (u16)two_bf16(x, 0.0f); }
__device__ __forceinline__ void narrow(float x, f16& out) { out.bits = float_to_half(x); }

#if ELEMENT == 0
typedef float T;
#elif ELEMENT == 1
typedef bf16 T;
#else
typedef f16 T;
#endif

__device__ __forceinline__ T narrowed(float x) {
    T out;
    narrow(x, out);
    return out;
}

// The values of 16 bytes of weights or activations.
template <class E>
struct Pack {
    static constexpr int COUNT = 16 / sizeof(E);
    E at[COUNT];
};

template <class E>
__device__ __forceinline__ Pack<E> load16(const E* from) {
    union { uint4 raw; Pack<E> pack; } both = {*(const uint4*)from};
    return both.pack;
}

template <class E>
__device__ __forceinline__ void store16(E* to, const Pack<E>& pack) {
    union { Pack<E> pack; uint4 raw; } both = {pack};
    *(uint4*)to = both.raw;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}

// The sums of four numbers over the lanes of a warp: lanes 8 i to 8 i + 7 get the i-th.
__device__ __forceinline__ float warp_sums(const float (&x)[4]) {
    int lane = threadIdx.x % WARP;
    bool upper = lane & 16, odd = lane & 8;
    float one = upper ? x[2] : x[0], other = upper ? x[3] : x[1];
    one += __shfl_xor_sync(FULL, upper ? x[0] : x[2], 16);
    other += __shfl_xor_sync(FULL, upper ? x[1] : x[3], 16);
    float sum = odd ? other : one;
    sum += __shfl_xor_sync(FULL, odd ? one : other, 8);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL, sum, offset);
    return sum;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, offset));
    return x;
}

// The sum over all threads of a block of up to 1024, for all of them. `scratch` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < (blockDim.x + WARP - 1) / WARP ? scratch[lane] : 0.0f);
}

#if ELEMENT != 0

// d += a * b of elements, as `mma_bf16`.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if ELEMENT == 1
    mma_bf16(d, a, b);
#else
    mma_f16(d, a, b);
#endif
}

#endif

// Activation functions, numbered as the host numbers them.
enum { SILU, GELU, GELU_TANH, GELU_QUICK, RELU, TANH, RELU_SQUARED, RELU6, LEAKY_RELU, MISH, SIGMOID, GELU_CLIPPED, IDENTITY };

// min(x, most), which keeps NaN.
__device__ __forceinline__ float at_most(float x, float most) { return x > most ? most : x; }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int ACT>
__device__ __forceinline__ float activate_by(float x) {
    if constexpr (ACT == SILU) return x / (1.0f + expf(-x));
    if constexpr (ACT == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    if constexpr (ACT == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    if constexpr (ACT == GELU_QUICK) return x / (1.0f + expf(-1.702f * x));
    if constexpr (ACT == RELU) return x < 0.0f ? 0.0f : x;
    if constexpr (ACT == RELU_SQUARED) return x < 0.0f ? 0.0f : x * x;
    if constexpr (ACT == RELU6) return x < 0.0f ? 0.0f : at_most(x, 6.0f);
    if constexpr (ACT == LEAKY_RELU) return x < 0.0f ? 0.01f * x : x;
    if constexpr (ACT == MISH) {
        // tanh(ln(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2); from 20 on it is 1.
        float e = expf(at_most(x, 20.0f)), t = e * (e + 2.0f);
        return x * (t / (t + 2.0f));
    }
    if constexpr (ACT == SIGMOID) return sigmoid(x);
    if constexpr (ACT == GELU_CLIPPED) return at_most(activate_by<GELU>(x), 10.0f);
    if constexpr (ACT == IDENTITY) return x;
    return tanhf(x);
}

template <int ACT, int COUNT>
__device__ __forceinline__ void activate_each(float (&x)[COUNT]) {
#pragma unroll
    for (int e = 0; e < COUNT; e++) x[e] = activate_by<ACT>(x[e]);
}
template <int COUNT>
__device__ __forceinline__ void activate_all(int act, float (&x)[COUNT]) {
    switch (act) {
        case SILU: return activate_each<SILU>(x);
        case GELU: return activate_each<GELU>(x);
        case GELU_TANH: return activate_each<GELU_TANH>(x);
        case GELU_QUICK: return activate_each<GELU_QUICK>(x);
        case RELU: return activate_each<RELU>(x);
        case RELU_SQUARED: return activate_each<RELU_SQUARED>(x);
        case RELU6: return activate_each<RELU6>(x);
        case LEAKY_RELU: return activate_each<LEAKY_RELU>(x);
        case MISH: return activate_each<MISH>(x);
        case SIGMOID: return activate_each<SIGMOID>(x);
        case GELU_CLIPPED: return activate_each<GELU_CLIPPED>(x);
        case IDENTITY: return;
        default: return activate_each<TANH>(x);
    }
}

__device__ __forceinline__ float activate_inline(int act, float x) {
    float one[1] = {x};
    activate_all(act, one);
    return one[0];
}

// The same as one function, for where it is no hot loop: the compiler has less to do.
__device__ __noinline__ float activate(int act, float x) { return activate_inline(act, x); }

// A matrix (n, k) by rows, in one of five formats.
//
//   float formats: `values` holds n * k elements.
//   int8:          `values` holds n * k signed bytes, `factors` one f16 per 32 of them.
//   int4:          `values` holds n * k half bytes, eight of them per word: the first four in the low halves of its
//                  bytes, the others in the high halves. `factors` holds two f16 per 32: factor, and what is added.
struct Matrix {
    const u8* values;
    const u8* factors;
    int n, k;
};

// Rows as int8: bytes (rows, k), a factor per 32 of them, and the sum of what these 32 stand for.
struct Bytes {
    signed char* values;
    float* factors;
    float* sums;
};

// Rows of whole groups become bytes: each lane gives `COUNT` values from element `first` on, neighbouring lanes neighbouring
// ones; a group's factor is its largest magnitude / 127. All lanes of a warp take part, those that are not `there` with
// values that go nowhere.
template <int COUNT>
__device__ __forceinline__ void group_bytes(Bytes out, size_t first, const float (&values)[COUNT], bool there) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) most = fmaxf(most, fabsf(values[i]));
#pragma unroll
    for (int offset = GROUP / COUNT / 2; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(FULL, most, offset));
    float factor = most / 127.0f, inverse = 1.0f / factor;
    // A factor too small to divide by stands for nothing.
    inverse = isfinite(inverse) ? inverse : 0.0f;
    // None is larger than 127 now. A number that is added to 1.5 * 2^23 is rounded to a whole one, ties to even, which the
    // low bits then are.
    u32 words[(COUNT + 3) / 4] = {};
    u32 bits[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        bits[i] = __float_as_uint(__fadd_rn(__fmul_rn(values[i], inverse), 12582912.0f));
    int sum = 0;
    if constexpr (COUNT == 1) {
        words[0] = bits[0];
        sum = (int)(signed char)bits[0];
    } else {
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++) {
            words[i] = __byte_perm(__byte_perm(bits[i * 4], bits[i * 4 + 1], 0x0040),
                                   __byte_perm(bits[i * 4 + 2], bits[i * 4 + 3], 0x0040), 0x5410);
            sum = __dp4a((int)words[i], 0x01010101, sum);
        }
    }
#pragma unroll
    for (int offset = GROUP / COUNT / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL, sum, offset);
    if (!there) return;
    signed char* to = out.values + first;
    if constexpr (COUNT == 1) {
        *to = (signed char)words[0];
    } else {
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++) ((u32*)to)[i] = words[i];
    }
    if (first % GROUP == 0) {
        out.factors[first / GROUP] = factor;
        out.sums[first / GROUP] = factor * (float)sum;
    }
}
