// Rounding between storage and arithmetic: bfloat16 and float16 <-> float, round to nearest even,
// in integer and float operations that every compiler vectorises and every backend repeats; but for
// float16 GPUs have instructions, which differ only in which NaN a NaN becomes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rules/arithmetic.h"

namespace fastopt {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
FASTOPT_RULE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FASTOPT_RULE float widen(float x) { return x; }
FASTOPT_RULE double widen(double x) { return x; }
FASTOPT_RULE float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

// Float16's two ranges by one multiplication or subtraction each (M. Dukhan, FP16 library).
FASTOPT_RULE float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t shifted = uint32_t{x.bits} << 16;
  const uint32_t magnitude = shifted << 1;
  const float normal = bit_cast<float>((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bit_cast<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t value =
      magnitude < (1u << 27) ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>((shifted & 0x80000000u) | value);
#endif
}

template <class To>
FASTOPT_RULE To narrow(float x);
template <class To>
FASTOPT_RULE To narrow(double x);

template <>
FASTOPT_RULE float narrow<float>(float x) {
  return x;
}
template <>
FASTOPT_RULE double narrow<double>(double x) {
  return x;
}

// Of 16-bit formats that are a float's upper half: a word whose upper half is the number narrowed.
template <class To>
FASTOPT_RULE uint32_t rounded(float x, uint32_t random = 0);

template <>
FASTOPT_RULE uint32_t rounded<BFloat16>(float x, uint32_t) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x != x ? 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1);
}
template <>
FASTOPT_RULE BFloat16 narrow<BFloat16>(float x) {
  return {static_cast<uint16_t>(rounded<BFloat16>(x) >> 16)};
}

template <>
FASTOPT_RULE Float16 narrow<Float16>(float x) {
#ifdef __CUDA_ARCH__
  Float16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits << 1;
  // Adding a power of two that much larger makes float's own rounding drop the right bits.
  const float scaled = (bit_cast<float>(magnitude >> 1) * 0x1.0p+112f) * 0x1.0p-110f;
  uint32_t bias = magnitude & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const uint32_t value = magnitude > 0xFF000000u ? 0x7E00u : rounded;
  return {static_cast<uint16_t>(((bits >> 16) & 0x8000u) | value)};
#endif
}

}  // namespace fastopt
