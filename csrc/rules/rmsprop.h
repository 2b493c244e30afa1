// RMSprop, with momentum and centered: the arithmetic, once, for host and device.
//
//   Tieleman & Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012
//   Graves, Generating Sequences With Recurrent Neural Networks, 2013 (centered)
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct RMSprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr State kStates[] = {
      {"step"}, nonnegative("square_avg"), {"momentum_buffer"}, {"grad_avg", "0", Narrow::kExact}};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 1;

  // A param group's values under kOptions, in this order.
  static constexpr const char* kOptions[] = {"lr",       "alpha",    "eps",     "weight_decay",
                                             "momentum", "centered", "maximize"};
  struct Options {
    double lr, alpha, eps, weight_decay, momentum, centered, maximize;
  };
  static unsigned states(const Options& o) {
    return 0b001 | (o.momentum > 0 ? 0b010 : 0) | (o.centered != 0 ? 0b100 : 0);
  }

  template <class T>
  struct Scalars {  // flags are T: GCC does not vectorise where a bool chooses
    T sign, l2, alpha, weight, eps, momentum, lr, centered;
  };

  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.l2 = T(o.weight_decay);
    k.alpha = T(o.alpha);
    k.weight = T(1 - o.alpha);
    k.eps = T(o.eps);
    k.momentum = T(o.momentum > 0 ? o.momentum : 0);
    k.lr = T(o.lr);
    k.centered = T(o.centered != 0);
    return k;
  }

  // Per element: s holds v and, of b and a, those in use.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& v = s[0];
    g *= k.sign;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    v = multiply_add(k.weight * g, g, k.alpha * v);
    T variance = v;
    if constexpr (kStates > 1) {
      T& a = s[kStates - 1];
      const T average = lerp(a, g, k.weight);
      a = k.centered != T(0) ? average : a;
      variance = k.centered != T(0) ? multiply_add(-a, a, v) : v;
    }
    T direction = g / (square_root(variance) + k.eps);
    if constexpr (kStates > 1) {
      T& b = s[1];
      const bool moves = kStates == 3 || k.centered == T(0);
      const T moved = multiply_add(k.momentum, b, direction);
      direction = moves ? moved : direction;
      b = moves ? moved : b;
    }
    p = multiply_add(-k.lr, direction, p);
  }
};

}  // namespace fastopt
