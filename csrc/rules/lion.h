// Lion: the arithmetic, once, for host and device.
//
//   Chen et al., Symbolic Discovery of Optimization Algorithms, 2023
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr State kStates[] = {{"exp_avg"}};
  static constexpr int kCounts = 0;
  static constexpr int kFewestStates = 1;

  // A param group's values under kOptions, in this order; the two of a pair have its name.
  static constexpr const char* kOptions[] = {"lr", "betas", "betas", "weight_decay", "maximize"};
  struct Options {
    double lr, beta1, beta2, weight_decay, maximize;
  };
  static unsigned states(const Options&) { return 0b1; }

  template <class T>
  struct Scalars {
    T sign, decay, weight1, weight2, lr;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.decay = T(1 - o.lr * o.weight_decay);
    k.weight1 = T(1 - o.beta1);
    k.weight2 = T(1 - o.beta2);
    k.lr = T(o.lr);
    return k;
  }

  // Per element: s holds the momentum.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& m = s[0];
    g *= k.sign;
    p *= k.decay;
    p = multiply_add(-k.lr, sign(lerp(m, g, k.weight1)), p);
    m = lerp(m, g, k.weight2);
  }
};

}  // namespace fastopt
