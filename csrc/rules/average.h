// An exponential moving average: the arithmetic, once, for host and device.
//
// No optimizer: its parameter is the average, its gradient what is averaged. At weight 1, that of
// the first step, it is an assignment: so gradients are clipped where they lie.
//
//   torch.optim.swa_utils.get_ema_multi_avg_fn
#pragma once

#include <array>

#include "arithmetic.h"

namespace fastopt {

struct Average {
  static constexpr const char* kName = "average";
  static constexpr std::array<State, 0> kStates{};
  static constexpr int kCounts = 0;
  static constexpr int kFewestStates = 0;

  static constexpr const char* kOptions[] = {"decay"};
  struct Options {
    double decay;
  };
  static unsigned states(const Options&) { return 0; }

  template <class T>
  struct Scalars {
    T weight;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count*) {
    return {T(t == 1 ? 1 : 1 - o.decay)};
  }

  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T*) {
    p = lerp(p, g, k.weight);
  }
};

}  // namespace fastopt
