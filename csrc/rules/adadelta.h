// Adadelta: the arithmetic, once, for host and device.
//
//   Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct Adadelta {
  static constexpr const char* kName = "adadelta";
  static constexpr State kStates[] = {
      {"step"}, nonnegative("square_avg"), nonnegative("acc_delta")};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 2;

  // A param group's values under kOptions, in this order.
  static constexpr const char* kOptions[] = {"lr", "rho", "eps", "weight_decay", "maximize"};
  struct Options {
    double lr, rho, eps, weight_decay, maximize;
  };
  static unsigned states(const Options&) { return 0b11; }

  template <class T>
  struct Scalars {
    T sign, l2, rho, weight, eps, lr;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.l2 = T(o.weight_decay);
    k.rho = T(o.rho);
    k.weight = T(1 - o.rho);
    k.eps = T(o.eps);
    k.lr = T(o.lr);
    return k;
  }

  // Per element: s holds the average squares of the gradient and of what it became.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& v = s[0];
    T& u = s[1];
    g *= k.sign;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    v = multiply_add(k.weight * g, g, k.rho * v);
    const T delta = square_root(u + k.eps) / square_root(v + k.eps) * g;
    u = multiply_add(k.weight * delta, delta, k.rho * u);
    p = multiply_add(-k.lr, delta, p);
  }
};

}  // namespace fastopt
