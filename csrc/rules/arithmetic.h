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

FASTOPT_RULE float square_root(float x) { return sqrtf(x); }
FASTOPT_RULE double square_root(double x) { return sqrt(x); }

// beta^t, where libm's pow differs between host and device: the whole part of t by repeated
// squaring, and a fraction, which averaged counts have, by square roots from its last bit up.
FASTOPT_RULE double power(double beta, double t) {
  if (t != t) return t;
  const double magnitude = t < 0 ? -t : t;
  const double kept = magnitude < 9e15 ? magnitude : 9e15;  // past 2^53 a count no longer grows
  auto whole = static_cast<unsigned long long>(kept);
  auto fraction = static_cast<unsigned long long>((kept - static_cast<double>(whole)) * 0x1p53);
  double result = 1;
  if (fraction) {
    for (int bit = 0; bit < 53; ++bit, fraction >>= 1) {
      result = square_root(fraction & 1 ? result * beta : result);
    }
  }
  for (double square = beta; whole; whole >>= 1) {
    if (whole & 1) result *= square;
    square *= square;
  }
  return t < 0 ? 1 / result : result;
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

}  // namespace fastopt
