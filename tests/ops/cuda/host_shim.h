// Runs group_norm_silu.cu on a CPU, for tests: every thread is a fiber, and all take turns in one thread.
//
// Several clusters run at a time, and who goes on at a barrier is drawn, by priorities of thread blocks that change, so
// that a missing barrier shows. Shared memory is allocated for each thread block in the size that was asked for, and
// filled with NaN when its first thread starts, so that AddressSanitizer sees what is beyond it and tests see what was
// not written, or too early. A weak memory model's races do not show here; compute-sanitizer shows them on a GPU.
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
#define MAX_CHANNELS 8
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
    bool parity;
    float exchanged[2];
};

struct Barrier {
    size_t size;
    std::vector<Fiber*> arrived;
};

struct Block {
    std::unique_ptr<unsigned char, decltype(&std::free)> memory{nullptr, std::free};
    unsigned char* shared;
    size_t size;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<Fiber*> ready;
    Barrier* cluster;
    Block* first_of_cluster;
    u32 priority = 0;
    bool has_started = false;
};

constexpr size_t kStack = 1 << 16;
constexpr int kClusters = 3;  // at a time
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Block> blocks;
inline std::vector<Barrier> clusters;
inline Fiber* current;
inline size_t left;  // fibers that have not ended
inline ucontext_t launcher;
inline std::function<void()> kernel;
inline u32 redraw_every;  // how often a thread block that runs gets another priority: often, at times or rarely

inline u32 draw(u32 below) {
    static u32 drawn = 1;
    drawn = drawn * 1664525u + 1013904223u;
    return (drawn >> 8) % below;
}

inline Fiber* take_next() {
    if (current && draw(redraw_every) == 0) current->block->priority = draw(1 << 16);
    Block* best = nullptr;
    for (Block& block : blocks)
        if (!block.ready.empty() && (!best || block.priority > best->priority)) best = &block;
    if (!best) {
        std::fprintf(stderr, "host_shim: threads wait at a barrier that others have passed by\n");
        std::abort();
    }
    std::swap(best->ready[draw(best->ready.size())], best->ready.back());
    Fiber* const found = best->ready.back();
    best->ready.pop_back();
    return found;
}

inline void go_on() {
    Fiber* const last = current;
    current = take_next();
    if (last != current) swapcontext(&last->context, &current->context);
}

inline void wait_at(Barrier& barrier) {
    barrier.arrived.push_back(current);
    if (barrier.arrived.size() == barrier.size) {
        for (Fiber* fiber : barrier.arrived) fiber->block->ready.push_back(fiber);
        barrier.arrived.clear();
    }
    go_on();
}

inline void run_fiber() {
    Block& block = *current->block;
    if (!block.has_started) std::memset(block.shared, 0xff, block.size);
    block.has_started = true;
    kernel();
    if (--left == 0) setcontext(&launcher);
    go_on();
}

inline void launch(int count, int threads, int ranks, size_t shared, std::function<void()> body) {
    kernel = body;
    for (int first = 0; first < count; first += ranks * kClusters) {
        const int at_once = min(count - first, ranks * kClusters);
        fibers.resize((size_t)threads * at_once);
        clusters.assign(at_once / ranks, {(size_t)threads * ranks, {}});
        blocks.clear();
        blocks.resize(at_once);
        for (int i = 0; i < at_once; ++i) {
            Block& block = blocks[i];
            block.memory.reset((unsigned char*)std::aligned_alloc(16, (shared + 15) / 16 * 16));
            block.shared = block.memory.get();
            block.size = shared;
            block.priority = draw(1 << 16);
            block.barrier.size = threads;
            block.warps.assign(threads / 32, {32, {}});
            block.cluster = &clusters[i / ranks];
            block.first_of_cluster = &blocks[i / ranks * ranks];
        }
        for (size_t i = 0; i < fibers.size(); ++i) {
            if (!fibers[i]) {
                fibers[i] = std::make_unique<Fiber>();
                fibers[i]->stack.reset(new char[kStack]);
            }
            Fiber& fiber = *fibers[i];
            fiber.thread.x = i % threads;
            fiber.block_index.x = first + i / threads;
            fiber.block = &blocks[i / threads];
            fiber.parity = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, run_fiber, 0);
            fiber.block->ready.push_back(&fiber);
        }
        left = fibers.size();
        redraw_every = 1 << (1 + 4 * draw(3));
        current = nullptr;
        current = take_next();
        swapcontext(&launcher, &current->context);
    }
}

}  // namespace shim

inline void __syncthreads() { shim::wait_at(shim::current->block->barrier); }
inline float __shfl_xor_sync(u32, float value, int mask) {
    shim::Fiber& self = *shim::current;
    self.parity = !self.parity;  // the value before may still be read
    self.exchanged[self.parity] = value;
    shim::wait_at(self.block->warps[self.thread.x / 32]);
    const size_t other = (self.block - shim::blocks.data()) * self.block->barrier.size + (self.thread.x ^ mask);
    return shim::fibers[other]->exchanged[self.parity];
}
inline void cluster_begin() {}
inline void cluster_arrive() {}
inline void cluster_wait() { shim::wait_at(*shim::current->block->cluster); }
inline void store_to_rank(float* at, u32 rank, float value) {
    const shim::Block& block = *shim::current->block;
    *(float*)(block.first_of_cluster[rank].shared + ((unsigned char*)at - block.shared)) = value;
}
inline void copy_async(void* to, const void* from, int bytes) { std::memcpy(to, from, bytes); }
inline void commit_copies() {}
inline void wait_for_copies(int) {}
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
