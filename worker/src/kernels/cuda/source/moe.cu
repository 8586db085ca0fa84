// Mixtures of experts: which experts a token goes through, the tokens of each expert, and the sum of what they yield.

struct Routing {
    // Added to the scores for the choice alone; null for none.
    const float* correction;
    int experts, active;
    // Whether the shares of those chosen are made to add up to 1, before they are multiplied by `scale`.
    int normalize;
    float scale;
    // 0 where scores are the softmax. Otherwise they are sigmoids, of so many groups of which `kept` count, at most one to a
    // lane.
    int groups, kept;
};

// logits (tokens, experts): the `active` of the highest scores, ascending, ties to the lowest number, and their shares. One
// warp per token.
extern "C" __global__ void route(float* logits, u32* chosen, float* shares, int tokens, Routing r) {
    const int experts = r.experts, active = r.active;
    int token = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token >= tokens) return;
    float* x = logits + (size_t)token * experts;
    // Groups that count, a bit each, and experts of a group.
    u32 kept = FULL;
    int size = experts;
    if (r.groups == 0) {
        float largest = NEG_INF;
        for (int i = lane; i < experts; i += WARP) largest = fmaxf(largest, x[i]);
        largest = warp_max(largest);
        float total = 0.0f;
        for (int i = lane; i < experts; i += WARP) total += expf(x[i] - largest);
        total = warp_sum(total);
        for (int i = lane; i < experts; i += WARP) x[i] = expf(x[i] - largest) / total;
        __syncwarp();
    } else {
        for (int i = lane; i < experts; i += WARP) x[i] = sigmoid(x[i]);
        __syncwarp();
        size = experts / r.groups;
        float first = NEG_INF, second = NEG_INF;
        if (lane < r.groups)
            for (int i = lane * size; i < (lane + 1) * size; i++) {
                float y = x[i] + (r.correction ? r.correction[i] : 0.0f);
                if (y > first) {
                    second = first;
                    first = y;
                } else if (y > second) {
                    second = y;
                }
            }
        float sum = first + second;
        kept = 0;
        for (int k = 0; k < r.kept; k++) {
            bool there = lane < r.groups && !(kept >> lane & 1);
            float best = there && sum == sum ? sum : NEG_INF;
            int at = there ? lane : WARP;
            for (int offset = WARP / 2; offset > 0; offset /= 2) {
                float other = __shfl_xor_sync(FULL, best, offset);
                int where = __shfl_xor_sync(FULL, at, offset);
                if (where < WARP && (at == WARP || other > best || (other == best && where < at))) {
                    best = other;
                    at = where;
                }
            }
            kept |= 1u << at;
        }
    }
    u32 taken[MAX_ACTIVE];
    for (int slot = 0; slot < active; slot++) {
        // What compares with nothing (NaN) is taken last, but something is always taken.
        float best = NEG_INF;
        int at = experts;
        for (int i = lane; i < experts; i += WARP) {
            bool free = kept >> (i / size) & 1;
            for (int s = 0; s < slot; s++) free = free && taken[s] != (u32)i;
            float y = x[i] + (r.correction ? r.correction[i] : 0.0f);
            if (free && (at == experts || y > best)) {
                best = y == y ? y : NEG_INF;
                at = i;
            }
        }
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(FULL, best, offset);
            int where = __shfl_xor_sync(FULL, at, offset);
            if (where < experts && (at == experts || other > best || (other == best && where < at))) {
                best = other;
                at = where;
            }
        }
        taken[slot] = at;
    }
    if (lane != 0) return;
    float sum = 0.0f;
    for (int i = 1; i < active; i++)
        for (int j = i; j > 0 && taken[j - 1] > taken[j]; j--) {
            u32 other = taken[j];
            taken[j] = taken[j - 1];
            taken[j - 1] = other;
        }
    for (int slot = 0; slot < active; slot++) sum += x[taken[slot]];
    // As transformers, so that nothing is divided by 0.
    if (r.groups) sum += 1e-20f;
    for (int slot = 0; slot < active; slot++) {
        chosen[token * active + slot] = taken[slot];
        shares[token * active + slot] = x[taken[slot]] / (r.normalize ? sum : 1.0f) * r.scale;
    }
}

// Sorts pairs of token and expert by expert: `order` gets them. `tasks` gets what there is to do, at most `rows` rows of one
// expert at a time; there are no more than `most`, and what remains of them are tasks without rows. One block; dynamic
// shared memory holds `experts` words.
extern "C" __global__ void group_pairs(u32* order, Task* tasks, const u32* chosen, int pairs, int experts, int rows, int most) {
    u32* next = (u32*)dynamic_shared;
    for (int e = threadIdx.x; e < experts; e += blockDim.x) next[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) atomicAdd(&next[chosen[i]], 1u);
    __syncthreads();
    if (threadIdx.x < WARP) {
        int lane = threadIdx.x, pairs_before = 0, tasks_before = 0;
        for (int base = 0; base < experts; base += WARP) {
            int e = base + lane;
            int count = e < experts ? next[e] : 0, parts = (count + rows - 1) / rows;
            // Sums up to and with this expert.
            int pairs_end = count, parts_end = parts;
            for (int offset = 1; offset < WARP; offset *= 2) {
                int more_pairs = __shfl_up_sync(FULL, pairs_end, offset), more_parts = __shfl_up_sync(FULL, parts_end, offset);
                if (lane >= offset) {
                    pairs_end += more_pairs;
                    parts_end += more_parts;
                }
            }
            int first = pairs_before + pairs_end - count, at = tasks_before + parts_end - parts;
            if (e < experts) next[e] = first;
            for (int i = 0; i < parts; i++)
                tasks[at + i] = {(u32)e, (u32)(first + i * rows), min(rows, count - i * rows)};
            pairs_before += __shfl_sync(FULL, pairs_end, WARP - 1);
            tasks_before += __shfl_sync(FULL, parts_end, WARP - 1);
        }
        for (int i = tasks_before + lane; i < most; i += WARP) tasks[i] = {0, 0, 0};
    }
    __syncthreads();
    // The order within an expert does not matter: each pair is computed by itself.
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) order[atomicAdd(&next[chosen[i]], 1u)] = i;
}

// What an expert that every token goes through yields (tokens, width), and the logits of its gates (tokens); null for none.
struct SharedExpert {
    const T* rows;
    const float* gates;
};

// out (tokens, width) = or += the sum of each token's pairs (tokens * active, width), by ascending expert, and of what the
// shared expert yields.
extern "C" __global__ void combine_experts(T* out, const T* pairs, const float* shares, SharedExpert shared, int active,
                                           int width, int add) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (i >= width) return;
    float sum = shared.rows ? widen(shared.rows[(size_t)token * width + i]) : 0.0f;
    if (shared.gates) sum *= sigmoid(shared.gates[token]);
    for (int slot = 0; slot < active; slot++) {
        size_t pair = (size_t)token * active + slot;
        sum += shares[pair] * widen(pairs[pair * width + i]);
    }
    T* at = out + (size_t)token * width + i;
    *at = narrowed(add ? widen(*at) + sum : sum);
}
