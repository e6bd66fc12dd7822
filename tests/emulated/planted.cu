// Kernels with one mistake each, and the same without it: the emulation must tell them apart. THREADS is 64.

#define PLANTED(name) extern "C" __global__ void name

PLANTED(reversed)(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// A neighbour's number is read before it may have been written.
PLANTED(reversed_without_barrier)(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// The same, where threads that run in order happen to be right.
PLANTED(shifted_without_barrier)(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = threadIdx.x ? s[threadIdx.x - 1] : 0.0f;
}

// Shared memory is not zero when a block begins.
PLANTED(uninitialised_shared)(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] += x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

// What the last block left in shared memory is not there either.
PLANTED(shared_of_the_last_block)(const float* x, float* y) {
    __shared__ float s[64];
    if (blockIdx.x == 0) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (blockIdx.x == gridDim.x - 1) y[threadIdx.x] = s[threadIdx.x];
}

PLANTED(early_exit)(const float* x, float* y) {
    __shared__ float s[64];
    if (threadIdx.x >= 40) return;
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[0];
}

PLANTED(divergent_barrier)(const float* x, float* y) {
    if (threadIdx.x < 32) {
        y[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
    } else {
        __syncthreads();
        y[threadIdx.x] = x[threadIdx.x];
    }
}

// Half a warp at a shuffle of the whole.
PLANTED(partial_shuffle)(const float* x, float* y) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(0xffffffffu, v, 8);
    y[threadIdx.x] = v;
}

// One element too many, by a write or by a read.
PLANTED(write_behind)(const float* x, float* y) {
    y[threadIdx.x + 1] = x[threadIdx.x];
}

PLANTED(read_behind)(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x + 1];
}

// Far outside: behind, and in front of the array.
PLANTED(write_far)(const float* x, float* y) {
    y[threadIdx.x + 1024] = x[threadIdx.x];
}

PLANTED(read_before)(const float* x, float* y) {
    y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 2048];
}

// Who comes last wins: which thread that is depends on the order of the blocks.
PLANTED(race_of_blocks)(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x] + blockIdx.x;
}

// A sum in an order that depends on who comes first.
PLANTED(sum_in_any_order)(const float* x, float* y) {
    __shared__ float total;
    if (threadIdx.x == 0) total = 0.0f;
    __syncthreads();
    total += x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = total;
}
