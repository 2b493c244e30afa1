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

// Two neighbours of 16 bits are a word, which to shift and to mask widens and narrows: vectors of
// 16 bits would be shuffled, for which AVX2 has few ports beside those that divide. So the first
// ones of all pairs are taken, then the second ones. (AVX-512 narrows in one instruction.)
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kTakesEveryOther = true;
#else
constexpr bool kTakesEveryOther = false;
#endif

constexpr uint32_t kUpper = 0xFFFF0000u;

FASTOPT_RULE uint32_t load_word(const void* data, int64_t i) {
  uint32_t word;
  memcpy(&word, static_cast<const char*>(data) + 4 * i, sizeof word);
  return word;
}
// One half of a word, which x has where kSecond says; the other stays.
template <bool kSecond>
FASTOPT_RULE void store_half(void* data, int64_t i, uint32_t x) {
  constexpr uint32_t kHalf = kSecond ? kUpper : ~kUpper;
  const uint32_t word = (load_word(data, i) & ~kHalf) | (x & kHalf);
  memcpy(static_cast<char*>(data) + 4 * i, &word, sizeof word);
}

template <class E>
struct Array {
  static constexpr Format kFormat = kFormatOf<E>;
  E* data;

  static Array of(const Slot& slot, int place, int, int64_t begin) {
    return {at<E>(slot, place, begin)};
  }
  FASTOPT_RULE Array from(int64_t i) const { return {data + i}; }

  FASTOPT_RULE auto load(int64_t i) const { return widen(data[i]); }
  template <class T>
  FASTOPT_RULE void store(int64_t i, T x, uint32_t random) const {
    data[i] = narrow<E>(x, random);
  }
  template <class T>
  FASTOPT_RULE static T as_stored(T x) {
    return widen(narrow<E>(x));
  }
};

// Of an array the first or the second ones of all pairs.
template <class E, bool kSecond>
struct EveryOther {
  E* data;

  FASTOPT_RULE float load(int64_t i) const {
    const uint32_t word = load_word(data, i);
    return bit_cast<float>(kSecond ? word & kUpper : word << 16);
  }
  FASTOPT_RULE void store(int64_t i, float x, uint32_t random) const {
    const uint32_t upper = rounded<E>(x, random);
    store_half<kSecond>(data, i, kSecond ? upper : upper >> 16);
  }
};
template <bool kSecond, class E>
FASTOPT_RULE EveryOther<E, kSecond> every_other(Array<E> array) {
  return {array.data};
}

template <class T>
struct Strided {
  T* data;
  int64_t stride;

  FASTOPT_RULE T load(int64_t i) const { return data[i * stride]; }
  FASTOPT_RULE void store(int64_t i, T x, uint32_t) const { data[i * stride] = x; }
  FASTOPT_RULE static T as_stored(T x) { return x; }
};

// A parameter and its remainder.
struct Halves {
  static constexpr Format kFormat = Format::kSplit;
  SplitBFloat16* upper;
  Remainder* lower;

  static Halves of(const Slot& slot, int place, int rest, int64_t begin) {
    return {at<SplitBFloat16>(slot, place, begin), at<Remainder>(slot, rest, begin)};
  }
  FASTOPT_RULE Halves from(int64_t i) const { return {upper + i, lower + i}; }

  FASTOPT_RULE float load(int64_t i) const { return join(widen(upper[i]), lower[i]); }
  FASTOPT_RULE void store(int64_t i, float x, uint32_t) const {
    upper[i] = narrow<SplitBFloat16>(x);
    lower[i] = narrow<Remainder>(x);
  }
};

template <bool kSecond>
struct EveryOtherSplit {
  EveryOther<SplitBFloat16, kSecond> upper;
  Remainder* lower;

  FASTOPT_RULE float load(int64_t i) const {
    const uint32_t word = load_word(lower, i);
    return join(upper.load(i), static_cast<int32_t>(kSecond ? word : word << 16) >> 16);
  }
  FASTOPT_RULE void store(int64_t i, float x, uint32_t) const {
    upper.store(i, x, 0);
    store_half<kSecond>(lower, i, kSecond ? split_bits(x) << 16 : split_bits(x));
  }
};
template <bool kSecond>
FASTOPT_RULE EveryOtherSplit<kSecond> every_other(Halves halves) {
  return {{halves.upper}, halves.lower};
}

// Whether every_other takes it.
template <class A>
constexpr bool kIn16Bits = false;
template <class E>
constexpr bool kIn16Bits<Array<E>> = sizeof(E) == 2;
template <>
inline constexpr bool kIn16Bits<Halves> = true;

// A gradient, clipped as if that were written, and rounded, before it is read.
template <class From>
struct Clipped {
  From from;
  double factor;

  FASTOPT_RULE auto load(int64_t i) const {
    const auto x = from.load(i);
    return from.as_stored(x * decltype(x)(factor));
  }
};

// Of n gradients what the innermost loop reads. Those of 16 bits are clipped beforehand, into
// `room`: to round them in the loop would cost a tenth of a step that clips nothing, and a second
// loop is as much machine code again for every rule.
__attribute__((noinline)) inline Array<BFloat16> clipped(Array<BFloat16> grad, double factor,
                                                         int64_t n, BFloat16* room) {
  if (factor == 1) return grad;
  const Clipped<Array<BFloat16>> from{grad, factor};
  FASTOPT_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) room[i] = narrow<BFloat16>(from.load(i));
  return {room};
}
template <class T>
Clipped<Array<T>> clipped(Array<T> grad, double factor, int64_t, BFloat16*) {
  return {grad, factor};
}

}  // namespace
}  // namespace fastopt::cpu
