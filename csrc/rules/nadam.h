// NAdam and NAdamW, Adam with Nesterov's momentum: the arithmetic, once, for host and device.
//
//   Dozat, Incorporating Nesterov Momentum into Adam, 2016
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr State kStates[] = {
      {"step"}, {"mu_product", "1"}, {"exp_avg"}, nonnegative("exp_avg_sq")};
  static constexpr int kCounts = 2;
  static constexpr int kFewestStates = 2;

  // A param group's values under kOptions, in this order; the two of a pair have its name.
  static constexpr const char* kOptions[] = {"lr",
                                             "betas",
                                             "betas",
                                             "eps",
                                             "weight_decay",
                                             "momentum_decay",
                                             "decoupled_weight_decay",
                                             "maximize"};
  struct Options {
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize;
  };
  static unsigned states(const Options&) { return 0b11; }

  template <class T>
  struct Scalars {
    T sign, decay, l2, weight1, beta2, weight2, grad_size, momentum_size, root_correction2, eps;
  };

  // Momentum's decay warms up: mu of step t goes from beta1 / 2 to beta1. The count beside the
  // step's is the product of all mu so far, multiplied in its own precision, as torch does.
  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count* mu_product) {
    const bool decoupled = o.decoupled_weight_decay != 0;
    const double mu = o.beta1 * (1 - 0.5 * power(0.96, t * o.momentum_decay));
    const double mu_next = o.beta1 * (1 - 0.5 * power(0.96, (t + 1) * o.momentum_decay));
    const double product = mu_product->rounded(mu_product->value * mu_product->rounded(mu));
    mu_product->value = product;
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.decay = T(decoupled ? 1 - o.lr * o.weight_decay : 1);
    k.l2 = T(decoupled ? 0 : o.weight_decay);
    k.weight1 = T(1 - o.beta1);
    k.beta2 = T(o.beta2);
    k.weight2 = T(1 - o.beta2);
    k.grad_size = T(o.lr * (1 - mu) / (1 - product));
    k.momentum_size = T(o.lr * mu_next / (1 - product * mu_next));
    k.root_correction2 = T(square_root(1 - power(o.beta2, t)));
    k.eps = T(o.eps);
    return k;
  }

  // Per element: s holds m and v.
  template <class T, int kStates>
  FASTOPT_RULE static void update(const Scalars<T>& k, T& p, T g, T* s) {
    T& m = s[0];
    T& v = s[1];
    g *= k.sign;
    p *= k.decay;
    if (k.l2 != T(0)) g = multiply_add(k.l2, p, g);
    m = lerp(m, g, k.weight1);
    v = multiply_add(k.weight2 * g, g, k.beta2 * v);
    const T denominator = square_root(v) / k.root_correction2 + k.eps;
    p -= multiply_add(k.grad_size, g, k.momentum_size * m) / denominator;
  }
};

}  // namespace fastopt
