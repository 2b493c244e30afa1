// RAdam and RAdamW, Adam with a rectified rate: the arithmetic, once, for host and device.
//
//   Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020
#pragma once

#include "arithmetic.h"

namespace fastopt {

struct RAdam {
  static constexpr const char* kName = "radam";
  static constexpr State kStates[] = {{"step"}, {"exp_avg"}, nonnegative("exp_avg_sq")};
  static constexpr int kCounts = 1;
  static constexpr int kFewestStates = 2;

  // A param group's values under kOptions, in this order; the two of a pair have its name.
  static constexpr const char* kOptions[] = {
      "lr", "betas", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay"};
  struct Options {
    double lr, beta1, beta2, eps, weight_decay, maximize, decoupled_weight_decay;
  };
  static unsigned states(const Options&) { return 0b11; }

  template <class T>
  struct Scalars {  // flags are T: GCC does not vectorise where a bool chooses
    T sign, decay, l2, weight1, beta2, weight2, step_size, eps, rectified;
  };

  // The variance of 1 / sqrt(v) is known once rho, the length of the average in v, is over 4; torch
  // waits for 5. Until then the step is momentum's.
  template <class T>
  FASTOPT_RULE static Scalars<T> advance(const Options& o, double t, Count*) {
    const bool decoupled = o.decoupled_weight_decay != 0;
    const double power2 = power(o.beta2, t);
    const double rho_inf = 2 / (1 - o.beta2) - 1;
    const double rho = rho_inf - 2 * t * power2 / (1 - power2);
    const double rectification =
        square_root((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
    const double momentum_size = o.lr / (1 - power(o.beta1, t));
    Scalars<T> k;
    k.sign = T(o.maximize != 0 ? -1 : 1);
    k.decay = T(decoupled ? 1 - o.lr * o.weight_decay : 1);
    k.l2 = T(decoupled ? 0 : o.weight_decay);
    k.weight1 = T(1 - o.beta1);
    k.beta2 = T(o.beta2);
    k.weight2 = T(1 - o.beta2);
    k.rectified = T(rho > 5);
    k.step_size =
        T(rho > 5 ? momentum_size * square_root(1 - power2) * rectification : momentum_size);
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
    const T adapted = m / (square_root(v) + k.eps);
    const T direction = k.rectified != T(0) ? adapted : m;
    p = multiply_add(-k.step_size, direction, p);
  }
};

}  // namespace fastopt
