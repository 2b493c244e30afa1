// Arrays: what the innermost loop takes elements from, and brings them back to, where they lie.
//
// Part of apply.cpp, and bound by what is said there.
#pragma once

#include "../slot.h"

// The iterations of the loop that follows do not touch each other's memory: it may be vectorised.
// Where it would not pay, with strides, unrolling takes a quarter off its time.
#ifdef __clang__
#define FASTOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define FASTOPT_UNROLL _Pragma("unroll 8")
#else
#define FASTOPT_INDEPENDENT _Pragma("GCC ivdep")
#define FASTOPT_UNROLL _Pragma("GCC unroll 8")
#endif

namespace fastopt::cpu {
namespace {

template <class E>
E* at(const Slot& slot, int place, int64_t begin) {
  return static_cast<E*>(slot.data[place]) + begin;
}

template <class E>
struct Array {
  static constexpr Format kFormat = kFormatOf<E>;
  E* data;

  static Array of(const Slot& slot, int place, int, int64_t begin) {
    return {at<E>(slot, place, begin)};
  }

  FASTOPT_RULE auto load(int64_t i) const { return widen(data[i]); }
  template <class T>
  FASTOPT_RULE void store(int64_t i, T x, uint32_t random) const {
    data[i] = narrow<E>(x, random);
  }
  template <class T>
  FASTOPT_RULE static T rounded(T x) {
    return widen(narrow<E>(x));
  }
};

template <class T>
struct Strided {
  T* data;
  int64_t stride;

  FASTOPT_RULE T load(int64_t i) const { return data[i * stride]; }
  FASTOPT_RULE void store(int64_t i, T x, uint32_t) const { data[i * stride] = x; }
  FASTOPT_RULE static T rounded(T x) { return x; }
};

// A parameter and its remainder.
struct Halves {
  static constexpr Format kFormat = Format::kSplit;
  SplitBFloat16* upper;
  Remainder* lower;

  static Halves of(const Slot& slot, int place, int rest, int64_t begin) {
    return {at<SplitBFloat16>(slot, place, begin), at<Remainder>(slot, rest, begin)};
  }

  FASTOPT_RULE float load(int64_t i) const { return join(widen(upper[i]), lower[i]); }
  FASTOPT_RULE void store(int64_t i, float x, uint32_t) const {
    upper[i] = narrow<SplitBFloat16>(x);
    lower[i] = narrow<Remainder>(x);
  }
};

// A gradient, clipped as if that were written, and rounded, before it is read.
template <class From>
struct Clipped {
  From from;
  double factor;

  FASTOPT_RULE auto load(int64_t i) const {
    const auto x = from.load(i);
    return from.rounded(x * decltype(x)(factor));
  }
};

// Calls use with the gradient to read. A loop of its own where nothing is clipped: times 1 would
// cost next to nothing, but rounding 16-bit numbers a tenth of a step.
template <class E, class Use>
void with_clipped(Array<E> grad, double factor, Use use) {
  if constexpr (sizeof(E) < sizeof(float)) {
    if (factor == 1) return use(grad);
  }
  use(Clipped<Array<E>>{grad, factor});
}

// A block's codes. What is to be stored is kept until the largest is known.
struct Codes {
  const uint8_t* code;
  uint32_t base, sign_bit;
  float* values;

  FASTOPT_RULE float load(int64_t i) const { return decode(code[i], base, sign_bit); }
  FASTOPT_RULE void store(int64_t i, float x, uint32_t) const { values[i] = x; }
};

template <class Kind>
Codes codes_of(const uint8_t* code, uint8_t scale) {
  return {code, base_of<Kind>(scale), kSignBit<Kind>, nullptr};
}
inline Codes codes_of(Format format, const uint8_t* code, uint8_t scale) {
  return format == Format::kBlockSigned ? codes_of<BlockSigned>(code, scale)
                                        : codes_of<BlockUnsigned>(code, scale);
}

template <class Kind>
__attribute__((noinline)) void store_block(const float* from, int64_t n, uint8_t* codes,
                                           uint8_t* scale, Random random, uint32_t index) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(from[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = static_cast<uint8_t>(scale_of<Kind>(largest));
  const uint32_t base = base_of<Kind>(scale_of<Kind>(largest));
  FASTOPT_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = encode<Kind>(from[i], base, random.bits(index + static_cast<uint32_t>(i)));
  }
}
inline void store_block(Format format, const float* from, int64_t n, uint8_t* codes, uint8_t* scale,
                        Random random, uint32_t index) {
  const auto store =
      format == Format::kBlockSigned ? store_block<BlockSigned> : store_block<BlockUnsigned>;
  store(from, n, codes, scale, random, index);
}

}  // namespace
}  // namespace fastopt::cpu
