"""csrc/rules/radam.h: RAdam and RAdamW, Adam with a rectified rate."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, lerp, multiply_add, power, square_root

SIGN, DECAY, L2, WEIGHT1, BETA2, WEIGHT2, STEP_SIZE, EPS, RECTIFIED = map(tl.constexpr, range(9))


@triton.jit
def advance(
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled_weight_decay, unused7, t, k, mask
):
    decoupled = decoupled_weight_decay != 0
    power2 = power(beta2, t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - divide(2 * t * power2, 1 - power2)
    above = (rho - 4) * (rho - 2) * rho_inf
    rectification = square_root(divide(above, (rho_inf - 4) * (rho_inf - 2) * rho))
    momentum_size = divide(lr, 1 - power(beta1, t))
    rectified_size = momentum_size * square_root(1 - power2) * rectification
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + DECAY, tl.where(decoupled, 1 - lr * weight_decay, 1), mask)
    tl.store(k + L2, tl.where(decoupled, 0, weight_decay), mask)
    tl.store(k + WEIGHT1, 1 - beta1, mask)
    tl.store(k + BETA2, beta2, mask)
    tl.store(k + WEIGHT2, 1 - beta2, mask)
    tl.store(k + RECTIFIED, tl.where(rho > 5, 1.0, 0.0), mask)
    tl.store(k + STEP_SIZE, tl.where(rho > 5, rectified_size, momentum_size), mask)
    tl.store(k + EPS, eps, mask)


@triton.jit
def update(k, p, g, m, v, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    p *= tl.load(k + DECAY)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    m = lerp(m, g, tl.load(k + WEIGHT1))
    v = multiply_add(tl.load(k + WEIGHT2) * g, g, tl.load(k + BETA2) * v)
    adapted = divide(m, square_root(v) + tl.load(k + EPS))
    direction = tl.where(tl.load(k + RECTIFIED) != 0, adapted, m)
    p = multiply_add(tl.load(k + STEP_SIZE) * -1, direction, p)
    return p, m, v, unused2
