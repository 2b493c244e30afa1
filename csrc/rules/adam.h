// Adam, AdamW and AMSGrad: the arithmetic, once, for host and device.
//
//   Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015
//   Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019
//   Reddi, Kale & Kumar, On the Convergence of Adam and Beyond, 2018
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct Adam {
  static constexpr const char* kName = "adam";
  // Keys of the state: counts, which advance updates, then what update does.
  static constexpr State kStates[] = {
      {"step"}, {"exp_avg"}, nonnegative("exp_avg_sq"), nonnegative("max_exp_avg_sq")};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 2;

  // A param group's values under kOptions, in this order; the two of a pair have its name.
  static constexpr const char* kOptions[] = {
      "lr",           "betas",   "betas",    "eps",
      "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"};
  struct Options {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay;
  };
  static unsigned states(const Options& o) { return o.amsgrad != 0 ? 0b111 : 0b011; }

  template <class T>
  struct Scalars {
    T sign, decay, l2, weight1, beta2, weight2, step_size, root_correction2, eps;
  };

  // Per slot: everything about step t that is not per element, in double, rounded to T once.
  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count*) {
    const bool decoupled = o.decoupled_weight_decay != 0;
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.decay = T(decoupled ? 1 - o.lr * o.weight_decay : 1);
    k.l2 = T(decoupled ? 0 : o.weight_decay);
    k.weight1 = T(1 - o.beta1);
    k.beta2 = T(o.beta2);
    k.weight2 = T(1 - o.beta2);
    k.step_size = T(o.lr / (1 - power(o.beta1, t)));
    k.root_correction2 = T(square_root(1 - power(o.beta2, t)));
    k.eps = T(o.eps);
    return k;
  }

  // Per element: s holds m, v and, for AMSGrad, the largest v so far.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& m = s[0];
    T& v = s[1];
    g *= k.sign;
    p *= k.decay;
    if (k.l2 != T(0))
      g = multiply_add(k.l2, p, g);  // no 0 * inf: without decay an infinite p stays infinite
    m = lerp(m, g, k.weight1);
    v = multiply_add(k.weight2 * g, g, k.beta2 * v);
    if constexpr (kStates == 3) s[2] = maximum(s[2], v);
    const T denominator = square_root(s[kStates - 1]) / k.root_correction2 + k.eps;
    p -= k.step_size * m / denominator;
  }
};

}  // namespace fastopt
