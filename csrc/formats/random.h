// Random bits for stochastic rounding: a hash of (step, role, index in the whole parameter). So
// they are the same on every backend and any number of threads or ranks, and of a resumed run;
// there is no generator whose state could be lost.
#pragma once

#include <cstdint>

#include "nearest.h"

namespace fastopt {

// A permutation of 32-bit integers in which every bit of x changes every other with a probability
// near 1/2 (C. Wellons, Prospecting for Hash Functions, 2018: lowbias32).
FASTOPT_RULE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of a step, be its number as large or odd as users' checkpoints make it.
FASTOPT_RULE uint32_t seed_of(double step) {
  const uint64_t bits = bit_cast<uint64_t>(step);
  return mix(static_cast<uint32_t>(bits) ^ mix(static_cast<uint32_t>(bits >> 32)));
}

// What the elements of a tensor are rounded with in a step: 16 bits for each index. A hash has 32,
// and is shared with a neighbouring place of the slot.
struct Random {
  uint32_t key, shift;

  FASTOPT_RULE uint32_t bits(uint32_t index) const { return mix(key + index) >> shift & 0xFFFFu; }
};
FASTOPT_RULE Random random_of(uint32_t seed, int place) {
  return {mix(seed + 0x9E3779B9u * static_cast<uint32_t>(place / 2)), place % 2 * 16u};
}

// bfloat16 as kept where averages are: rounded up as often as the part that is dropped is large, so
// that what is lost in one step is made up for in others. Nearest would keep an average that falls
// by less than half a bfloat16 a step where it is.
struct StochasticBFloat16 {
  uint16_t bits;
};

FASTOPT_RULE float widen(StochasticBFloat16 x) { return widen(BFloat16{x.bits}); }

// A number of another kind is rounded to nearest and needs no random bits.
template <class To, class From>
FASTOPT_RULE To narrow(From x, uint32_t) {
  return narrow<To>(x);
}
template <>
FASTOPT_RULE uint32_t rounded<StochasticBFloat16>(float x, uint32_t random) {
  return x != x ? 0x7FC00000u : bit_cast<uint32_t>(x) + random;
}
template <>
FASTOPT_RULE StochasticBFloat16 narrow<StochasticBFloat16>(float x, uint32_t random) {
  return {static_cast<uint16_t>(rounded<StochasticBFloat16>(x, random) >> 16)};
}

}  // namespace fastopt
