// The words of CUDA C++ that the kernels use, for g++; behind device.h.
#pragma once

#define __global__
#define __device__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

using std::copysign;
using std::exp;
using std::fabs;
using std::fmax;
using std::fmin;
using std::isfinite;
using std::log;
using std::log1p;
using std::pow;
using std::sqrt;

#define __syncthreads() device::stop(device::State::at_barrier, __COUNTER__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) device::exchange(value, device::current % 32 ^ (bits), __COUNTER__, __LINE__)
#define __shfl_down_sync(mask, value, by) \
    device::exchange(value, device::current % 32 + int(by) < 32 ? device::current % 32 + (by) : device::current % 32, \
                     __COUNTER__, __LINE__)

static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline void sincospi(double x, double* sine, double* cosine) {
    *sine = std::sin(M_PI * x);
    *cosine = std::cos(M_PI * x);
}
