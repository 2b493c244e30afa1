"""csrc/rules/adamax.h: Adamax, Adam by the largest gradient."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, lerp, maximum, multiply_add, power

SIGN, L2, WEIGHT1, BETA2, EPS, STEP_SIZE = map(tl.constexpr, range(6))


@triton.jit
def advance(lr, beta1, beta2, eps, weight_decay, maximize, unused6, unused7, t, k, mask):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + L2, weight_decay, mask)
    tl.store(k + WEIGHT1, 1 - beta1, mask)
    tl.store(k + BETA2, beta2, mask)
    tl.store(k + EPS, eps, mask)
    tl.store(k + STEP_SIZE, divide(lr, 1 - power(beta1, t)), mask)


@triton.jit
def update(k, p, g, m, u, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    m = lerp(m, g, tl.load(k + WEIGHT1))
    u = maximum(tl.load(k + BETA2) * u, maximum(g, g * -1) + tl.load(k + EPS))
    p = multiply_add(tl.load(k + STEP_SIZE) * -1, divide(m, u), p)
    return p, m, u, unused2
