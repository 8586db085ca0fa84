// The token drawn from each row of logits, so that only tokens leave the GPU. The rule is sampler.rs's, token for token:
// weights are its `exp`, operation by operation, as integers, so that no sum depends on its order; of equal logits the
// lowest token is first; and a draw walks the tokens by id.
//
// Each kernel takes a slice of SLICE tokens of a draw per block (grid: slices, draws). The last block of a draw to
// finish puts together what the slices found, and leaves it in `Drawn` for the kernel after. Rows that a kernel does not
// concern are left at once.

// The most likely token's weight.
#define ONE 1099511627776.0f
#define ALL 0xffffffffu

// What a token is drawn by; the host writes it.
struct Draw {
    // 64 bits of Philox; top-p in parts of 2^64, 0 for none.
    u64 random, top_p;
    // Temperature 0 takes the most likely token.
    float temperature, min_p, repetition, frequency, presence;
    // top_k: 0 for none. row: of logits. Its entries are `biases` tokens with what is added to their logits from `first`
    // on, then `history` tokens with their occurrences in the answer.
    u32 top_k, row, first, biases, history;
    // 0 for no log-probabilities, or one more than the alternatives.
    u32 logprobs, unused;
};

struct Candidate {
    u32 token;
    float logit;
};

// What has been selected: tokens with a larger key, and those with this one up to a token.
struct Kept {
    u32 key, cut;
    __device__ __forceinline__ bool has(u32 other, u32 token) const {
        return other > key || (other == key && token <= cut);
    }
};

// What is known of a draw; the host reads it at the end.
struct Drawn {
    // Sums of weights: of the raw logits at temperature 1, and of what top-p takes its share of.
    u64 raw_sum, total;
    // In a selection: what is left to be found.
    u64 left;
    // The token, and its raw logit.
    u32 token;
    float logit;
    // The first token whose logit is not finite (ALL: none), and that logit.
    u32 broken;
    float value;
    // The largest logits: as they came, and after bias and penalties.
    float raw_max, max;
    Kept kept;
    // In a selection: the bits of the key that are known. Blocks that have finished. Alternatives found.
    u32 prefix, arrived, found, unused;
    Candidate alternatives[MAX_LOGPROBS];
};

struct Sample {
    const Draw* draws;
    Drawn* drawn;
    // (draws, 256): zero between kernels. (draws, slices): what each slice found.
    u64* bins;
    u64* partial;
    Candidate* entries;
    // (rows, vocab); bias and penalties change them.
    float* logits;
    int vocab;
};

// What a selection keeps: the most likely `alternatives`, `top_k`, or as many as weigh `top_p`.
#define SELECT_ALTERNATIVES 0
#define SELECT_TOP_K 1
#define SELECT_TOP_P 2

// An unsigned number that is ordered as the float is; both zeros are one. No finite float has 0 or ALL.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// `e^x` of x <= 0, to the bit what `exp` of math.rs gives: nothing may be fused or approximated.
__device__ __forceinline__ float power(float x) {
    const float SHIFT = 12582912.0f;
    float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), SHIFT);
    float n = __fsub_rn(shifted, SHIFT);
    float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    u32 exponent = __float_as_uint(shifted) - __float_as_uint(SHIFT) + 127u;
    return x < -87.3f ? 0.0f : __fmul_rn(p, __uint_as_float(exponent << 23));
}

// A token's weight as a share of the most likely one's, and as an integer.
__device__ __forceinline__ float share_of(float x, float max, float temperature) {
    return power(__fdiv_rn(__fsub_rn(x, max), temperature));
}
__device__ __forceinline__ u64 fixed(float share) { return (u64)__fmul_rn(share, ONE); }

// `parts` / 2^64 of `total`, rounded down.
__device__ __forceinline__ u64 parts_of(u64 parts, u64 total) { return __umul64hi(parts, total); }

// The sums of all threads before this one.
__device__ __forceinline__ u64 sum_before(u64 x, u64* scratch) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u64 sum = x;
    for (int offset = 1; offset < WARP; offset *= 2) {
        u64 other = __shfl_up_sync(FULL, sum, offset);
        if (lane >= offset) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    u64 before = sum - x;
    for (int i = 0; i < warp; i++) before += scratch[i];
    return before;
}

__device__ __forceinline__ u64 sum_of_block(u64 x, u64* scratch) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    u64 sum = 0;
    for (int i = 0; i < SAMPLE_THREADS / WARP; i++) sum += scratch[i];
    return sum;
}

__device__ __forceinline__ u64 max_of_block(u64 x, u64* scratch) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        u64 other = __shfl_xor_sync(FULL, x, offset);
        x = x > other ? x : other;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    u64 most = 0;
    for (int i = 0; i < SAMPLE_THREADS / WARP; i++) most = scratch[i] > most ? scratch[i] : most;
    return most;
}

// Where a running sum is passed.
struct Passed {
    int index;
    // What is left of the target there.
    u64 left;
};

// The first index at which the sum of `value(0)`, `value(1)`, … `value(count - 1)` is more than `target`, which all of it
// must be. For all threads.
template <class F>
__device__ __forceinline__ Passed where_passed(int count, u64 target, F value) {
    __shared__ u64 scratch[SAMPLE_THREADS / WARP];
    __shared__ Passed passed;
    int each = (count + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    int from = min((int)threadIdx.x * each, count), to = min(from + each, count);
    u64 sum = 0;
    for (int i = from; i < to; i++) sum += value(i);
    u64 before = sum_before(sum, scratch);
    if (before <= target && target < before + sum) {
        int i = from;
        u64 left = target - before;
        for (u64 next = value(i); left >= next; next = value(i)) {
            left -= next;
            i++;
        }
        passed = {i, left};
    }
    __syncthreads();
    return passed;
}

// Whether this block is the last of its draw to come here; it sees what the others wrote before.
__device__ __forceinline__ bool is_last(Drawn& drawn) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&drawn.arrived, 1u) == gridDim.x - 1;
        if (last) drawn.arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Ends a draw. The raw logit of a token that was changed lies in its entries, that of a bias first.
__device__ __forceinline__ void settle(const Sample& s, const Draw& draw, Drawn& drawn, u32 token) {
    __shared__ u32 at;
    u32 count = draw.biases + draw.history;
    if (threadIdx.x == 0) at = ALL;
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += SAMPLE_THREADS)
        if (s.entries[draw.first + i].token == token) atomicMin(&at, i);
    __syncthreads();
    if (threadIdx.x == 0) {
        drawn.token = token;
        drawn.logit = at == ALL ? s.logits[(size_t)draw.row * s.vocab + token] : s.entries[draw.first + at].logit;
    }
}

// The largest logit, or the first that is not finite; with it, a draw at temperature 0 is at its end. First of all draws,
// then of those whose logits were changed.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_scan(Sample s, int is_changed) {
    __shared__ u64 scratch[SAMPLE_THREADS / WARP];
    const Draw& draw = s.draws[blockIdx.y];
    Drawn& drawn = s.drawn[blockIdx.y];
    if (is_changed && (draw.biases + draw.history == 0 || drawn.broken != ALL)) return;
    const float* x = s.logits + (size_t)draw.row * s.vocab;
    u64* partial = s.partial + (size_t)blockIdx.y * gridDim.x;
    // Key and complement of the token in one number: the largest is the first of the largest, or of the broken ones.
    u64 most = 0;
    int end = min(((int)blockIdx.x + 1) * SLICE, s.vocab);
    for (int i = blockIdx.x * SLICE + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        float logit = x[i];
        u64 packed = (u64)(isfinite(logit) ? ordered(logit) : ALL) << 32 | ~(u32)i;
        most = packed > most ? packed : most;
    }
    most = max_of_block(most, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = most;
    if (!is_last(drawn)) return;
    most = 0;
    for (int i = threadIdx.x; i < (int)gridDim.x; i += SAMPLE_THREADS) {
        u64 other = __ldcg(&partial[i]);
        most = other > most ? other : most;
    }
    most = max_of_block(most, scratch);
    u32 token = ~(u32)most;
    bool is_broken = (u32)(most >> 32) == ALL;
    float logit = x[token];
    if (threadIdx.x == 0) {
        if (!is_changed) {
            drawn.broken = is_broken ? token : ALL;
            drawn.value = logit;
            drawn.raw_max = logit;
            drawn.found = 0;
        }
        drawn.max = logit;
        drawn.kept = {0, ALL};
    }
    settle(s, draw, drawn, token);
}

// Adds biases, then applies penalties; the entries keep what was there. One block per draw.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_adjust(Sample s) {
    const Draw& draw = s.draws[blockIdx.x];
    if (s.drawn[blockIdx.x].broken != ALL) return;
    const float LARGEST = __uint_as_float(0x7f7fffffu);
    float* x = s.logits + (size_t)draw.row * s.vocab;
    Candidate* biases = s.entries + draw.first;
    for (u32 i = threadIdx.x; i < draw.biases; i += SAMPLE_THREADS) {
        u32 token = biases[i].token;
        if (token >= (u32)s.vocab) continue;
        float logit = x[token];
        x[token] = fminf(fmaxf(__fadd_rn(logit, biases[i].logit), -LARGEST), LARGEST);
        biases[i].logit = logit;
    }
    __syncthreads();
    Candidate* history = biases + draw.biases;
    for (u32 i = threadIdx.x; i < draw.history; i += SAMPLE_THREADS) {
        u32 token = history[i].token, count = __float_as_uint(history[i].logit);
        if (token >= (u32)s.vocab) continue;
        float logit = x[token];
        float changed = logit > 0.0f ? __fdiv_rn(logit, draw.repetition) : __fmul_rn(logit, draw.repetition);
        changed = fminf(fmaxf(changed, -LARGEST), LARGEST);
        if (count > 0) {
            float frequency = __fmul_rn(draw.frequency, (float)count);
            changed = __fsub_rn(__fsub_rn(changed, frequency), draw.presence);
            changed = fminf(fmaxf(changed, -LARGEST), LARGEST);
        }
        x[token] = changed;
        history[i].logit = logit;
    }
}

#define MASS_RAW 0
#define MASS_TOTAL 1
#define MASS_DRAW 2

// The weight of all tokens for log-probabilities (MASS_RAW), of those that top-k keeps for top-p (MASS_TOTAL), or of all
// that are kept, and the draw among them (MASS_DRAW).
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_mass(Sample s, int what) {
    __shared__ u64 scratch[SAMPLE_THREADS / WARP];
    const Draw& draw = s.draws[blockIdx.y];
    Drawn& drawn = s.drawn[blockIdx.y];
    bool concerned = what == MASS_RAW ? draw.logprobs > 0
                                      : draw.temperature > 0.0f && (what == MASS_DRAW || draw.top_p != 0);
    if (!concerned || drawn.broken != ALL) return;
    const float* x = s.logits + (size_t)draw.row * s.vocab;
    u64* partial = s.partial + (size_t)blockIdx.y * gridDim.x;
    float temperature = what == MASS_RAW ? 1.0f : draw.temperature;
    float least = what == MASS_DRAW ? draw.min_p : 0.0f, max = drawn.max;
    Kept kept = drawn.kept;
    auto weight = [&](int i) -> u64 {
        float logit = x[i];
        if (what != MASS_RAW && !kept.has(ordered(logit), i)) return 0;
        float share = share_of(logit, max, temperature);
        return share >= least ? fixed(share) : 0;
    };
    u64 sum = 0;
    int end = min(((int)blockIdx.x + 1) * SLICE, s.vocab);
    for (int i = blockIdx.x * SLICE + threadIdx.x; i < end; i += SAMPLE_THREADS) sum += weight(i);
    sum = sum_of_block(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
    if (!is_last(drawn)) return;
    sum = 0;
    for (int i = threadIdx.x; i < (int)gridDim.x; i += SAMPLE_THREADS) sum += __ldcg(&partial[i]);
    sum = sum_of_block(sum, scratch);
    if (what == MASS_DRAW) {
        Passed slice = where_passed(gridDim.x, parts_of(draw.random, sum), [&](int i) { return __ldcg(&partial[i]); });
        int first = slice.index * SLICE;
        Passed token = where_passed(min(SLICE, s.vocab - first), slice.left, [&](int i) { return weight(first + i); });
        settle(s, draw, drawn, first + token.index);
    } else if (threadIdx.x == 0) {
        (what == MASS_RAW ? drawn.raw_sum : drawn.total) = sum;
    }
}

__device__ __forceinline__ bool is_selected(const Sample& s, const Draw& draw, const Drawn& drawn, int what) {
    if (drawn.broken != ALL) return false;
    if (what == SELECT_ALTERNATIVES) return draw.logprobs > 1;
    if (draw.temperature == 0.0f) return false;
    return what == SELECT_TOP_K ? draw.top_k > 0 && draw.top_k < (u32)s.vocab : draw.top_p != 0;
}

// Finds the next eight bits of the smallest key that is kept, from the bit `shift` on: 24, 16, 8 and 0 in turn.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_bins(Sample s, int what, int shift) {
    // Two words per sum.
    __shared__ u32 low[256], high[256];
    const Draw& draw = s.draws[blockIdx.y];
    Drawn& drawn = s.drawn[blockIdx.y];
    if (!is_selected(s, draw, drawn, what)) return;
    const float* x = s.logits + (size_t)draw.row * s.vocab;
    u64* bins = s.bins + (size_t)blockIdx.y * 256;
    u64 left = drawn.left, light = 0;
    u32 prefix = shift == 24 ? 0 : drawn.prefix;
    float max = drawn.max, temperature = draw.temperature;
    Kept kept = drawn.kept;
    if (what == SELECT_TOP_P) {
        u64 share = parts_of(draw.top_p, drawn.total), needed = share > 0 ? share : 1;
        // What is lighter may be left out, all of it together.
        light = (drawn.total - needed) / (u64)s.vocab;
        if (shift == 24) left = needed;
    } else if (shift == 24) {
        left = what == SELECT_TOP_K ? draw.top_k : min(min(draw.logprobs - 1u, (u32)MAX_LOGPROBS), (u32)s.vocab);
    }
    low[threadIdx.x] = 0;
    high[threadIdx.x] = 0;
    __syncthreads();
    int end = min(((int)blockIdx.x + 1) * SLICE, s.vocab);
    for (int i = blockIdx.x * SLICE + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        u32 key = ordered(x[i]), bin = key >> shift & 255u;
        if (shift < 24 && (key ^ prefix) >> (shift + 8)) continue;
        if (what != SELECT_TOP_P) {
            atomicAdd(&low[bin], 1u);
            continue;
        }
        if (!kept.has(key, i)) continue;
        u64 weight = fixed(share_of(x[i], max, temperature));
        if (weight == 0 || weight < light) continue;
        u32 word = (u32)weight, old = atomicAdd(&low[bin], word);
        u32 upper = (u32)(weight >> 32) + (old + word < old);
        if (upper) atomicAdd(&high[bin], upper);
    }
    __syncthreads();
    u64 sum = (u64)high[threadIdx.x] << 32 | low[threadIdx.x];
    if (sum) atomicAdd(&bins[threadIdx.x], sum);
    if (!is_last(drawn)) return;
    Passed bin = where_passed(256, left - 1, [&](int i) { return __ldcg(&bins[255 - i]); });
    bins[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        drawn.prefix = prefix | (u32)(255 - bin.index) << shift;
        drawn.left = bin.left + 1;
    }
}

// Ends a selection: of the tokens with the smallest key that is kept, the lowest, as many as are needed.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_ties(Sample s, int what) {
    __shared__ u64 scratch[SAMPLE_THREADS / WARP];
    const Draw& draw = s.draws[blockIdx.y];
    Drawn& drawn = s.drawn[blockIdx.y];
    if (!is_selected(s, draw, drawn, what)) return;
    const float* x = s.logits + (size_t)draw.row * s.vocab;
    u64* partial = s.partial + (size_t)blockIdx.y * gridDim.x;
    u32 key = drawn.prefix;
    u64 needed = drawn.left;
    if (what == SELECT_TOP_P) {
        // All of them weigh the same.
        u64 weight = fixed(share_of(unordered(key), drawn.max, draw.temperature));
        needed = (needed + weight - 1) / weight;
    }
    auto is_tied = [&](int i) -> u64 { return ordered(x[i]) == key; };
    u64 count = 0;
    int end = min(((int)blockIdx.x + 1) * SLICE, s.vocab);
    for (int i = blockIdx.x * SLICE + threadIdx.x; i < end; i += SAMPLE_THREADS) count += is_tied(i);
    count = sum_of_block(count, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = count;
    if (!is_last(drawn)) return;
    Passed slice = where_passed(gridDim.x, needed - 1, [&](int i) { return __ldcg(&partial[i]); });
    int first = slice.index * SLICE;
    Passed token = where_passed(min(SLICE, s.vocab - first), slice.left, [&](int i) { return is_tied(first + i); });
    if (threadIdx.x == 0) {
        drawn.kept = {key, (u32)(first + token.index)};
    }
}

// Collects the alternatives that were selected, best first; then all tokens are kept again.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_alternatives(Sample s) {
    __shared__ Candidate all[MAX_LOGPROBS];
    const Draw& draw = s.draws[blockIdx.y];
    Drawn& drawn = s.drawn[blockIdx.y];
    if (!is_selected(s, draw, drawn, SELECT_ALTERNATIVES)) return;
    const float* x = s.logits + (size_t)draw.row * s.vocab;
    Kept kept = drawn.kept;
    int end = min(((int)blockIdx.x + 1) * SLICE, s.vocab);
    for (int i = blockIdx.x * SLICE + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        float logit = x[i];
        if (!kept.has(ordered(logit), i)) continue;
        u32 place = atomicAdd(&drawn.found, 1u);
        if (place < MAX_LOGPROBS) drawn.alternatives[place] = {(u32)i, logit};
    }
    if (!is_last(drawn)) return;
    int count = min(min(draw.logprobs - 1u, (u32)MAX_LOGPROBS), (u32)s.vocab);
    if ((int)threadIdx.x < count) {
        const Candidate* mine = &drawn.alternatives[threadIdx.x];
        all[threadIdx.x] = {__ldcg(&mine->token), __ldcg(&mine->logit)};
    }
    __syncthreads();
    if ((int)threadIdx.x < count) {
        Candidate mine = all[threadIdx.x];
        int place = 0;
        for (int i = 0; i < count; i++)
            place += all[i].logit > mine.logit || (all[i].logit == mine.logit && all[i].token < mine.token);
        drawn.alternatives[place] = mine;
    }
    if (threadIdx.x == 0) drawn.kept = {0, ALL};
}
