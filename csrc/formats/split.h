// A float in two halves: a bfloat16 parameter, which is what the model sees, and a remainder, which
// gives it back the 16 bits that rounding took.
//
// The remainder is the lower half as a signed number, and the parameter the upper half, plus one
// where that is negative: so the parameter is the float rounded to nearest, a tie away from zero,
// and every float comes back exactly.
#pragma once

#include <cstdint>

#include "nearest.h"

namespace fastopt {

struct SplitBFloat16 {
  uint16_t bits;
};

FASTOPT_RULE float widen(SplitBFloat16 x) { return widen(BFloat16{x.bits}); }

// NaN as one pattern: the payload of another could carry into the sign.
FASTOPT_RULE uint32_t split_bits(float x) { return x != x ? 0x7FC00000u : bit_cast<uint32_t>(x); }

template <>
FASTOPT_RULE uint32_t rounded<SplitBFloat16>(float x, uint32_t) {
  return split_bits(x) + 0x8000u;
}
template <>
FASTOPT_RULE SplitBFloat16 narrow<SplitBFloat16>(float x) {
  return {static_cast<uint16_t>(rounded<SplitBFloat16>(x) >> 16)};
}

struct Remainder {
  int16_t bits;
};

template <>
FASTOPT_RULE Remainder narrow<Remainder>(float x) {
  return {static_cast<int16_t>(static_cast<uint16_t>(split_bits(x)))};
}

// The float that was split. Where somebody has overwritten the parameter since, the remainder of
// the old value must not turn zero or infinity into NaN, as no split of a float does.
FASTOPT_RULE float join(float parameter, int32_t remainder) {
  const uint32_t bits = bit_cast<uint32_t>(parameter);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const bool stale =
      (magnitude == 0 && remainder < 0) || (magnitude == 0x7F800000u && remainder > 0);
  return bit_cast<float>(bits + static_cast<uint32_t>(stale ? 0 : remainder));
}
FASTOPT_RULE float join(float parameter, Remainder remainder) {
  return join(parameter, int32_t{remainder.bits});
}

}  // namespace fastopt
