// Runs group_norm_silu.cu on a CPU, for tests: every thread of a cluster is a fiber, and all take turns in one thread.
//
// Who goes on at a barrier is drawn, so that a missing barrier shows. Shared memory is allocated for each thread block in
// the size that was asked for, filled with NaN, so that AddressSanitizer sees what is beyond and tests see what was not
// written. A weak memory model's races do not show here; compute-sanitizer shows them on a GPU.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

using std::max;
using std::min;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#define DEVICE inline
#define MAX_VECTOR 8
#define MAX_CHANNELS 8
#define MAX_SPAN 8
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define threadIdx shim::current->thread
#define blockIdx shim::current->block_index
#define SHARED_MEMORY(name) unsigned char* name = shim::current->block->shared

namespace shim {

struct Index {
    int x;
};
struct Block;

struct Fiber {  // a thread
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index thread, block_index;
    Block* block;
    bool is_done, parity;
    float exchanged[2];
};

struct Barrier {
    size_t size;
    std::vector<Fiber*> arrived;
};

struct Block {
    std::unique_ptr<unsigned char, decltype(&std::free)> memory{nullptr, std::free};
    unsigned char* shared;
    Barrier barrier;
    std::vector<Barrier> warps;
    bool has_vote = false;
};

constexpr size_t kStack = 1 << 16;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Block> blocks;  // of the cluster that runs
inline Barrier cluster;
inline std::vector<Fiber*> ready;
inline Fiber* current;
inline ucontext_t launcher;
inline std::function<void()> kernel;
inline u32 drawn = 1;

inline void go_on() {
    if (ready.empty()) {
        std::fprintf(stderr, "host_shim: threads wait at a barrier that others have passed by\n");
        std::abort();
    }
    drawn = drawn * 1664525u + 1013904223u;
    std::swap(ready[(drawn >> 8) % ready.size()], ready.back());
    Fiber* const last = current;
    current = ready.back();
    ready.pop_back();
    if (last != current) swapcontext(&last->context, &current->context);
}

inline void wait_at(Barrier& barrier) {
    barrier.arrived.push_back(current);
    if (barrier.arrived.size() == barrier.size) {
        ready.insert(ready.end(), barrier.arrived.begin(), barrier.arrived.end());
        barrier.arrived.clear();
    }
    go_on();
}

inline void run_fiber() {
    kernel();
    current->is_done = true;
    if (std::all_of(fibers.begin(), fibers.end(), [](auto& fiber) { return fiber->is_done; })) setcontext(&launcher);
    go_on();
}

inline void launch(int count, int threads, int ranks, size_t shared, std::function<void()> body) {
    kernel = body;
    fibers.resize((size_t)threads * ranks);
    for (auto& fiber : fibers)
        if (!fiber) {
            fiber = std::make_unique<Fiber>();
            fiber->stack.reset(new char[kStack]);
        }
    for (int first = 0; first < count; first += ranks) {
        blocks.clear();
        blocks.resize(ranks);
        cluster = {fibers.size(), {}};
        for (int rank = 0; rank < ranks; ++rank) {
            Block& block = blocks[rank];
            block.memory.reset((unsigned char*)std::aligned_alloc(16, (shared + 15) / 16 * 16));
            block.shared = block.memory.get();
            std::memset(block.shared, 0xff, shared);
            block.barrier.size = threads;
            block.warps.assign(threads / 32, {32, {}});
        }
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& fiber = *fibers[i];
            fiber.thread.x = i % threads;
            fiber.block_index.x = first + i / threads;
            fiber.block = &blocks[i / threads];
            fiber.is_done = fiber.parity = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, run_fiber, 0);
            ready.push_back(&fiber);
        }
        current = ready.back();
        ready.pop_back();
        swapcontext(&launcher, &current->context);
    }
}

}  // namespace shim

inline void __syncthreads() { shim::wait_at(shim::current->block->barrier); }
inline bool __syncthreads_or(bool vote) {
    shim::current->block->has_vote |= vote;
    __syncthreads();
    return shim::current->block->has_vote;
}
inline float __shfl_xor_sync(u32, float value, int mask) {
    shim::Fiber& self = *shim::current;
    self.parity = !self.parity;  // the value before may still be read
    self.exchanged[self.parity] = value;
    shim::wait_at(self.block->warps[self.thread.x / 32]);
    const size_t other = (self.block - shim::blocks.data()) * self.block->barrier.size + (self.thread.x ^ mask);
    return shim::fibers[other]->exchanged[self.parity];
}
inline void cluster_arrive() {}
inline void cluster_wait() { shim::wait_at(shim::cluster); }
inline void store_to_rank(float* at, u32 rank, float value) {
    *(float*)(shim::blocks[rank].shared + ((unsigned char*)at - shim::current->block->shared)) = value;
}
inline void copy_async(void* to, const void* from, int bytes) { std::memcpy(to, from, bytes); }
inline void commit_copies() {}
inline void wait_for_copies(int) {}
inline void __threadfence() {}
inline u32 atomicAdd(u32* at, u32 value) {
    const u32 before = *at;
    *at += value;
    return before;
}
inline float __ldcg(const float* at) { return *at; }
inline float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u32 __float_as_uint(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float from_half(u16 bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}
inline u32 half_bits(float value) {
    const _Float16 half = value;
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline u32 to_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline u32 bfloat_bits(float value) {
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_bfloats(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }
