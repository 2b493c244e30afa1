// Formats: how the numbers of one tensor are kept in memory. What is loaded from it is computed
// with in float (double for kFloat64); what is stored is rounded once. Rules see none of it.
#pragma once

#include <cstdint>

#include "block.h"
#include "nearest.h"
#include "random.h"
#include "split.h"

namespace fastopt {

enum class Format : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kBFloat16Stochastic,  // rounded stochastically
  kSplit,  // the upper half of a float, which kRemainder, a tensor beside it, completes
  kRemainder,
  kBlockSigned,    // 8 bits a number and a scale a block
  kBlockUnsigned,  // likewise, of what is never negative; rounded stochastically
};

// The format that an array of E has.
template <class E>
constexpr Format kFormatOf = Format::kFloat32;
template <>
inline constexpr Format kFormatOf<double> = Format::kFloat64;
template <>
inline constexpr Format kFormatOf<BFloat16> = Format::kBFloat16;
template <>
inline constexpr Format kFormatOf<Float16> = Format::kFloat16;
template <>
inline constexpr Format kFormatOf<StochasticBFloat16> = Format::kBFloat16Stochastic;
template <>
inline constexpr Format kFormatOf<SplitBFloat16> = Format::kSplit;

// Whether rounding to it takes random bits.
FASTOPT_RULE constexpr bool is_random(Format format) {
  return format == Format::kBFloat16Stochastic || format == Format::kBlockUnsigned;
}

FASTOPT_RULE constexpr bool is_block(Format format) {
  return format == Format::kBlockSigned || format == Format::kBlockUnsigned;
}

// Of one number.
FASTOPT_RULE constexpr int bytes_of(Format format) {
  return format == Format::kFloat64 ? 8 : format == Format::kFloat32 ? 4 : is_block(format) ? 1 : 2;
}

// What storing a gradient and loading it again makes of it.
FASTOPT_RULE float rounded_to(Format format, float x) {
  return format == Format::kBFloat16  ? widen(narrow<BFloat16>(x))
         : format == Format::kFloat16 ? widen(narrow<Float16>(x))
                                      : x;
}
FASTOPT_RULE double rounded_to(Format, double x) { return x; }

}  // namespace fastopt
