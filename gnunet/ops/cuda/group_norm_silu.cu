// silu(group_norm(x)) and its gradients, reading x (and dy) from memory once.
//
// A cluster of RANKS thread blocks takes a block of whole groups of one sample, and each of them a part of its
// positions. What it reads it keeps in shared memory until it writes the result. Sums are added over a thread's
// elements, the threads of a thread block and the ranks of the cluster, through distributed shared memory, in an order
// that depends on nothing but a sample's shape. Vectors that find no place in shared memory are read again instead.
//
// A tensor is (N, S, C) in memory where CHANNELS_LAST, else (N, C, S): S positions, C channels. Every thread has a
// fixed set of a block's channels, VECTOR adjacent ones or one, and every ROWS-th step: a step is a position, or VECTOR
// adjacent ones. A thread reads from shared memory only what it has put there.
//
// The names are those of the Triton kernels: u = x + add, d = u - mean, w = d * rstd * weight_eff + bias_eff,
// y = silu(w); dw is the gradient of w. Without CENTER the mean is 0. The source needs no headers. Names in capitals
// are defined by `launch.py`, from the plan in `tiling.py`; in host_shim.h, which runs the kernels on a CPU, they are
// members of `p`, the parameters.
#ifdef HOST_SHIM
#include "host_shim.h"
#else
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define MAX_CHANNELS CHANNELS_OF_THREAD
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define ASM asm volatile

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Copies that the thread waits for later. There are none of 2 bytes: those are done at once.
DEVICE void copy_async(void* to, const void* from, int bytes) {
    const u32 at = shared_address(to);
    if (bytes == 16) ASM("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    if (bytes == 8) ASM("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
    if (bytes == 4) ASM("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
    if (bytes == 2) *(u16*)to = *(const u16*)from;
}
DEVICE void commit_copies() { ASM("cp.async.commit_group;" ::: "memory"); }
DEVICE void wait_for_copies(int but) {  // the last ones that were committed
    if (but == 0) ASM("cp.async.wait_group 0;" ::: "memory");
    if (but == 1) ASM("cp.async.wait_group 1;" ::: "memory");
    if (but == 2) ASM("cp.async.wait_group 2;" ::: "memory");
    if (but >= 3) ASM("cp.async.wait_group 3;" ::: "memory");
}

#if __CUDA_ARCH__ >= 900
DEVICE void cluster_begin() { ASM("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_arrive() { ASM("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { ASM("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void store_to_rank(float* at, u32 rank, float value) {
    u32 there;
    ASM("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(rank));
    ASM("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}
#else  // there are no clusters, and RANKS is 1
DEVICE void cluster_begin() {}
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
DEVICE void store_to_rank(float* at, u32, float value) { *at = value; }
#endif

DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float from_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE u32 to_halves(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
DEVICE u32 to_bfloats(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

// Types; 0 is that of a tensor that is not given.
#define FLOAT32 1
#define BFLOAT16 2
#define FLOAT16 3
#define FLOAT64 4  // of parameters alone

// What follows from the plan.
#define BYTES (VECTOR * (X_TYPE == FLOAT32 ? 4 : 2))
#define GROUP (CHANNELS / NUM_GROUPS)
#define GROUPS (WIDTH / GROUP)
#define BLOCKS (NUM_GROUPS / GROUPS)
#define CHANNELS_OF_THREAD (CHANNELS_LAST ? VECTOR : 1)
// Of pieces of `size` that one piece of `length` overlaps, both laid end to end from 0.
#define MOST_TOUCHED(length, size) \
    ((length) % (size) == 0 ? (length) / (size) : (size) % (length) == 0 ? 1 : ((length) + (size) - 2) / (size) + 1)
// The most groups that the channels of a thread are of, and threads that the channels of a group have.
#define SPAN MOST_TOUCHED(CHANNELS_OF_THREAD, GROUP)
#define LANES_OF_GROUP MOST_TOUCHED(GROUP, CHANNELS_OF_THREAD)
// Of FOLD rows the sums are added within a warp.
#define FOLDED_ROWS (ROWS / FOLD)
// Numbers of one kind that threads put down in forward.
#define MOMENTS (SPAN * ROWS * LANES)
// Threads that add up the sums of a group together.
#define TEAM (GROUPS * 32 <= THREADS ? 32 : GROUPS * 16 <= THREADS ? 16 : GROUPS * 8 <= THREADS ? 8 : 4)
#define NEED_AFFINE (NEED_SUMS && (p.dweight || p.dbias))
#define STAGES 4
// Steps that are computed at a time.
#ifdef BACKWARD
#define UNROLLED 1
#else
#define UNROLLED (CHANNELS_LAST ? 2 : 4)
#endif
// Of a thread block that adds up the sums of samples.
#define CHANNELS_AT_ONCE 32
#define SAMPLES_AT_ONCE 16

struct Params {
    const void *x, *dy, *weight, *bias, *add, *scale, *shift;
    void* result;  // y, or dx
    float* stats;  // mean and rstd, or rstd alone, of the groups of N samples
    void *dweight, *dbias, *dadd, *dscale, *dshift;
    float* sums;  // of dw and dw * d * rstd for each sample's channels, (2, N, C), where there are several samples
    i64 samples, add_stride, scale_stride, shift_stride;
    float eps;
    int positions;
    int held_x, held_dy;  // vectors of each thread that find a place in shared memory
#ifdef HOST_SHIM
    const int* constants;
};
#else
};
static_assert(sizeof(Params) == 168, "launch.py packs it");
#endif

struct Vector {
    u32 words[4];
};
struct __align__(16) Words4 {
    u32 words[4];
};
struct __align__(8) Words2 {
    u32 words[2];
};

DEVICE Vector load_vector(const void* at, int bytes) {
    Vector v;
    if (bytes == 16) {
        const Words4 found = *(const Words4*)at;
        for (int i = 0; i < 4; ++i) v.words[i] = found.words[i];
    } else if (bytes == 8) {
        const Words2 found = *(const Words2*)at;
        for (int i = 0; i < 2; ++i) v.words[i] = found.words[i];
    } else {
        v.words[0] = bytes == 4 ? *(const u32*)at : *(const u16*)at;
    }
    return v;
}
DEVICE void store_vector(void* at, const Vector& v, int bytes) {
    if (bytes == 16) {
        Words4 given;
        for (int i = 0; i < 4; ++i) given.words[i] = v.words[i];
        *(Words4*)at = given;
    } else if (bytes == 8) {
        Words2 given;
        for (int i = 0; i < 2; ++i) given.words[i] = v.words[i];
        *(Words2*)at = given;
    } else if (bytes == 4) {
        *(u32*)at = v.words[0];
    } else {
        *(u16*)at = (u16)v.words[0];
    }
}
DEVICE float element(const Vector& v, int i, int type) {
    if (type == FLOAT32) return __uint_as_float(v.words[i]);
    const u32 word = v.words[i / 2];
    if (type == BFLOAT16) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    return from_half((u16)(i % 2 ? word >> 16 : word));
}
DEVICE u32 pack(float low, float high, int type) {
    return type == BFLOAT16 ? to_bfloats(low, high) : to_halves(low, high);
}
DEVICE float load(const void* at, i64 i, int type) {
    if (type == FLOAT32) return ((const float*)at)[i];
    if (type == FLOAT64) return (float)((const double*)at)[i];
    const u16 bits = ((const u16*)at)[i];
    return type == BFLOAT16 ? __uint_as_float((u32)bits << 16) : from_half(bits);
}
DEVICE void store(void* at, i64 i, float value, int type) {
    if (type == FLOAT32)
        ((float*)at)[i] = value;
    else if (type == FLOAT64)
        ((double*)at)[i] = value;
    else
        ((u16*)at)[i] = (u16)pack(value, 0.0f, type);
}

// How many steps a rank takes.
DEVICE int steps_of_rank(const Params& p, int rank) {
    const int all = CHANNELS_LAST ? p.positions : p.positions / VECTOR, part = (all + RANKS - 1) / RANKS;
    return max(0, min(part, all - rank * part));
}

// A thread's share of a block of groups.
struct Share {
    int rank, lane, row, channel, block, steps;
    bool is_active;
    i64 n, first, stride;  // elements: its first one, and from one step to the next

    DEVICE explicit Share(const Params& p) {
        rank = blockIdx.x % RANKS;
        block = blockIdx.x / RANKS % BLOCKS;
        n = blockIdx.x / RANKS / BLOCKS;
        const int thread = threadIdx.x;
        lane = CHANNELS_LAST ? thread % LANES : thread / ROWS;
        row = CHANNELS_LAST ? thread / LANES : thread % ROWS;
        is_active = thread < LANES * ROWS;
        channel = block * WIDTH + lane * CHANNELS_OF_THREAD;
        const int size = steps_of_rank(p, rank);
        steps = is_active && size > row ? (size - row + ROWS - 1) / ROWS : 0;
        const int start = rank * steps_of_rank(p, 0) + row;
        first = CHANNELS_LAST ? (n * p.positions + start) * CHANNELS + channel
                              : (n * CHANNELS + channel) * p.positions + start * VECTOR;
        stride = (i64)ROWS * (CHANNELS_LAST ? CHANNELS : VECTOR);
    }
    // The group of this thread's channel j, counted from that of the first one.
    DEVICE int slot(const Params& p, int j) const {
        if (CHANNELS_OF_THREAD % GROUP == 0) return j / GROUP;
        const int in_group = lane * CHANNELS_OF_THREAD % GROUP + j;
        int found = 0;
        for (int k = 1; k < SPAN; ++k) found += in_group >= k * GROUP;
        return found;
    }
    // The same, counted from the block's first.
    DEVICE int group(const Params& p, int j) const { return lane * CHANNELS_OF_THREAD / GROUP + slot(p, j); }
};

// One of the tensors that are read, and where a thread's vectors of it are held.
struct Held {
    const char* from;
    unsigned char* slab;
    i64 stride;
    int held;

    DEVICE Held(const Params& p, const Share& share, const void* tensor, unsigned char* slab, int held)
        : from((const char*)tensor + share.first * (BYTES / VECTOR)),
          slab(slab + threadIdx.x * BYTES),
          stride(share.stride * (BYTES / VECTOR)),
          held(held) {}
    DEVICE bool holds(const Params& p, int step) const { return FITS || step < held; }
    DEVICE Vector at(const Params& p, int step) const {
        return holds(p, step) ? load_vector(slab + step * (THREADS * BYTES), BYTES)
                              : load_vector(from + step * stride, BYTES);
    }
    DEVICE void put(const Params& p, int step, const Vector& v) {
        store_vector(slab + step * (THREADS * BYTES), v, BYTES);
    }
};

// Of a thread's channels.
struct Affine {
    float weight[MAX_CHANNELS], bias[MAX_CHANNELS], add[MAX_CHANNELS];

    DEVICE Affine(const Params& p, const Share& share) {
        for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
            weight[j] = 1.0f;
            bias[j] = add[j] = 0.0f;
            if (!share.is_active) continue;
            const int c = share.channel + j;
            if (WEIGHT_TYPE) weight[j] = load(p.weight, c, WEIGHT_TYPE);
            if (BIAS_TYPE) bias[j] = load(p.bias, c, BIAS_TYPE);
            if (SCALE_TYPE) {
                const float one_plus_scale = 1.0f + load(p.scale, share.n * p.scale_stride + c, SCALE_TYPE);
                weight[j] *= one_plus_scale;
                bias[j] *= one_plus_scale;
            }
            if (SHIFT_TYPE) bias[j] += load(p.shift, share.n * p.shift_stride + c, SHIFT_TYPE);
            if (ADD_TYPE) add[j] = load(p.add, share.n * p.add_stride + c, ADD_TYPE);
        }
    }
};

// The part of shared memory that is no slab; `partial` and `gathered` are written by other ranks, too.
struct Scratch {
    float *thread_sums, *partial, *stat, *origin, *gathered;

    DEVICE Scratch(const Params& p, unsigned char* shared) {
        thread_sums = (float*)(shared + (p.held_x + p.held_dy) * (THREADS * BYTES));
        partial = thread_sums + THREAD_SUMS;
        stat = partial + 2 * RANKS * GROUPS;
        origin = stat + 2 * GROUPS;
        gathered = origin + GROUPS;
    }
    // The groups' quantity q of a rank.
    DEVICE float* of_rank(const Params& p, int q, int rank) const { return partial + (q * RANKS + rank) * GROUPS; }
};

DEVICE void synchronize(const Params& p) {
    if (RANKS == 1) {
        __syncthreads();
    } else {
        cluster_arrive();
        cluster_wait();
    }
}

// Over the rows that a warp has of the same channels.
DEVICE float fold(const Params& p, float value) {
    const int next = CHANNELS_LAST ? LANES : 1;
    for (int distance = next; distance < next * FOLD; distance *= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Puts sums of this thread's channels where `add_groups` finds those of its groups.
DEVICE void put_sums(const Params& p, const Share& share, const Scratch& scratch, int q, const float* of_channels) {
#pragma unroll
    for (int k = 0; k < SPAN; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < CHANNELS_OF_THREAD; ++j) sum += share.slot(p, j) == k ? of_channels[j] : 0.0f;
        sum = fold(p, sum);
        if (share.is_active && share.row % FOLD == 0)
            scratch.thread_sums[((q * SPAN + k) * FOLDED_ROWS + share.row / FOLD) * LANES + share.lane] = sum;
    }
}

// Over the threads of a team, which is a warp or a power of two of its threads.
DEVICE float team_sum(const Params& p, float value) {
    for (int distance = TEAM / 2; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Calls body(at) for what the threads with channels of a group have put down, by turns of a team's threads.
template <class Body>
DEVICE void for_group(const Params& p, int group, int rows, const Body& body) {
    if (group >= GROUPS) return;
    const int first = group * GROUP / CHANNELS_OF_THREAD;
    const int lanes = (group * GROUP + GROUP - 1) / CHANNELS_OF_THREAD - first + 1;
#pragma unroll 1
    for (int e = threadIdx.x % TEAM; e < rows * LANES_OF_GROUP; e += TEAM) {
        const int row = e / LANES_OF_GROUP, lane = first + e % LANES_OF_GROUP;
        const int slot = group - lane * CHANNELS_OF_THREAD / GROUP;
        if (lane < first + lanes) body((slot * rows + row) * LANES + lane);
    }
}

// Sends a number of a group, the same in all threads of a team, to all ranks.
DEVICE void send(const Params& p, const Scratch& scratch, int rank, int q, int group, float value) {
    if (group >= GROUPS) return;
    float* to = scratch.of_rank(p, q, rank) + group;
    for (int other = threadIdx.x % TEAM; other < RANKS; other += TEAM) {
        if (RANKS == 1)
            *to = value;
        else
            store_to_rank(to, other, value);
    }
}

// Adds up the two quantities of each group over this thread block, a team for each group, and sends them to all ranks.
DEVICE void add_groups(const Params& p, const Share& share, const Scratch& scratch) {
#pragma unroll 1
    for (int first = 0; first < GROUPS; first += THREADS / TEAM) {
        const int group = first + threadIdx.x / TEAM;
        const float* const sums = scratch.thread_sums;
        float of_dw = 0.0f, of_dw_d = 0.0f;
        for_group(p, group, FOLDED_ROWS, [&](int at) {
            of_dw += sums[at];
            of_dw_d += sums[SPAN * FOLDED_ROWS * LANES + at];
        });
        send(p, scratch, share.rank, 0, group, team_sum(p, of_dw));
        send(p, scratch, share.rank, 1, group, team_sum(p, of_dw_d));
    }
}

DEVICE float total(const Params& p, const Scratch& scratch, int q, int group) {
    float sum = 0.0f;
    for (int rank = 0; rank < RANKS; ++rank) sum += scratch.of_rank(p, q, rank)[group];
    return sum;
}

DEVICE float u_at(const Params& p, const Share& share, int c, int position) {
    const i64 at = CHANNELS_LAST ? (share.n * p.positions + position) * CHANNELS + c
                                 : (share.n * CHANNELS + c) * p.positions + position;
    return load(p.x, at, X_TYPE) + (ADD_TYPE ? load(p.add, share.n * p.add_stride + c, ADD_TYPE) : 0.0f);
}

// The value that the mean of each group is counted from: the median of three elements, which a single one that is far
// off does not move.
DEVICE void choose_origins(const Params& p, const Share& share, const Scratch& scratch) {
#pragma unroll 1
    for (int group = threadIdx.x; group < GROUPS; group += THREADS) {
        const int c = share.block * WIDTH + group * GROUP;
        const float first = u_at(p, share, c, 0), middle = u_at(p, share, c + GROUP / 2, p.positions / 2);
        const float last = u_at(p, share, c + GROUP - 1, p.positions - 1);
        scratch.origin[group] = max(min(first, middle), min(max(first, middle), last));
    }
}

// Of this thread's elements of each group: their number, the pivot, their mean, counted from it, and the sum of squared
// differences from the mean; from sums over its channels.
DEVICE void put_moments(
    const Params& p, const Share& share, const Scratch& scratch, const float* sums, const float* squares,
    const float* pivots) {
#pragma unroll
    for (int k = 0; k < SPAN; ++k) {
        float sum = 0.0f, square = 0.0f, count = 0.0f, pivot = 0.0f;
#pragma unroll
        for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
            const bool is_of_group = share.slot(p, j) == k;
            sum += is_of_group ? sums[j] : 0.0f;
            square += is_of_group ? squares[j] : 0.0f;
            count += is_of_group ? 1.0f : 0.0f;
            pivot = is_of_group ? pivots[j] : pivot;
        }
        count *= share.steps * (CHANNELS_LAST ? 1 : VECTOR);
        const float mean = count > 0.0f ? __fdividef(sum, count) : 0.0f;
        if (!share.is_active) continue;
        float* to = scratch.thread_sums + (k * ROWS + share.row) * LANES + share.lane;
        to[0] = count;
        to[MOMENTS] = pivot;
        to[2 * MOMENTS] = mean;
        to[3 * MOMENTS] = square - sum * mean;
    }
}

// The mean of a thread block's elements of each group, counted from the origin, and the sum of squared differences from
// it, by a team for each; sent to all ranks.
DEVICE void add_moments(const Params& p, const Share& share, const Scratch& scratch) {
#pragma unroll 1
    for (int start = 0; start < GROUPS; start += THREADS / TEAM) {
        const int group = start + threadIdx.x / TEAM;
        const float* const sums = scratch.thread_sums;
        const float origin = CENTER && group < GROUPS ? scratch.origin[group] : 0.0f;
        float count = 0.0f, mean = 0.0f, square = 0.0f;
        for_group(p, group, ROWS, [&](int at) {
            count += sums[at];
            mean += sums[at] * (sums[MOMENTS + at] - origin + sums[2 * MOMENTS + at]);
        });
        count = team_sum(p, count);
        mean = team_sum(p, mean);
        mean = count > 0.0f ? __fdividef(mean, count) : 0.0f;
        for_group(p, group, ROWS, [&](int at) {
            const float d = sums[MOMENTS + at] - origin + sums[2 * MOMENTS + at] - mean;
            square += sums[3 * MOMENTS + at] + sums[at] * d * d;
        });
        send(p, scratch, share.rank, 0, group, mean);
        send(p, scratch, share.rank, 1, group, team_sum(p, square));
    }
}

DEVICE float sigmoid(const Params& p, float w) {
    // The approximations are within a relative 3e-6 for |w| < 20, which 16 bits do not show.
    if (X_TYPE == FLOAT32) return 1.0f / (1.0f + expf(-w));
    return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * w));
}

// Asks for what is held of one tensor or two, in stages.
DEVICE void fetch(const Params& p, int steps, const Held& x, const Held& dy) {
    const int stage = (x.held + STAGES - 1) / STAGES;
    const char *x_from = x.from, *dy_from = dy.from;
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        const int end = min(min(steps, x.held), (i + 1) * stage);
#pragma unroll 4
        for (int step = i * stage; step < end; ++step) {
            copy_async(x.slab + step * (THREADS * BYTES), x_from, BYTES);
            if (dy.slab != x.slab && (FITS || step < dy.held))
                copy_async(dy.slab + step * (THREADS * BYTES), dy_from, BYTES);
            x_from += x.stride;
            dy_from += x.stride;
        }
        commit_copies();
    }
}

// Calls body(step) for each step, those of a stage when they have come.
template <class Body>
DEVICE void while_they_come(const Params& p, int steps, const Held& x, const Body& body) {
    const int stage = (x.held + STAGES - 1) / STAGES;
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        wait_for_copies(STAGES - 1 - i);
        const int end = i == STAGES - 1 ? steps : min(steps, (i + 1) * stage);
#pragma unroll(UNROLLED)
        for (int step = i * stage; step < end; ++step) body(step);
    }
}

template <class Value>
DEVICE Vector packed(const Params& p, const Value& value) {
    Vector v;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        if (X_TYPE == FLOAT32)
            v.words[i] = __float_as_uint(value(i));
        else if (i % 2 == 0)
            v.words[i / 2] = pack(value(i), i + 1 < VECTOR ? value(i + 1) : 0.0f, X_TYPE);
    }
    return v;
}

// Writes value_of(step)(i) for each step and element of a vector.
template <class Value>
DEVICE void write(const Params& p, const Share& share, const Value& value_of) {
    char* to = (char*)p.result + share.first * (BYTES / VECTOR);
#pragma unroll(UNROLLED)
    for (int step = 0; step < share.steps; ++step) {
        store_vector(to, packed(p, value_of(step)), BYTES);
        to += share.stride * (BYTES / VECTOR);
    }
}

// A rank must have started before others write to its memory: it says so, and they wait for it.
#define BEGIN_CLUSTER() if (RANKS > 1) cluster_begin()
#define AWAIT_CLUSTER() if (RANKS > 1) cluster_wait()
// The channel among a thread's that element i of a vector is of.
#define OF(i) (CHANNELS_LAST ? (i) : 0)

DEVICE void store_stats(const Params& p, const Share& share, const Scratch& scratch) {
    if (share.rank > 0) return;
    float* const rstd = p.stats + (CENTER ? p.samples * NUM_GROUPS : 0);
#pragma unroll 1
    for (int g = threadIdx.x; g < GROUPS; g += THREADS) {
        const i64 at = share.n * NUM_GROUPS + share.block * GROUPS + g;
        if (CENTER) p.stats[at] = scratch.origin[g] + scratch.stat[g];
        rstd[at] = scratch.stat[GROUPS + g];
    }
}

#if defined(FORWARD) || defined(HOST_SHIM)
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) group_norm_silu_forward(const __grid_constant__ Params p) {
    SHARED_MEMORY(shared);
    BEGIN_CLUSTER();
    const Share share(p);
    Held x(p, share, p.x, shared, p.held_x);
    fetch(p, share.steps, x, x);
    const Affine affine(p, share);
    const Scratch scratch(p, shared);
    const float steps = CHANNELS_LAST ? p.positions : p.positions / VECTOR;
    const float of_step = GROUP * (CHANNELS_LAST ? 1 : VECTOR);  // elements of a group
    if (CENTER) choose_origins(p, share, scratch);

    // Sums of u - pivot and of its square, the pivot being this thread's first u of the group.
    float sums[MAX_CHANNELS], squares[MAX_CHANNELS], pivots[MAX_CHANNELS], center[MAX_CHANNELS];
    wait_for_copies(STAGES - 1);
    const bool has_pivot = CENTER && share.steps > 0;
    const Vector at_first = has_pivot ? x.at(p, 0) : Vector{};
    for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
        const bool is_first = j == 0 || share.slot(p, j) != share.slot(p, j - 1);
        pivots[j] = !has_pivot ? 0.0f : is_first ? element(at_first, j, X_TYPE) + affine.add[j] : pivots[j - 1];
        sums[j] = squares[j] = 0.0f;
        center[j] = pivots[j] - affine.add[j];
    }
    while_they_come(p, share.steps, x, [&](int step) {
        const Vector v = x.at(p, step);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float d = element(v, i, X_TYPE) - center[OF(i)];
            if (CENTER) sums[OF(i)] += d;
            squares[OF(i)] += d * d;
        }
    });
    put_moments(p, share, scratch, sums, squares, pivots);
    __syncthreads();
    AWAIT_CLUSTER();
    add_moments(p, share, scratch);
    synchronize(p);
#pragma unroll 1
    for (int g = threadIdx.x; g < GROUPS; g += THREADS) {
        float mean = 0.0f, square = 0.0f;
        for (int rank = 0; rank < RANKS; ++rank) mean += steps_of_rank(p, rank) * scratch.of_rank(p, 0, rank)[g];
        mean = __fdividef(mean, steps);
        for (int rank = 0; rank < RANKS; ++rank) {
            const float d = scratch.of_rank(p, 0, rank)[g] - mean;
            square += scratch.of_rank(p, 1, rank)[g] + steps_of_rank(p, rank) * of_step * d * d;
        }
        const float rstd = 1.0f / sqrtf(__fdividef(square, steps * of_step) + p.eps);
        scratch.stat[g] = mean;
        scratch.stat[GROUPS + g] = rstd;
    }
    __syncthreads();
    store_stats(p, share, scratch);
    if (!share.is_active) return;
    float factor[MAX_CHANNELS], offset[MAX_CHANNELS];
    for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
        const int group = share.group(p, j);
        const float origin = CENTER ? scratch.origin[group] : 0.0f, from_origin = scratch.stat[group];
        const float mean = origin + from_origin, part = mean - origin;
        const float rounded_off = (origin - (mean - part)) + (from_origin - part);
        center[j] = mean - affine.add[j];
        factor[j] = affine.weight[j] * scratch.stat[GROUPS + group];
        offset[j] = affine.bias[j] - rounded_off * factor[j];
    }
    write(p, share, [&](int step) {
        const Vector v = x.at(p, step);
        return [=](int i) {
            const float w = (element(v, i, X_TYPE) - center[OF(i)]) * factor[OF(i)] + offset[OF(i)];
            return SILU ? w * sigmoid(p, w) : w;
        };
    });
}
#endif

#if defined(BACKWARD) || defined(HOST_SHIM)

// The gradients of the tables of a sample's channels, from the sums of all ranks, and its part of those of weight and
// bias.
DEVICE void store_channels(const Params& p, const Share& share, const Scratch& scratch, const float* rstd_of) {
#pragma unroll 1
    for (int at = threadIdx.x; at < WIDTH; at += THREADS) {
        const int c = share.block * WIDTH + at, group = at / GROUP;
        float sums[3];
        for (int q = 0; q < 2 + NEED_D; ++q) {
            sums[q] = 0.0f;
            for (int rank = 0; rank < RANKS; ++rank) sums[q] += scratch.gathered[(q * RANKS + rank) * WIDTH + at];
        }
        const float rstd = rstd_of[group], dw = sums[0], dw_xhat = sums[1] * rstd;
        const float weight = WEIGHT_TYPE ? load(p.weight, c, WEIGHT_TYPE) : 1.0f;
        const float scale = SCALE_TYPE ? 1.0f + load(p.scale, share.n * p.scale_stride + c, SCALE_TYPE) : 1.0f;
        const i64 row = share.n * CHANNELS + c;
        if (p.dshift) store(p.dshift, row, dw, SHIFT_TYPE);
        if (p.dscale) {
            const float bias = BIAS_TYPE ? load(p.bias, c, BIAS_TYPE) : 0.0f;
            store(p.dscale, row, weight * dw_xhat + bias * dw, SCALE_TYPE);
        }
        if (NEED_D) {
            const float mean_dy = scratch.stat[group], mean_dy_xhat = scratch.stat[GROUPS + group];
            const float dadd = weight * scale * rstd * dw - (float)p.positions * mean_dy - sums[2] * mean_dy_xhat;
            store(p.dadd, row, dadd, ADD_TYPE);
        }
        if (!NEED_AFFINE) continue;
        if (p.samples > 1) {
            p.sums[row] = dw * scale;
            p.sums[p.samples * CHANNELS + row] = dw_xhat * scale;
        } else {
            if (p.dbias) store(p.dbias, c, dw * scale, BIAS_TYPE);
            if (p.dweight) store(p.dweight, c, dw_xhat * scale, WEIGHT_TYPE);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) group_norm_silu_backward(const __grid_constant__ Params p) {
    SHARED_MEMORY(shared);
    BEGIN_CLUSTER();
    const Share share(p);
    Held x(p, share, p.x, shared, p.held_x), dy(p, share, p.dy, shared + p.held_x * (THREADS * BYTES), p.held_dy);
    fetch(p, share.steps, x, dy);
    const Scratch scratch(p, shared);
    float* const rstd_of = scratch.stat + 2 * GROUPS;
    const i64 of_block = share.n * NUM_GROUPS + share.block * GROUPS, end = p.samples * NUM_GROUPS;
    float center[MAX_CHANNELS], factor[MAX_CHANNELS], offset[MAX_CHANNELS], weight[MAX_CHANNELS];
    {
        const Affine affine(p, share);
        for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
            const i64 at = of_block + (share.is_active ? share.group(p, j) : 0);
            center[j] = (CENTER ? p.stats[at] : 0.0f) - affine.add[j];
            factor[j] = affine.weight[j] * p.stats[at + (CENTER ? end : 0)];
            offset[j] = affine.bias[j];
            weight[j] = affine.weight[j];
        }
    }
#pragma unroll 1
    for (int g = threadIdx.x; g < GROUPS; g += THREADS) rstd_of[g] = p.stats[of_block + g + (CENTER ? end : 0)];

    // dw, from d and an element of dy
    auto dw_of = [&](float d, float dy, int i) {
        if (!SILU) return dy;
        const float w = d * factor[OF(i)] + offset[OF(i)], sigma = sigmoid(p, w);
        return dy * (sigma * (1.0f + w * (1.0f - sigma)));
    };
    float sums[3][MAX_CHANNELS];
    for (int j = 0; j < CHANNELS_OF_THREAD; ++j) sums[0][j] = sums[1][j] = sums[2][j] = 0.0f;
    while_they_come(p, share.steps, x, [&](int step) {
        const Vector v = x.at(p, step), g = dy.at(p, step);
        float dw[8];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float d = element(v, i, X_TYPE) - center[OF(i)];
            dw[i] = dw_of(d, element(g, i, X_TYPE), i);
            sums[0][OF(i)] += dw[i];
            sums[1][OF(i)] += dw[i] * d;
            if (NEED_D) sums[2][OF(i)] += d;
        }
        // In place of dy, in x's type, as PyTorch's two gradients hand it over: half of the second pass is saved.
        if (SILU && NEED_X && dy.holds(p, step)) dy.put(p, step, packed(p, [&](int i) { return dw[i]; }));
    });

    for (int q = 0; q < 2; ++q) {
        float weighted[MAX_CHANNELS];
        for (int j = 0; j < CHANNELS_OF_THREAD; ++j) weighted[j] = weight[j] * sums[q][j];
        put_sums(p, share, scratch, q, weighted);
    }
    float* const of_channels = scratch.thread_sums + 2 * SPAN * FOLDED_ROWS * LANES;
    if (NEED_SUMS) {
#pragma unroll
        for (int q = 0; q < 2 + NEED_D; ++q)
#pragma unroll
            for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
                const float sum = fold(p, sums[q][j]);
                const int at = (q * FOLDED_ROWS + share.row / FOLD) * WIDTH + share.lane * CHANNELS_OF_THREAD + j;
                if (share.is_active && share.row % FOLD == 0) of_channels[at] = sum;
            }
    }
    __syncthreads();
    AWAIT_CLUSTER();
    add_groups(p, share, scratch);
    if (NEED_SUMS) {
#pragma unroll 1
        for (int at = threadIdx.x; at < (2 + NEED_D) * WIDTH; at += THREADS) {
            const int q = at / WIDTH, c = at % WIDTH;
            float sum = 0.0f;
#pragma unroll 4
            for (int row = 0; row < FOLDED_ROWS; ++row) sum += of_channels[(q * FOLDED_ROWS + row) * WIDTH + c];
            float* to = &scratch.gathered[(q * RANKS + share.rank) * WIDTH + c];
            if (RANKS == 1)
                *to = sum;
            else
                store_to_rank(to, 0, sum);
        }
    }
    synchronize(p);
    const float elements = (float)p.positions * GROUP;
#pragma unroll 1
    for (int g = threadIdx.x; g < GROUPS; g += THREADS) {
        const float rstd = rstd_of[g];
        scratch.stat[g] = CENTER ? total(p, scratch, 0, g) * rstd / elements : 0.0f;
        scratch.stat[GROUPS + g] = total(p, scratch, 1, g) * rstd * rstd * rstd / elements;
    }
    __syncthreads();

    if (NEED_SUMS && share.rank == 0) store_channels(p, share, scratch, rstd_of);
    if (!NEED_X || !share.is_active) return;
    float dy_part[MAX_CHANNELS], xhat_part[MAX_CHANNELS];
    for (int j = 0; j < CHANNELS_OF_THREAD; ++j) {
        dy_part[j] = scratch.stat[share.group(p, j)];
        xhat_part[j] = scratch.stat[GROUPS + share.group(p, j)];
    }
    write(p, share, [&](int step) {
        const Vector v = x.at(p, step), g = dy.at(p, step);
        const bool is_dw = dy.holds(p, step);
        return [=](int i) {
            const float d = element(v, i, X_TYPE) - center[OF(i)];
            const float dw = is_dw ? element(g, i, X_TYPE) : dw_of(d, element(g, i, X_TYPE), i);
            return dw * factor[OF(i)] - dy_part[OF(i)] - d * xhat_part[OF(i)];
        };
    });
}
#endif

#if defined(AFFINE) || defined(HOST_SHIM)
// dweight and dbias, from the sums of each sample: a thread block adds up CHANNELS_AT_ONCE channels of all samples.
extern "C" __global__ void __launch_bounds__(CHANNELS_AT_ONCE* SAMPLES_AT_ONCE, 1)
    group_norm_silu_affine(const __grid_constant__ Params p) {
    SHARED_MEMORY(shared);
    float* const sums = (float*)shared;  // of a row of threads
    const int column = threadIdx.x % CHANNELS_AT_ONCE, row = threadIdx.x / CHANNELS_AT_ONCE;
    const int c = blockIdx.x * CHANNELS_AT_ONCE + column;
    float dw = 0.0f, dw_xhat = 0.0f;
    if (c < CHANNELS) {
#pragma unroll 4
        for (i64 n = row; n < p.samples; n += SAMPLES_AT_ONCE) {
            dw += p.sums[n * CHANNELS + c];
            dw_xhat += p.sums[(p.samples + n) * CHANNELS + c];
        }
    }
    sums[threadIdx.x] = dw;
    sums[CHANNELS_AT_ONCE * SAMPLES_AT_ONCE + threadIdx.x] = dw_xhat;
    __syncthreads();
    if (row > 0 || c >= CHANNELS) return;
#pragma unroll
    for (int i = 1; i < SAMPLES_AT_ONCE; ++i) {
        dw += sums[i * CHANNELS_AT_ONCE + column];
        dw_xhat += sums[(SAMPLES_AT_ONCE + i) * CHANNELS_AT_ONCE + column];
    }
    if (p.dbias) store(p.dbias, c, dw, BIAS_TYPE);
    if (p.dweight) store(p.dweight, c, dw_xhat, WEIGHT_TYPE);
}
#endif

#ifdef HOST_SHIM
extern "C" void run(int which, int blocks, int threads, int ranks, size_t shared, const Params* p) {
    shim::launch(blocks, threads, ranks, shared, [=] {
        if (which == 0) group_norm_silu_forward(*p);
        if (which == 1) group_norm_silu_backward(*p);
        if (which == 2) group_norm_silu_affine(*p);
    });
}
#endif
