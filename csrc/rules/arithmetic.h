// The few operations rules share. Like the rules: no torch, no CUDA runtime, no Python, no dtypes.
//
// Every backend must produce the same bits, so rules use only + - * / sqrt, comparisons and what is
// here, compiled without fast-math and without contraction: IEEE 754 leaves one answer. A fused
// multiply-add is used where a rule says so, never where a compiler thinks of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// a * b + c rounded once, wherever torch's own fused steps do: on CPUs with FMA the results are
// theirs bit for bit. (Rounding twice would also leave Adam's exp_avg 1.16 times as far from the
// truth: RMS against float64 over 20 steps.)
FASTOPT_RULE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
FASTOPT_RULE float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__aarch64__)
  return fmaf(a, b, c);
#else
  // libm's would not vectorise. The product is exact in double. Its sum with c is rounded to odd
  // (an inexact sum never takes its even neighbour), and then rounding to float is as if at once.
  const double product = double(a) * double(b);
  double sum = product + c;
  const double added = sum - product;
  const double error = (product - (sum - added)) + (c - added);
  int64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  const bool inexact = error > 0 || error < 0;  // false for NaN, too
  bits += inexact && !(bits & 1) ? ((error > 0) == (sum > 0) ? 1 : -1) : 0;
  memcpy(&sum, &bits, sizeof bits);
  return float(sum);
#endif
}

// torch.lerp: exact at both ends, hence the two forms.
template <class T>
FASTOPT_RULE T lerp(T from, T to, T weight) {
  return weight < T(0.5) ? multiply_add(weight, to - from, from)
                         : multiply_add(weight - T(1), to - from, to);
}

// torch.maximum: a NaN on either side stays.
template <class T>
FASTOPT_RULE T maximum(T a, T b) {
  return b > a || b != b ? b : a;
}

FASTOPT_RULE float square_root(float x) { return sqrtf(x); }
FASTOPT_RULE double square_root(double x) { return sqrt(x); }

}  // namespace fastopt
