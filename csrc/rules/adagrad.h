// Adagrad: the arithmetic, once, for host and device.
//
//   Duchi, Hazan & Singer, Adaptive Subgradient Methods for Online Learning and Stochastic
//   Optimization, 2011
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr State kStates[] = {{"step"}, nonnegative("sum", "initial_accumulator_value")};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 1;

  // A param group's values under kOptions, in this order.
  static constexpr const char* kOptions[] = {"lr", "lr_decay", "weight_decay", "eps", "maximize"};
  struct Options {
    double lr, lr_decay, weight_decay, eps, maximize;
  };
  static unsigned states(const Options&) { return 0b1; }

  template <class T>
  struct Scalars {
    T sign, l2, step_size, eps;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.l2 = T(o.weight_decay);
    k.step_size = T(o.lr / (1 + (t - 1) * o.lr_decay));
    k.eps = T(o.eps);
    return k;
  }

  // Per element: s holds the sum of squares.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    g *= k.sign;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    s[0] = multiply_add(g, g, s[0]);
    p -= k.step_size * g / (square_root(s[0]) + k.eps);
  }
};

}  // namespace fastopt
