// Executes kernels. The threads of a block are fibers on one OS thread: each runs until it meets a barrier or a
// collective of its warp, and the scheduler goes on with the next. Blocks are spread over a few OS threads.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#define EMULATOR_RUNTIME
#include "kernel.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT __thread emulator::Index threadIdx, blockIdx, blockDim, gridDim;
EXPORT __thread unsigned char* dynamic_shared;

// Saves what a function call must preserve on the present stack, keeps that stack's pointer in *from, goes on at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
    .text
    .hidden emulator_switch
    .globl emulator_switch
    .type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch, . - emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t stack_bytes = 64 << 10;
constexpr size_t largest_dynamic = 232448;
constexpr const char* block_barrier = "__syncthreads";

struct Copy {
    void* to;
    const void* from;  // null: fill with zeros
    unsigned bytes;
    unsigned group;
};

struct Lane {
    enum State { fresh, ready, waiting, exited } state;
    void* stack_pointer;
    char* stack;
    // What a waiting lane waits for. Without a mask: the barrier of the block.
    const char* name;
    unsigned mask;
    Operation operation;
    void* slot;
    std::vector<Copy> copies;
    unsigned groups;  // committed so far
};

size_t page_size() { return size_t(getpagesize()); }

/// Executes one block at a time on the OS thread that owns it.
class Engine {
public:
    Engine();
    ~Engine();
    /// `first`: whether it is the launch's first block on this OS thread.
    void run_block(const Launch& launch, void* const* values, bool first);
    void sync_block() { wait(block_barrier, 0, nullptr, nullptr); }
    void wait(const char* name, unsigned mask, Operation operation, void* slot);
    Lane& lane() { return lanes[current]; }
    unsigned lane_number() const { return current % 32; }
    [[noreturn]] void fail(const char* what);
    void where(char* text, size_t size) const;

    bool running = false;

private:
    static void begin();
    void resume(unsigned thread);
    bool run_warp(unsigned first);
    bool finish_collectives(unsigned first, unsigned end);
    void poison_static_shared(bool first);
    [[noreturn]] void report_deadlock();

    std::vector<Lane> lanes;
    std::vector<char*> free_stacks;
    void* scheduler = nullptr;
    unsigned current = 0, threads = 0;
    const Launch* launch = nullptr;
    void* const* values = nullptr;
    void* dynamic_start = nullptr;
    unsigned char* dynamic_end = nullptr;
    stack_t alternate = {};
    std::map<void* (*)(), std::pair<void*, size_t>> static_shared;
};

// A plain pointer for the fault handler, and what ends the engine with its thread.
thread_local Engine* engine = nullptr;
thread_local std::unique_ptr<Engine> owned_engine;

// ---- crashes

struct sigaction previous[NSIG];

void on_fault(int signal, siginfo_t* info, void*) {
    char text[512], place[256] = "";
    if (engine && engine->running)
        engine->where(place, sizeof place);
    else if (doing)
        snprintf(place, sizeof place, "%s", doing);
    if (*place) {
        int length = snprintf(text, sizeof text, "emulator: %s at address %p in %s\n",
                              signal == SIGFPE ? "division by zero" : "invalid memory access", info->si_addr, place);
        if (write(2, text, size_t(length)) < 0) {}
    }
    // Going back repeats the fault, now for whoever was in charge before.
    sigaction(signal, &previous[signal], nullptr);
}

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) sigaction(signal, &action, &previous[signal]);
    });
}

void Engine::where(char* text, size_t size) const {
    snprintf(text, size, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", launch->kernel->name, blockIdx.x,
             blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
}

void Engine::fail(const char* what) {
    char place[256];
    where(place, sizeof place);
    fprintf(stderr, "emulator: %s in %s\n", what, place);
    abort();
}

// ---- fibers

Engine::Engine() : lanes(1024) {
    catch_faults();
    // Faults are handled on a stack of their own: the fiber's may be the one that overflowed.
    alternate.ss_size = 64 << 10;
    alternate.ss_sp = malloc(alternate.ss_size);
    sigaltstack(&alternate, nullptr);

    // Shared memory ends at an inaccessible page; the stacks of the fibers, which grow downwards, begin at one.
    size_t usable = (largest_dynamic + page_size() - 1) / page_size() * page_size();
    dynamic_start = mmap(nullptr, usable + page_size(), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (dynamic_start == MAP_FAILED) abort();
    dynamic_end = static_cast<unsigned char*>(dynamic_start) + usable;
    mprotect(dynamic_end, page_size(), PROT_NONE);
}

Engine::~Engine() {
    for (char* stack : free_stacks) munmap(stack, stack_bytes + page_size());
    munmap(dynamic_start, size_t(dynamic_end - static_cast<unsigned char*>(dynamic_start)) + page_size());
    stack_t none = {};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
    free(alternate.ss_sp);
}

void Engine::begin() {
    Engine* self = engine;
    self->launch->kernel->call(self->values);
    Lane& lane = self->lane();
    lane.state = Lane::exited;
    void* unused;
    emulator_switch(&unused, self->scheduler);
    __builtin_unreachable();
}

void Engine::resume(unsigned thread) {
    Lane& lane = lanes[thread];
    if (lane.state == Lane::fresh) {
        if (free_stacks.empty()) {
            void* memory = mmap(nullptr, stack_bytes + page_size(), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
            if (memory == MAP_FAILED) abort();
            mprotect(memory, page_size(), PROT_NONE);
            free_stacks.push_back(static_cast<char*>(memory));
        }
        // A lane that never waits gives its stack to the next: such kernels run on a single, warm one.
        lane.stack = free_stacks.back();
        free_stacks.pop_back();
        void** top = reinterpret_cast<void**>(lane.stack + page_size() + stack_bytes);
        *--top = nullptr;                                   // where begin() would return to; keeps the alignment
        *--top = reinterpret_cast<void*>(&Engine::begin);   // where the switch returns to
        top -= 6;                                           // the registers that the switch restores
        lane.stack_pointer = top;
    }
    lane.state = Lane::ready;
    current = thread;
    const unsigned* block = launch->block;
    threadIdx = {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
    emulator_switch(&scheduler, lane.stack_pointer);
    if (lane.state == Lane::exited) {
        free_stacks.push_back(lane.stack);
        lane.copies.clear();
    }
}

void Engine::wait(const char* name, unsigned mask, Operation operation, void* slot) {
    Lane& own = lane();
    own.state = Lane::waiting;
    own.name = name;
    own.mask = mask;
    own.operation = operation;
    own.slot = slot;
    emulator_switch(&own.stack_pointer, scheduler);
}

// ---- scheduling

/// Runs the warp's lanes until none can go on; says whether any ran.
bool Engine::run_warp(unsigned first) {
    static const bool reversed = [] {
        const char* order = getenv("EMULATOR_ORDER");
        return order && !strcmp(order, "reverse");
    }();
    unsigned end = std::min(first + 32, threads);
    bool ran = false;
    do {
        for (unsigned i = first; i < end; i++) {
            unsigned thread = reversed ? end - 1 - (i - first) : i;
            if (lanes[thread].state > Lane::ready) continue;
            resume(thread);
            ran = true;
        }
    } while (finish_collectives(first, end));
    return ran;
}

/// Performs the collectives at which all lanes that they name have arrived.
bool Engine::finish_collectives(unsigned first, unsigned end) {
    unsigned present = end - first == 32 ? all_lanes : (1u << (end - first)) - 1;
    bool finished = false;
    for (unsigned thread = first; thread < end; thread++) {
        Lane& lane = lanes[thread];
        if (lane.state != Lane::waiting || lane.name == block_barrier) continue;
        unsigned named = lane.mask & present;
        void* slots[32] = {};
        bool complete = true;
        for (unsigned i = 0; i < 32 && complete; i++) {
            if (!(named >> i & 1)) continue;
            Lane& other = lanes[first + i];
            complete = other.state == Lane::waiting && other.name == lane.name && other.mask == lane.mask &&
                       other.operation == lane.operation;
            slots[i] = other.slot;
        }
        if (!complete) continue;
        if (lane.operation) lane.operation(slots, named);
        for (unsigned i = 0; i < 32; i++)
            if (named >> i & 1) lanes[first + i].state = Lane::ready;
        finished = true;
    }
    return finished;
}

void Engine::report_deadlock() {
    fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u): nothing can go on:\n", launch->kernel->name, blockIdx.x,
            blockIdx.y, blockIdx.z);
    auto describe = [this](unsigned thread) {
        Lane& lane = lanes[thread];
        char text[128];
        if (lane.state == Lane::exited)
            snprintf(text, sizeof text, "exited");
        else if (lane.name == block_barrier)
            snprintf(text, sizeof text, "at __syncthreads");
        else
            snprintf(text, sizeof text, "at %s with mask %08x", lane.name, lane.mask);
        return std::string(text);
    };
    for (unsigned thread = 0, next; thread < threads; thread = next) {
        std::string what = describe(thread);
        for (next = thread + 1; next < threads && describe(next) == what;) next++;
        fprintf(stderr, "  threads %u to %u: %s\n", thread, next - 1, what.c_str());
    }
    abort();
}

/// Fills the module's `__shared__` variables with 0xff. They are the only thread-local ones of its library, so its
/// whole thread-local block is filled; per block where that is cheap, else once per thread and launch.
void Engine::poison_static_shared(bool first) {
    auto shared = launch->kernel->shared;
    auto found = static_shared.find(shared);
    if (found == static_shared.end()) {
        struct Search {
            char* anchor;
            std::pair<void*, size_t> block;
        } search{static_cast<char*>(shared()), {nullptr, 0}};
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* data) {
                auto* search = static_cast<Search*>(data);
                for (int i = 0; i < info->dlpi_phnum; i++) {
                    auto& header = info->dlpi_phdr[i];
                    char* start = static_cast<char*>(info->dlpi_tls_data);
                    if (header.p_type != PT_TLS || !start) continue;
                    if (search->anchor >= start && search->anchor < start + header.p_memsz)
                        search->block = {start, header.p_memsz};
                }
                return 0;
            },
            &search);
        found = static_shared.emplace(shared, search.block).first;
    }
    auto [start, size] = found->second;
    if (start && (first || size <= 64 << 10)) memset(start, 0xff, size);
}

void Engine::run_block(const Launch& launched, void* const* arguments, bool first_block) {
    launch = &launched;
    values = arguments;
    threads = launched.block[0] * launched.block[1] * launched.block[2];
    size_t shared = (launched.shared_bytes + 127) & ~size_t(127);
    dynamic_shared = dynamic_end - shared;
    memset(dynamic_shared, 0xff, shared);
    poison_static_shared(first_block);
    blockDim = {launched.block[0], launched.block[1], launched.block[2]};
    gridDim = {launched.grid[0], launched.grid[1], launched.grid[2]};
    for (unsigned i = 0; i < threads; i++) {
        lanes[i].state = Lane::fresh;
        lanes[i].groups = 0;
    }
    running = true;
    for (;;) {
        bool ran = false;
        for (unsigned first = 0; first < threads; first += 32) ran |= run_warp(first);
        if (ran) continue;
        // Threads that have left count as arrived.
        bool left = true, arrived = true;
        for (unsigned i = 0; i < threads; i++) {
            left &= lanes[i].state == Lane::exited;
            arrived &= lanes[i].state == Lane::exited || lanes[i].name == block_barrier;
        }
        if (left) break;
        if (!arrived) report_deadlock();
        for (unsigned i = 0; i < threads; i++)
            if (lanes[i].state == Lane::waiting) lanes[i].state = Lane::ready;
    }
    running = false;
}

// ---- grids

struct Grid {
    const Launch& launch;
    void* const* values;
    std::atomic<uint64_t> next{0};

    void work() {
        if (!engine) {
            owned_engine = std::make_unique<Engine>();
            engine = owned_engine.get();
        }
        const unsigned* grid = launch.grid;
        uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
        bool first = true;
        for (uint64_t block; (block = next++) < blocks; first = false) {
            blockIdx = {unsigned(block % grid[0]), unsigned(block / grid[0] % grid[1]),
                        unsigned(block / grid[0] / grid[1])};
            engine->run_block(launch, values, first);
        }
    }
};

/// Threads that help with one grid at a time. A launch that finds them busy does without.
class Helpers {
public:
    static Helpers& get() {
        static Helpers* instance = new Helpers;
        return *instance;
    }

    bool begin(Grid& grid) {
        std::lock_guard lock(mutex);
        if (busy || count == 0) return false;
        busy = &grid;
        working = count;
        round++;
        changed.notify_all();
        return true;
    }

    void end() {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return working == 0; });
        busy = nullptr;
    }

private:
    Helpers() {
        const char* text = getenv("EMULATOR_THREADS");
        unsigned wanted = text ? unsigned(atoi(text)) : std::min(8u, std::thread::hardware_concurrency());
        count = wanted > 1 ? wanted - 1 : 0;
        for (unsigned i = 0; i < count; i++) std::thread([this] { help(); }).detach();
    }

    void help() {
        uint64_t seen = 0;
        std::unique_lock lock(mutex);
        for (;;) {
            changed.wait(lock, [&] { return round != seen; });
            seen = round;
            Grid* grid = busy;
            lock.unlock();
            grid->work();
            lock.lock();
            working--;
            changed.notify_all();
        }
    }

    std::mutex mutex;
    std::condition_variable changed;
    Grid* busy = nullptr;
    unsigned count = 0, working = 0;
    uint64_t round = 0;
};

}  // namespace

void run_kernel(const Launch& launch, void* const* values) {
    Grid grid{launch, values};
    bool many = launch.grid[0] > 1 || launch.grid[1] > 1 || launch.grid[2] > 1;
    bool helped = many && Helpers::get().begin(grid);
    grid.work();
    if (helped) Helpers::get().end();
}

}  // namespace emulator

using namespace emulator;

// ---- what kernels call

extern "C" {

EXPORT unsigned emulator_lane() { return engine->lane_number(); }

EXPORT void emulator_sync_block() { engine->sync_block(); }

EXPORT void emulator_sync_warp(const char* name, unsigned mask, Operation operation, void* slot) {
    if (!(mask >> engine->lane_number() & 1)) engine->fail("a lane that its own mask leaves out");
    engine->wait(name, mask, operation, slot);
}

EXPORT void emulator_trap(const char* what) { engine->fail(what); }

EXPORT void emulator_copy_async(void* shared, const void* global, unsigned bytes, bool in_range) {
    if (reinterpret_cast<uintptr_t>(shared) % bytes || (in_range && reinterpret_cast<uintptr_t>(global) % bytes))
        engine->fail("copy_async with an address that is no multiple of its bytes");
    // Until it is waited for, the target shows that it is not there yet.
    memset(shared, 0xff, bytes);
    Lane& lane = engine->lane();
    lane.copies.push_back({shared, in_range ? global : nullptr, bytes, lane.groups});
}

EXPORT void emulator_copy_async_commit() { engine->lane().groups++; }

EXPORT void emulator_copy_async_wait(unsigned groups_left) {
    Lane& lane = engine->lane();
    size_t kept = 0;
    for (Copy& copy : lane.copies) {
        // Copies not yet committed belong to no group: as with PTX, no wait covers them.
        if (copy.group + groups_left >= lane.groups)
            lane.copies[kept++] = copy;
        else if (copy.from)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    lane.copies.resize(kept);
}

}  // extern "C"
