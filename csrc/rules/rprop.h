// Resilient backpropagation: the arithmetic, once, for host and device.
//
//   Riedmiller & Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
//   Algorithm, 1993
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct Rprop {
  static constexpr const char* kName = "rprop";
  static constexpr State kStates[] = {{"step"}, {"prev"}, nonnegative("step_size", "lr")};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 2;

  // A param group's values under kOptions, in this order; the two of a pair have its name.
  static constexpr const char* kOptions[] = {"etas", "etas", "step_sizes", "step_sizes",
                                             "maximize"};
  struct Options {
    double eta_minus, eta_plus, smallest, largest, maximize;
  };
  static unsigned states(const Options&) { return 0b11; }

  template <class T>
  struct Scalars {
    T sign, eta_minus, eta_plus, smallest, largest;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.eta_minus = T(o.eta_minus);
    k.eta_plus = T(o.eta_plus);
    k.smallest = T(o.smallest);
    k.largest = T(o.largest);
    return k;
  }

  // Per element: s holds the gradient before, 0 where the sign had changed, and the step's size.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& before = s[0];
    T& size = s[1];
    g *= k.sign;
    const T agreement = g * before;
    const T grown = size * (agreement > T(0) ? k.eta_plus : agreement < T(0) ? k.eta_minus : T(1));
    const T at_least = grown < k.smallest ? k.smallest : grown;
    size = at_least > k.largest ? k.largest : at_least;
    g = agreement < T(0) ? T(0) : g;
    p = multiply_add(-sign(g), size, p);
    before = g;
  }
};

}  // namespace fastopt
