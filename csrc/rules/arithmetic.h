// The few operations rules share. Like the rules: no torch, no CUDA runtime, no Python, no dtypes.
//
// Every backend must produce the same bits, so rules use only + - * / sqrt, comparisons and what is
// here, compiled without contraction (no FMA) and without fast-math: IEEE 754 leaves one answer.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FASTOPT_RULE __host__ __device__ __forceinline__
#else
// always_inline: an out-of-line copy compiled for AVX-512 could be merged with the baseline's.
#define FASTOPT_RULE inline __attribute__((always_inline))
#endif

namespace fastopt {

// beta^t for t = 1, 2, 3, ... by repeated squaring; libm's pow differs between host and device.
FASTOPT_RULE double power(double beta, double t) {
  double result = 1;
  // Past 2^53 a count no longer grows; a negative one, which only a broken checkpoint has, counts
  // 0.
  for (auto n = static_cast<unsigned long long>(t < 0 ? 0 : t < 9e15 ? t : 9e15); n; n >>= 1) {
    if (n & 1) result *= beta;
    beta *= beta;
  }
  return result;
}

// torch.lerp: exact at both ends, hence the two forms.
template <class T>
FASTOPT_RULE T lerp(T from, T to, T weight) {
  return weight < T(0.5) ? from + weight * (to - from) : to - (T(1) - weight) * (to - from);
}

// torch.maximum: a NaN on either side stays.
template <class T>
FASTOPT_RULE T maximum(T a, T b) {
  return b > a || b != b ? b : a;
}

FASTOPT_RULE float square_root(float x) { return sqrtf(x); }
FASTOPT_RULE double square_root(double x) { return sqrt(x); }

}  // namespace fastopt
