// The norm of gradients: the order in which their squares are summed, the same on every backend and
// any number of threads, and what it clips by.
//
// A chunk's elements are dealt to 32 lanes in turn, each lane adds its squares one after another,
// and then pairs of neighbouring lanes are added until one is left. Likewise are the sums of all
// chunks. It is computed in double, in which a float's square is exact and cannot overflow.
#pragma once

#include "rules/arithmetic.h"

namespace fastopt {

constexpr int kLanes = 32;

FASTOPT_RULE double square(double x) { return x * x; }

// The sum of all lanes, of which it keeps nothing.
FASTOPT_RULE double add_lanes(double (&lane)[kLanes]) {
  for (int count = kLanes / 2; count > 0; count /= 2) {
    for (int l = 0; l < count; ++l) lane[l] = lane[2 * l] + lane[2 * l + 1];
  }
  return lane[0];
}

// What torch.nn.utils.clip_grad_norm_ multiplies by; a norm that is not a number, too, unless
// nothing is to be clipped.
FASTOPT_RULE double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 || max_norm > 1.7976931348623157e308 ? 1 : factor;
}

FASTOPT_RULE bool is_finite(double x) { return x - x == 0; }

}  // namespace fastopt
