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

// base^exponent, as exp(exponent * log(base)), for 0 and positive normal bases and any exponent:
// libm's differs between host and device. A bias correction 1 - beta^t magnifies the error of a
// beta^t near 1, RAdam's at beta2 = 0.999 by 100,000. So the logarithm and its product with the
// exponent are kept as sums of two doubles, x + x_low. Powers above 0.8 are then off by at most
// 0.56 ulp, and those above 1e-17, next to which 1 stays 1, by at most 1.5
// (tests/test_arithmetic.py).
//
// Both series are Taylor's: log(m) = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...) for s = (m - 1) / (m
// + 1), |s| < 0.172, and exp(r) = 1 + r + r^2/2! + ... for |r| < 0.35.
FASTOPT_RULE double power(double base, double exponent) {
  constexpr double kLog2 = 0x1.62e42feep-1, kLog2Low = 0x1.a39ef35793c76p-33;
  // base = 2^e m, with m between the roots of 1/2, whose bits these are, and 2.
  int64_t bits;
  memcpy(&bits, &base, sizeof bits);
  const int64_t e = (bits - 0x3fe6a09e667f3bcd) >> 52;
  bits -= e * (int64_t{1} << 52);
  double m;
  memcpy(&m, &bits, sizeof m);
  const double f = m - 1;
  const double d = f + 2, d_low = f - (d - 2);
  const double s = f / d, s_low = (multiply_add(-s, d, f) - s * d_low) / d;
  double series = 0;
  for (int n = 23; n >= 3; n -= 2) series = series * (s * s) + 1.0 / n;
  const double high = double(e) * kLog2, low = double(e) * kLog2Low;
  const double sum = high + 2 * s;
  const double rest = (2 * s - (sum - high)) + (2 * (s_low + s * (s * s) * series) + low);
  const double log = sum + rest, log_low = rest - (log - sum);

  // The product and, apart, 2^k of its exponential. Outside the range of doubles any size will do.
  const double product = exponent * log;
  const bool in_range = product > -708 && product < 709;
  const double x = product <= -708 ? -708 : product >= 709 ? 709 : product;
  const double x_low = in_range ? multiply_add(exponent, log, -product) + exponent * log_low : 0;
  constexpr double kShift = 0x1.8p52 + 1023;  // a sum with it has no fraction, and k + 1023 as its
  const double shifted = x * 0x1.71547652b82fep0 + kShift, k = shifted - kShift;  // last bits
  const double r = x - k * kLog2, r_low = x_low - k * kLog2Low;
  const double t = r + r_low, t_low = r_low - (t - r);
  double q = 1;
  for (int n = 14; n >= 3; --n) q = t * (1.0 / n) * q + 1;
  const double one = t + 1;
  const double result = one + ((t - (one - 1)) + (t_low + t * t / 2 * q));
  uint64_t scale_bits;
  memcpy(&scale_bits, &shifted, sizeof scale_bits);
  scale_bits <<= 52;
  double scale;
  memcpy(&scale, &scale_bits, sizeof scale);

  if (base > 0) return result * scale;
  const double zero = base - base;
  return base == 0 ? (exponent > 0 ? 0 : 1) : zero / zero;  // of a negative base or NaN: NaN
}

// What a narrow format may do to a state: that of kUnsigned, which is never negative, tells the
// least number from 0; where one that must be kExact is in use, none is narrowed.
enum class Narrow { kSigned, kUnsigned, kExact };

// A key of the state in torch's name, what its values are before the first step: a number, or the
// param group's under that key; and how it can be narrowed.
struct State {
  const char* name;
  const char* first = "0";
  Narrow narrow = Narrow::kSigned;
};

// Such as an average of squares.
constexpr State nonnegative(const char* name, const char* first = "0") {
  return {name, first, Narrow::kUnsigned};
}

// A number of the state that advance counts on, rounded to the dtype it is kept in.
struct Count {
  double value;
  bool is_float;

  FASTOPT_RULE double rounded(double x) const { return is_float ? double(float(x)) : x; }
};

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

// torch.sign: of NaN it is 0.
template <class T>
FASTOPT_RULE T sign(T x) {
  return T(x > T(0)) - T(x < T(0));
}

}  // namespace fastopt
