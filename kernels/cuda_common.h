// What all kernels share: kernels/cuda_source.py puts this text in front of theirs, behind the definitions of REAL (float
// or double), SUFFIX (f32 or f64), and the numbers of the kernel contract (SLOT_*, PRIOR_*, OPTIMIZER_*, FACTOR_BOUND).
// Plain CUDA C++17 without any include: NVRTC, nvcc and, for the tests, g++ compile it.
//
// Rules: reductions add in a fixed order, whatever the grid; there are no atomics. Sizes of whole arrays are 64 bits
// wide. Elementwise loops stride over the grid. Whoever may alias says so by having no __restrict__.

typedef REAL real;
typedef long long int64;
typedef unsigned int uint32;
typedef unsigned long long uint64;

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define THREADS 256  // of every block
#define RESIDENT (sizeof(real) == 4 ? 4 : 3)  // blocks that a multiprocessor has registers for: 64 or 80 of them a thread
#define KERNEL_WITH(name, resident) extern "C" __global__ void __launch_bounds__(THREADS, resident) PASTE(name, SUFFIX)
#define KERNEL(name) KERNEL_WITH(name, RESIDENT)
#define INLINE __device__ __forceinline__

// --- memory: 16 bytes at a time where all of it is aligned ----------------------------------------

constexpr int WIDTH = 16 / sizeof(real);  // numbers in a pack: 4 floats or 2 doubles

template <int N> struct alignas(N * sizeof(real)) Pack {
    real at[N];
};

template <int N> INLINE Pack<N> load(const real* from) { return *reinterpret_cast<const Pack<N>*>(from); }
template <int N> INLINE void store(real* to, const Pack<N>& value) { *reinterpret_cast<Pack<N>*>(to) = value; }

INLINE bool aligned(const void* a) { return (reinterpret_cast<uint64>(a) & 15) == 0; }

// Row and column of element number t of an array with so many columns. Divisions of 64 bits cost many of 32 bits.
struct Place {
    int64 row;
    int column;
};

INLINE Place place(int64 t, int columns) {
    if (t < 0x7fffffff) {
        uint32 row = static_cast<uint32>(t) / static_cast<uint32>(columns);
        return {row, static_cast<int>(static_cast<uint32>(t) - row * static_cast<uint32>(columns))};
    }
    return {t / columns, static_cast<int>(t % columns)};
}

INLINE int64 first_thread() { return static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; }
INLINE int64 all_threads() { return static_cast<int64>(gridDim.x) * blockDim.x; }

// --- sums in a fixed order ------------------------------------------------------------------------

INLINE double warp_sum(double value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// Kernels that sum over the columns of a row give a row a warp, blocks (32, 8), or a block, (256, 1).
INLINE int64 first_row() { return static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y; }
INLINE int64 all_rows() { return static_cast<int64>(gridDim.x) * blockDim.y; }

// The sum over the threads of a row, in each of them. All threads of a block of (256, 1) must come here.
INLINE double row_sum(double value) {
    __shared__ double part[THREADS / 32];
    value = warp_sum(value);
    if (blockDim.x == 32) return value;
    __syncthreads();  // the last row's parts have been read
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    double total = part[0];
    for (int w = 1; w < THREADS / 32; ++w) total += part[w];
    return total;
}

// Kernels that sum over the rows of columns give a block of 256 threads COLUMNS of them, so that a row's piece is one or
// two sectors of memory, and let its threads take rows in turn. sums[r][c] is what the threads of row lane r have; after
// it sums[0][c] is complete.
template <typename T, int LANES, int COLUMNS> INLINE void column_sums(T (*sums)[COLUMNS]) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int t = threadIdx.x; t < half * COLUMNS; t += THREADS)
            sums[t / COLUMNS][t % COLUMNS] += sums[t / COLUMNS + half][t % COLUMNS];
    }
    __syncthreads();
}

// --- numbers --------------------------------------------------------------------------------------

constexpr double HALF_LOG_2PI = 0.91893853320467274178;

// tanh(x / 2) by exp(-|x|), exact to rounding near 0 and far out; NaN stays NaN.
INLINE double tanh_half(double x) {
    double e = exp(-fabs(x));
    return copysign((1.0 - e) / (1.0 + e), x);
}

// --- random numbers: Philox4x32-10, Salmon et al. 2011 --------------------------------------------

struct Words {
    uint32 at[4];
};

// Counter (block, low 32 bits of the row, epoch, purpose << 24 | high bits of the row), key the seed: kernels/backend.py.
INLINE Words philox(uint32 block, uint64 row, uint32 epoch, uint32 purpose, uint64 seed) {
    uint32 c0 = block, c1 = static_cast<uint32>(row), c2 = epoch, c3 = purpose << 24 | static_cast<uint32>(row >> 32);
    uint32 k0 = static_cast<uint32>(seed), k1 = static_cast<uint32>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        uint32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        uint32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// 16 bits of column c, block c / 8.
INLINE uint32 half_word(const Words& words, int column) {
    const int which = column % 8 / 2;  // chosen, not indexed: an array with a computed index would leave the registers
    const uint32 word = which < 2 ? (which ? words.at[1] : words.at[0]) : (which == 2 ? words.at[2] : words.at[3]);
    return column % 2 ? word >> 16 : word & 0xffffu;
}

// In the open interval (0, 1): 52 bits and a half.
INLINE double open_uniform(uint32 a, uint32 b) {
    return (static_cast<double>(a >> 6) * 67108864.0 + static_cast<double>(b >> 6) + 0.5) * 0x1p-52;
}
