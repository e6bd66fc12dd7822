// CUDA C++ on one CPU thread, for tests: g++ compiles the kernels' own text behind this one.
//
// Every CUDA thread of a block is a fiber with a stack of its own, so that barriers and warp operations stop it halfway.
// Fibers take turns in an order that the caller chooses; blocks follow one another. A thread that ends without having
// stopped leaves its stack to the next one: kernels without barriers cost hardly more than loops.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace device {

struct uint3 {
    unsigned x, y, z;
};

constexpr int MOST_THREADS = 1024, LANES = 32;
constexpr size_t STACK = 64 << 10;

enum class State { fresh, ready, at_barrier, at_warp, done };

struct Fiber {
    void* sp;
    char* stack;  // none before its first turn
    State state;
    int site, line;  // where it waits
    uint64_t given;  // to the other lanes
    uint3 index;
};

static Fiber fibers[MOST_THREADS];
static uint64_t taken[MOST_THREADS];  // what lanes gave when their warp operation was complete
static char* spare[MOST_THREADS];
static int turns[MOST_THREADS];  // the order in which threads of a block take turns
static int spares, current;
static void* scheduler_sp;
static char message[400];
static void (*body)(void*);
static void* body_arguments;
static sigjmp_buf outside;

// The block's shared memory lies in one section, so that it can be filled with NaN before a block begins.
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

}  // namespace device

static device::uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace device {

// --- fibers: save the registers that a called function must keep, change the stack, restore them -----------------------

extern "C" void device_switch(void** save, void* load) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
asm(R"(
.text
.hidden device_switch
.globl device_switch
device_switch:
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
)");
constexpr int SAVED = 6;                      // words on the stack below the return address
constexpr int RETURN = 6, ABOVE = 1;          // a function begins with its stack 8 bytes off a multiple of 16
#elif defined(__aarch64__)
asm(R"(
.text
.hidden device_switch
.globl device_switch
device_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int SAVED = 19, RETURN = 11, ABOVE = 0;
#else
#error "the emulation of CUDA knows x86-64 and aarch64"
#endif

// Back to the scheduler until this thread's turn comes again.
static void stop(State why, int site, int line) {
    Fiber& me = fibers[current];
    me.state = why;
    me.site = site;
    me.line = line;
    device_switch(&me.sp, scheduler_sp);
}

static void entry() {
    body(body_arguments);
    stop(State::done, 0, 0);
    abort();
}

static void begin(Fiber& fiber) {
    if (spares > 0) fiber.stack = spare[--spares];
    else
        fiber.stack = static_cast<char*>(
            mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    void** sp = reinterpret_cast<void**>(fiber.stack + STACK) - ABOVE - SAVED - 1;
    memset(sp, 0, sizeof(void*) * (SAVED + 1));
    sp[RETURN] = reinterpret_cast<void*>(&entry);
    fiber.sp = sp;
}

static void turn(int number) {
    Fiber& fiber = fibers[number];
    if (fiber.state == State::fresh) begin(fiber);
    fiber.state = State::ready;
    current = number;
    threadIdx = fiber.index;
    device_switch(&scheduler_sp, fiber.sp);
    if (fiber.state == State::done) {
        spare[spares++] = fiber.stack;
        fiber.stack = nullptr;
    }
}

// --- what a block's threads wait for ----------------------------------------------------------------------------------

static bool broken(const char* what, int line) {
    snprintf(message, sizeof message, "%s, line %d, block (%u, %u, %u)", what, line, blockIdx.x, blockIdx.y, blockIdx.z);
    return false;
}

// A warp operation with a full mask is complete when all lanes of the warp stand at it.
static bool complete_warps(int threads) {
    bool any = false;
    for (int first = 0; first < threads; first += LANES) {
        const Fiber& leader = fibers[first];
        bool all = leader.state == State::at_warp && first + LANES <= threads;
        for (int lane = 0; lane < LANES && all; ++lane) {
            const Fiber& other = fibers[first + lane];
            all = other.state == State::at_warp && other.site == leader.site;
        }
        if (!all) continue;
        for (int lane = first; lane < first + LANES; ++lane) {
            taken[lane] = fibers[lane].given;
            fibers[lane].state = State::ready;
        }
        any = true;
    }
    return any;
}

// All threads stand still: at one barrier, or something is wrong.
static bool pass_barrier(int threads) {
    const Fiber* first = nullptr;
    int done = 0;
    for (int i = 0; i < threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state == State::done) {
            ++done;
            continue;
        }
        if (fiber.state == State::at_warp) return broken("a warp operation that not all lanes reach", fiber.line);
        if (first == nullptr) first = &fiber;
        if (fiber.site != first->site) return broken("threads of a block at different barriers", fiber.line);
    }
    if (done > 0) return broken("a barrier that not all threads reach", first->line);
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
    return true;
}

// Schedule 0: in order, 1: backward, others: an order of their own.
static uint64_t in_order(uint64_t k, uint64_t count, unsigned schedule) {
    if (schedule == 0) return k;
    if (schedule == 1) return count - 1 - k;
    uint64_t step = schedule * 2654435761ull % count | 1;
    auto common = [](uint64_t a, uint64_t b) {
        while (b) a = std::exchange(b, a % b);
        return a;
    };
    while (common(step, count) != 1) ++step;
    return (k * step + schedule) % count;
}

static bool run_block(int threads) {
    if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
    for (int i = 0; i < threads; ++i) fibers[i].state = State::fresh;
    for (;;) {
        bool ran = false;
        int done = 0;
        for (int k = 0; k < threads; ++k) {
            const int i = turns[k];
            if (fibers[i].state == State::ready || fibers[i].state == State::fresh) {
                turn(i);
                ran = true;
            }
            done += fibers[i].state == State::done;
        }
        if (done == threads) return true;
        if (complete_warps(threads) || ran) continue;
        if (!pass_barrier(threads)) return false;
    }
}

template <typename T> T exchange(T value, int lane, int site, int line) {
    static_assert(sizeof(T) <= 8, "a warp operation on more than 8 bytes");
    const int me = current;
    fibers[me].given = 0;
    memcpy(&fibers[me].given, &value, sizeof value);
    stop(State::at_warp, site, line);
    memcpy(&value, &taken[me / LANES * LANES + lane % LANES], sizeof value);
    return value;
}

// --- launches -----------------------------------------------------------------------------------------------------------

static void on_fault(int, siginfo_t*, void*) { siglongjmp(outside, 1); }

static bool run_grid(const unsigned* grid, const unsigned* block, unsigned schedule) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const unsigned threads = block[0] * block[1] * block[2];
    if (threads < 1 || threads > MOST_THREADS) return broken("a block of no or too many threads", 0);
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].index = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
        turns[i] = static_cast<int>(in_order(i, threads, schedule));
    }
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t k = 0; k < blocks; ++k) {
        const uint64_t b = in_order(k, blocks, schedule);
        blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / (uint64_t(grid[0]) * grid[1]))};
        if (!run_block(static_cast<int>(threads))) return false;
    }
    return true;
}

// 0, or 1 with a message. A fault, as at the page behind an array, ends the launch and not the process.
static int run(const unsigned* grid, const unsigned* block, unsigned schedule, bool flush) {
    struct sigaction fault = {}, segv, bus;
    fault.sa_sigaction = on_fault;
    fault.sa_flags = SA_SIGINFO | SA_NODEFER;
    message[0] = 0;
    sigaction(SIGSEGV, &fault, &segv);
    sigaction(SIGBUS, &fault, &bus);
#if defined(__SSE__)
    const unsigned control = _mm_getcsr();
    if (flush) _mm_setcsr(control | 0x8040);  // denormal numbers are 0, as with -ftz=true
#endif
    volatile bool fine = false;
    if (sigsetjmp(outside, 0) == 0) fine = run_grid(grid, block, schedule);
    else broken("memory outside of an array, in a thread that last stopped at", fibers[current].line);
#if defined(__SSE__)
    _mm_setcsr(control);
#endif
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    for (Fiber& fiber : fibers) {  // of threads that were left halfway
        if (fiber.stack != nullptr) spare[spares++] = fiber.stack;
        fiber.stack = nullptr;
    }
    return fine ? 0 : 1;
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A>
int launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, unsigned schedule, bool flush, void** given) {
    struct Bound {
        void (*kernel)(A...);
        void** given;
    };
    static Bound bound;
    bound = {kernel, given};
    body = [](void* b) {
        call(static_cast<Bound*>(b)->kernel, static_cast<Bound*>(b)->given, std::index_sequence_for<A...>{});
    };
    body_arguments = &bound;
    return run(grid, block, schedule, flush);
}

// A parameter in four letters: p(ointer) or v(alue), c(onst) or m(utable), its kind as NumPy has it, its bytes.
template <typename T> void describe(char*& out) {
    using Pointed = std::remove_pointer_t<T>;
    using Number = std::remove_const_t<Pointed>;
    *out++ = std::is_pointer_v<T> ? 'p' : 'v';
    *out++ = std::is_const_v<Pointed> ? 'c' : 'm';
    *out++ = std::is_floating_point_v<Number> ? 'f' : std::is_signed_v<Number> ? 'i' : 'u';
    *out++ = static_cast<char>('0' + sizeof(Number));
}

template <typename... A> const char* parameters(void (*)(A...)) {
    static char text[4 * sizeof...(A) + 1];
    char* out = text;
    (describe<A>(out), ...);
    return text;
}

}  // namespace device

extern "C" const char* device_message() { return device::message; }

#define EXPORT(kernel, flush)                                                                                      \
    extern "C" int kernel##__launch(const unsigned* grid, const unsigned* block, unsigned schedule, void** given) { \
        return device::launch(&kernel, grid, block, schedule, flush, given);                                       \
    }                                                                                                              \
    extern "C" const char* kernel##__parameters() { return device::parameters(&kernel); }
