"""csrc/rules/adadelta.h: Adadelta."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, multiply_add, square_root

SIGN, L2, RHO, WEIGHT, EPS, LR = map(tl.constexpr, range(6))


@triton.jit
def advance(lr, rho, eps, weight_decay, maximize, unused5, unused6, unused7, t, k, mask):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + L2, weight_decay, mask)
    tl.store(k + RHO, rho, mask)
    tl.store(k + WEIGHT, 1 - rho, mask)
    tl.store(k + EPS, eps, mask)
    tl.store(k + LR, lr, mask)


@triton.jit
def update(k, p, g, v, u, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    rho = tl.load(k + RHO)
    weight = tl.load(k + WEIGHT)
    eps = tl.load(k + EPS)
    v = multiply_add(weight * g, g, rho * v)
    delta = divide(square_root(u + eps), square_root(v + eps)) * g
    u = multiply_add(weight * delta, delta, rho * u)
    p = multiply_add(tl.load(k + LR) * -1, delta, p)
    return p, v, u, unused2
