// The most likely tokens of each row of logits, so that only these leave the device.

// An unsigned number that is ordered as the float is; both zeros are one.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Candidate {
    u32 token;
    float logit;
};

#define MAX_CANDIDATES 64
#define BINS 2048

__device__ __forceinline__ Candidate better_of_warp(Candidate best) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        float logit = __shfl_xor_sync(FULL, best.logit, offset);
        u32 token = __shfl_xor_sync(FULL, best.token, offset);
        if (logit > best.logit || (logit == best.logit && token < best.token)) best = {token, logit};
    }
    return best;
}

// For each row of logits (rows, vocab): its `wanted[row]` (at most 64) largest, best first, ties to the lowest token.
// `broken[row]` is the first token whose logit is not finite, or `vocab`. One block of 1024 threads per row.
extern "C" __global__ void __launch_bounds__(1024) top_candidates(Candidate* out, u32* broken, const float* logits,
                                                                  const u32* wanted, int vocab) {
    __shared__ u32 bins[BINS];
    __shared__ u32 first_broken, at_least, needed, found;
    __shared__ Candidate kept[MAX_CANDIDATES];
    const float* x = logits + (size_t)blockIdx.x * vocab;
    int want = min((int)wanted[blockIdx.x], vocab);
    if (want == 0) return;
    if (threadIdx.x == 0) {
        first_broken = vocab;
        at_least = 0;
        needed = want;
        found = 0;
    }
    __syncthreads();
    u32 bad = vocab;
    Candidate best = {(u32)vocab, NEG_INF};
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float logit = x[i];
        if (!isfinite(logit)) bad = min(bad, (u32)i);
        if (logit > best.logit) best = {(u32)i, logit};
    }
    if (bad < (u32)vocab) atomicMin(&first_broken, bad);
    if (want == 1) {
        // The warps' best, then the best of these.
        best = better_of_warp(best);
        if (threadIdx.x % WARP == 0) kept[threadIdx.x / WARP] = best;
        __syncthreads();
        if (threadIdx.x < WARP) {
            best = better_of_warp(threadIdx.x < blockDim.x / WARP ? kept[threadIdx.x] : Candidate{(u32)vocab, NEG_INF});
            if (threadIdx.x == 0) {
                out[(size_t)blockIdx.x * MAX_CANDIDATES] = best;
                broken[blockIdx.x] = first_broken;
            }
        }
        return;
    }
    // The smallest key that is taken, 11, 11 and 10 bits at a time.
    for (int pass = 0; pass < 3; pass++) {
        int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        u32 mask = pass == 2 ? 1023u : 2047u;
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        u32 prefix = at_least;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            u32 key = ordered(x[i]);
            bool same = pass == 0 || (key >> (shift + (pass == 2 ? 10 : 11))) == (prefix >> (shift + (pass == 2 ? 10 : 11)));
            if (same) atomicAdd(&bins[(key >> shift) & mask], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 left = needed;
            int bin = (int)mask;
            while (bin > 0 && bins[bin] < left) left -= bins[bin--];
            needed = left;
            at_least = prefix | ((u32)bin << shift);
        }
        __syncthreads();
    }
    // All that are larger, in any order; of those that are equal, the lowest tokens.
    u32 least = at_least, larger = want - needed;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x)
        if (ordered(x[i]) > least) kept[atomicAdd(&found, 1u)] = {(u32)i, x[i]};
    __syncthreads();
    if (threadIdx.x < WARP) {
        u32 count = 0;
        for (int first = 0; first < vocab && count < needed; first += WARP) {
            int i = first + threadIdx.x;
            bool equal = i < vocab && ordered(x[i]) == least;
            u32 votes = __ballot_sync(FULL, equal);
            u32 place = count + __popc(votes & ((1u << threadIdx.x) - 1u));
            if (equal && place < needed) kept[larger + place] = {(u32)i, x[i]};
            count += __popc(votes);
        }
    }
    __syncthreads();
    // Each finds its place.
    if ((int)threadIdx.x < want) {
        Candidate mine = kept[threadIdx.x];
        int place = 0;
        for (int i = 0; i < want; i++) {
            Candidate other = kept[i];
            place += other.logit > mine.logit || (other.logit == mine.logit && other.token < mine.token);
        }
        out[(size_t)blockIdx.x * MAX_CANDIDATES + place] = mine;
    }
    if (threadIdx.x == 0) broken[blockIdx.x] = first_broken;
}
