// What a kernel source sees when it is compiled for the processor instead of a GPU: CUDA's built-in variables, types
// and functions as far as the kernels need them, plus the few that they define themselves with PTX for a real GPU.
// It includes no header at all: NVRTC offers none either, so a source that needs one fails here as it would there.
//
// The first part is the interface to the runtime (engine.cpp), which includes this file with EMULATOR_RUNTIME set.
#pragma once

namespace emulator {

struct Index {
    unsigned x, y, z;
};

/// A `__global__` function as the driver finds it in a compiled module.
struct Kernel {
    const char* name;
    void (*call)(void* const* values);
    unsigned count;
    const unsigned* sizes;
    unsigned max_threads;
    void* (*shared)();
};

/// What the last lane to arrive does for all of them: `slots` has each lane's arguments, `lanes` who takes part.
using Operation = void (*)(void* const* slots, unsigned lanes);

constexpr unsigned all_lanes = 0xffffffffu;

}  // namespace emulator

// `__thread` rather than `thread_local`: no wrapper function at each use. Fibers never move between OS threads.
extern __thread emulator::Index threadIdx, blockIdx, blockDim, gridDim;

/// The block's dynamic shared memory: its end touches an inaccessible page.
extern __thread unsigned char* dynamic_shared;

extern "C" {
unsigned emulator_lane();
void emulator_sync_block();
void emulator_sync_warp(const char* name, unsigned mask, emulator::Operation operation, void* slot);
void emulator_mma_bf16(float* d, const unsigned* a, const unsigned* b);
void emulator_mma_f16(float* d, const unsigned* a, const unsigned* b);
void emulator_ldmatrix4(unsigned* r, const void* row, bool transposed);
void emulator_copy_async(void* shared, const void* global, unsigned bytes, bool in_range);
void emulator_copy_async_commit();
void emulator_copy_async_wait(unsigned groups_left);
[[noreturn]] void emulator_trap(const char* what);
}

#ifndef EMULATOR_RUNTIME

#define STRATA_EMULATED 1
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 900

// The compiler driver (nvrtc.cpp) looks for these two words in the preprocessed text and takes them out again.
#define __global__ __emulator_global__
#define __launch_bounds__(...) __emulator_bounds__(__VA_ARGS__)
#define __device__
#define __host__
#define __constant__
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// Standard attributes may not stand between `static` and the type, where nvcc accepts them.
#define alignas(bytes) __attribute__((aligned(bytes)))
#define assert(condition) ((condition) ? (void)0 : emulator_trap("assertion failed: " #condition))

using size_t = decltype(sizeof 0);
constexpr int warpSize = 32;

// ---- vector types

using uint3 = emulator::Index;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;

#define EMULATOR_VECTOR2(type, base)                                        \
    struct __attribute__((aligned(2 * sizeof(base)))) type { base x, y; }; \
    inline type make_##type(base x, base y) { return {x, y}; }
#define EMULATOR_VECTOR4(type, base)                                              \
    struct __attribute__((aligned(4 * sizeof(base)))) type { base x, y, z, w; }; \
    inline type make_##type(base x, base y, base z, base w) { return {x, y, z, w}; }
EMULATOR_VECTOR2(char2, signed char)
EMULATOR_VECTOR4(char4, signed char)
EMULATOR_VECTOR2(uchar2, unsigned char)
EMULATOR_VECTOR4(uchar4, unsigned char)
EMULATOR_VECTOR2(short2, short)
EMULATOR_VECTOR4(short4, short)
EMULATOR_VECTOR2(ushort2, unsigned short)
EMULATOR_VECTOR4(ushort4, unsigned short)
EMULATOR_VECTOR2(int2, int)
EMULATOR_VECTOR4(int4, int)
EMULATOR_VECTOR2(uint2, unsigned)
EMULATOR_VECTOR4(uint4, unsigned)
EMULATOR_VECTOR2(float2, float)
EMULATOR_VECTOR4(float4, float)
EMULATOR_VECTOR2(ulonglong2, unsigned long long)
EMULATOR_VECTOR2(longlong2, long long)
EMULATOR_VECTOR2(double2, double)
struct float3 { float x, y, z; };
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ---- the C library's part

extern "C" {
int printf(const char*, ...);
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
int abs(int) noexcept;
float expf(float) noexcept;
float exp2f(float) noexcept;
float expm1f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log10f(float) noexcept;
float log1pf(float) noexcept;
float sqrtf(float) noexcept;
float cbrtf(float) noexcept;
float tanhf(float) noexcept;
float erff(float) noexcept;
float erfcf(float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float tanf(float) noexcept;
float atan2f(float, float) noexcept;
void sincosf(float, float*, float*) noexcept;
float powf(float, float) noexcept;
float fmodf(float, float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float truncf(float) noexcept;
float roundf(float) noexcept;
float rintf(float) noexcept;
float nearbyintf(float) noexcept;
float copysignf(float, float) noexcept;
float ldexpf(float, int) noexcept;
long lrintf(float) noexcept;
double exp(double) noexcept;
double log(double) noexcept;
double sqrt(double) noexcept;
double sin(double) noexcept;
double cos(double) noexcept;
double pow(double, double) noexcept;
double fabs(double) noexcept;
double fma(double, double, double) noexcept;
double floor(double) noexcept;
double fmax(double, double) noexcept;
double fmin(double, double) noexcept;
}
inline float exp(float x) { return expf(x); }
inline float log(float x) { return logf(x); }
inline float sqrt(float x) { return sqrtf(x); }
inline float sin(float x) { return sinf(x); }
inline float cos(float x) { return cosf(x); }
inline float pow(float x, float y) { return powf(x, y); }
inline float abs(float x) { return fabsf(x); }
inline float fabs(float x) { return fabsf(x); }
inline float floor(float x) { return floorf(x); }
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }

// ---- arithmetic

#define EMULATOR_MIN_MAX(type)                                       \
    inline type min(type a, type b) { return b < a ? b : a; }       \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf_sign(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(double x) { return __builtin_isinf_sign(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
inline int __isnanf(float x) { return __builtin_isnan(x); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* sine, float* cosine) { sincosf(x, sine, cosine); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? fminf(x, 1.0f) : 0.0f; }
// The empty assembly keeps the compiler from fusing these with a neighbour, which is what they are called for.
inline float __fmul_rn(float x, float y) { float r = x * y; asm("" : "+x"(r)); return r; }
inline float __fadd_rn(float x, float y) { float r = x + y; asm("" : "+x"(r)); return r; }
inline float __fsub_rn(float x, float y) { float r = x - y; asm("" : "+x"(r)); return r; }

namespace emulator {
// A GPU converts what does not fit to the nearest integer that does, and NaN to zero.
template <typename Integer>
inline Integer to_integer(float x, double low, double high) {
    if (x != x) return 0;
    return x <= low ? (Integer)low : x >= high ? (Integer)high : (Integer)x;
}
}  // namespace emulator
inline int __float2int_rz(float x) { return emulator::to_integer<int>(truncf(x), -2147483648.0, 2147483647.0); }
inline int __float2int_rn(float x) { return __float2int_rz(rintf(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
inline unsigned __float2uint_rz(float x) { return emulator::to_integer<unsigned>(truncf(x), 0.0, 4294967295.0); }
inline unsigned __float2uint_rn(float x) { return __float2uint_rz(rintf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int bit = 0; bit < 32; bit++) r |= (x >> bit & 1) << (31 - bit);
    return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 0xff) * (b >> 8 * i & 0xff);
    return c;
}
inline int __dp4a(char4 a, char4 b, int c) { return __dp4a(__builtin_bit_cast(int, a), __builtin_bit_cast(int, b), c); }
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
    return __dp4a(__builtin_bit_cast(unsigned, a), __builtin_bit_cast(unsigned, b), c);
}

inline float half_to_float(unsigned short bits) { return (float)__builtin_bit_cast(_Float16, bits); }
inline unsigned short float_to_half(float x) { return __builtin_bit_cast(unsigned short, (_Float16)x); }

// ---- memory

template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline void __stcs(T* p, T value) { *p = value; }
template <typename T> inline void __stcg(T* p, T value) { *p = value; }

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
inline int atomicSub(int* p, int v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicSub(unsigned* p, unsigned v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicAnd(unsigned* p, unsigned v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }

namespace emulator {
template <typename T, typename Change>
inline T atomic_change(T* p, Change change) {
    T old;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    T next = change(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) next = change(old);
    return old;
}
}  // namespace emulator
inline float atomicAdd(float* p, float v) {
    return emulator::atomic_change(p, [v](float old) { return old + v; });
}
#define EMULATOR_ATOMICS(type)                                                                                  \
    inline type atomicMax(type* p, type v) { return emulator::atomic_change(p, [v](type o) { return max(o, v); }); } \
    inline type atomicMin(type* p, type v) { return emulator::atomic_change(p, [v](type o) { return min(o, v); }); } \
    inline type atomicExch(type* p, type v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }             \
    inline type atomicCAS(type* p, type expected, type v) {                                                     \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
        return expected;                                                                                        \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
inline float atomicExch(float* p, float v) {
    return emulator::atomic_change(p, [v](float) { return v; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    return emulator::atomic_change(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1u; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { emulator_trap("__trap()"); }

// ---- barriers and what the lanes of a warp do together

inline void __syncthreads() { emulator_sync_block(); }

namespace emulator {

struct Vote {
    bool value;
    unsigned result;
};
inline void vote(void* const* slots, unsigned lanes) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (lanes >> lane & 1) result |= (unsigned)static_cast<Vote*>(slots[lane])->value << lane;
    for (unsigned lane = 0; lane < 32; lane++)
        if (lanes >> lane & 1) static_cast<Vote*>(slots[lane])->result = result;
}

template <typename T>
struct Exchange {
    T value;
    unsigned source;
    T result;
};
template <typename T>
inline void exchange(void* const* slots, unsigned lanes) {
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1)) continue;
        auto* own = static_cast<Exchange<T>*>(slots[lane]);
        // A lane that does not take part has no value to give: what comes from it is undefined, so make it show.
        if (own->source < 32 && lanes >> own->source & 1)
            own->result = static_cast<Exchange<T>*>(slots[own->source])->value;
        else
            memset(&own->result, 0xff, sizeof(T));
    }
}
template <typename T>
inline T shuffle(const char* name, unsigned mask, T value, unsigned source) {
    Exchange<T> slot{value, source, value};
    emulator_sync_warp(name, mask, exchange<T>, &slot);
    return slot.result;
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = emulator::all_lanes) {
    emulator_sync_warp("__syncwarp", mask, nullptr, nullptr);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    emulator::Vote slot{value != 0, 0};
    emulator_sync_warp("__ballot_sync", mask, emulator::vote, &slot);
    return slot.result;
}
inline int __any_sync(unsigned mask, int value) {
    emulator::Vote slot{value != 0, 0};
    emulator_sync_warp("__any_sync", mask, emulator::vote, &slot);
    return slot.result != 0;
}
inline int __all_sync(unsigned mask, int value) {
    // Counting those who say no leaves lanes that do not exist out of it.
    emulator::Vote slot{value == 0, 0};
    emulator_sync_warp("__all_sync", mask, emulator::vote, &slot);
    return slot.result == 0;
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned lane = emulator_lane(), first = lane & ~(unsigned)(width - 1);
    return emulator::shuffle("__shfl_sync", mask, value, first | ((unsigned)source & (unsigned)(width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned lane = emulator_lane(), first = lane & ~(unsigned)(width - 1), source = lane ^ (unsigned)bits;
    return emulator::shuffle("__shfl_xor_sync", mask, value, source < first + (unsigned)width ? source : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emulator_lane(), first = lane & ~(unsigned)(width - 1);
    return emulator::shuffle("__shfl_up_sync", mask, value, lane >= first + delta ? lane - delta : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emulator_lane(), end = (lane & ~(unsigned)(width - 1)) + (unsigned)width;
    return emulator::shuffle("__shfl_down_sync", mask, value, lane + delta < end ? lane + delta : lane);
}

// ---- what kernel sources define with PTX for a real GPU

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emulator_mma_bf16(d, a, b); }
inline void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emulator_mma_f16(d, a, b); }
inline void ldmatrix4(unsigned (&r)[4], const void* shared_row) { emulator_ldmatrix4(r, shared_row, false); }
inline void ldmatrix4_transposed(unsigned (&r)[4], const void* shared_row) { emulator_ldmatrix4(r, shared_row, true); }
inline void copy_async16(void* shared, const void* global, bool in_range) {
    emulator_copy_async(shared, global, 16, in_range);
}
inline void copy_async4(void* shared, const void* global) { emulator_copy_async(shared, global, 4, true); }
inline void copy_async8(void* shared, const void* global) { emulator_copy_async(shared, global, 8, true); }
inline void copy_async_commit() { emulator_copy_async_commit(); }
template <int N>
inline void copy_async_wait() {
    emulator_copy_async_wait(N);
}

inline float power_of_two(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
// Kernels of a stream follow each other.
inline void let_next_come() {}
inline void wait_for_previous() {}
inline unsigned bf16_bits(float x) {
    unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned two_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline unsigned two_f16(float low, float high) {
    return (unsigned)float_to_half(low) | (unsigned)float_to_half(high) << 16;
}
inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
// In double, where products and most sums of such elements are exact, so that they are rounded once.
inline unsigned fma_two_bf16(unsigned a, unsigned b, unsigned c) {
    auto one = [](unsigned x) { return (double)__uint_as_float(x << 16); };
    auto fma = [&](unsigned shift) { return (float)(one(a >> shift) * one(b >> shift) + one(c >> shift)); };
    return two_bf16(fma(0), fma(16));
}
inline unsigned fma_two_f16(unsigned a, unsigned b, unsigned c) {
    auto one = [](unsigned x) { return (double)half_to_float((unsigned short)x); };
    auto fma = [&](unsigned shift) { return (float)(one(a >> shift) * one(b >> shift) + one(c >> shift)); };
    return two_f16(fma(0), fma(16));
}

// ---- how the driver calls a kernel

namespace emulator {

template <unsigned... I>
struct Sequence {};
template <unsigned N>
using Numbers = Sequence<__integer_pack(N)...>;
template <typename T>
struct Value {
    using Type = T;
};
template <typename T>
struct Value<const T> {
    using Type = T;
};

// A variable in the module's thread-local memory: touching it makes this thread's copy exist (see engine.cpp).
inline void* shared_anchor() {
    static thread_local char anchor;
    return &anchor;
}

template <auto F>
struct Entry;
template <typename... P, void (*F)(P...)>
struct Entry<F> {
    static constexpr unsigned sizes[] = {sizeof(P)..., 0};
    template <unsigned... I>
    static void spread(void* const* values, Sequence<I...>) {
        F(*static_cast<typename Value<P>::Type*>(values[I])...);
    }
    static void call(void* const* values) { spread(values, Numbers<sizeof...(P)>()); }
    static constexpr Kernel kernel(const char* name, unsigned max_threads) {
        return {name, call, sizeof...(P), sizes, max_threads, shared_anchor};
    }
};

}  // namespace emulator

#endif  // EMULATOR_RUNTIME
