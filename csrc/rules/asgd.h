// Averaged stochastic gradient descent: the arithmetic, once, for host and device.
//
//   Polyak & Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct ASGD {
  static constexpr const char* kName = "asgd";
  static constexpr State kStates[] = {
      {"step"}, {"eta", "lr"}, {"mu", "1"}, {"ax", "0", Narrow::kExact}};
  static constexpr int kCounts = 3;
  static constexpr int kFewestStates = 1;

  // A param group's values under kOptions, in this order.
  static constexpr const char* kOptions[] = {"lr", "lambd",        "alpha",
                                             "t0", "weight_decay", "maximize"};
  struct Options {
    double lr, lambd, alpha, t0, weight_decay, maximize;
  };
  static unsigned states(const Options&) { return 0b1; }

  template <class T>
  struct Scalars {
    T sign, l2, decay, eta, mu;
  };

  // The counts beside the step's are the rate and the average's weight: this step goes by what the
  // one before has left, and leaves the next one's.
  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count* c) {
    Count& eta = c[0];
    Count& mu = c[1];
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.l2 = T(o.weight_decay);
    k.decay = T(1 - o.lambd * eta.value);
    k.eta = T(eta.value);
    k.mu = T(mu.value);
    eta.value = eta.rounded(o.lr / power(1 + o.lambd * o.lr * t, o.alpha));
    mu.value = mu.rounded(1 / (t - o.t0 > 1 ? t - o.t0 : 1));
    return k;
  }

  // Per element: s holds the average.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    g *= k.sign;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    p = multiply_add(-k.eta, g, p * k.decay);
    s[0] = k.mu == T(1) ? p : multiply_add(k.mu, p - s[0], s[0]);
  }
};

}  // namespace fastopt
