// Stochastic gradient descent with momentum: the arithmetic, once, for host and device.
//
//   Sutskever et al., On the importance of initialization and momentum in deep learning, 2013,
//   in torch's variant: the learning rate multiplies the momentum, not what goes into it.
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct SGD {
  static constexpr const char* kName = "sgd";
  // Keys of the state: counts, which advance updates, then what update does.
  static constexpr State kStates[] = {{"momentum_buffer"}};
  static constexpr int kCounts = 0;
  static constexpr int kFewestStates = 0;

  // A param group's values under kOptions, in this order.
  static constexpr const char* kOptions[] = {"lr",           "momentum", "dampening",
                                             "weight_decay", "nesterov", "maximize"};
  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };
  static unsigned states(const Options& o) { return o.momentum != 0 ? 0b1 : 0b0; }

  template <class T>
  struct Scalars {  // flags are T: GCC does not vectorise where a bool chooses
    T sign, l2, momentum, weight, lr, first, nesterov;
  };

  // Per slot. No step is counted: t is 1 while the momentum buffer is new, 2 ever after.
  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count*) {
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.l2 = T(o.weight_decay);
    k.momentum = T(o.momentum);
    k.weight = T(1 - o.dampening);
    k.lr = T(o.lr);
    k.first = T(t == 1);
    k.nesterov = T(o.nesterov != 0);
    return k;
  }

  // Per element: s holds the momentum buffer, if any.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    g *= k.sign;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    if constexpr (kStates == 1) {
      T& b = s[0];
      b = k.first != T(0)
              ? g
              : multiply_add(k.weight, g, k.momentum * b);  // dampening spares the first gradient
      g = k.nesterov != T(0) ? multiply_add(k.momentum, b, g) : b;
    }
    p = multiply_add(-k.lr, g, p);
  }
};

}  // namespace fastopt
