// Adamax, Adam by the largest gradient: the arithmetic, once, for host and device.
//
//   Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct Adamax {
  static constexpr const char* kName = "adamax";
  static constexpr State kStates[] = {{"step"}, {"exp_avg"}, nonnegative("exp_inf")};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 2;

  // A param group's values under kOptions, in this order; the two of a pair have its name.
  static constexpr const char* kOptions[] = {"lr",  "betas",        "betas",
                                             "eps", "weight_decay", "maximize"};
  struct Options {
    double lr, beta1, beta2, eps, weight_decay, maximize;
  };
  static unsigned states(const Options&) { return 0b11; }

  template <class T>
  struct Scalars {
    T sign, l2, weight1, beta2, eps, step_size;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.l2 = T(o.weight_decay);
    k.weight1 = T(1 - o.beta1);
    k.beta2 = T(o.beta2);
    k.eps = T(o.eps);
    k.step_size = T(o.lr / (1 - power(o.beta1, t)));
    return k;
  }

  // Per element: s holds m and u.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& m = s[0];
    T& u = s[1];
    g *= k.sign;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    m = lerp(m, g, k.weight1);
    u = maximum(k.beta2 * u, maximum(g, -g) + k.eps);
    p = multiply_add(-k.step_size, m / u, p);
  }
};

}  // namespace fastopt
