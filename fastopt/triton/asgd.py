"""csrc/rules/asgd.h: averaged stochastic gradient descent."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, multiply_add, power, rounded

SIGN, L2, DECAY, ETA, MU = map(tl.constexpr, range(5))


@triton.jit
def advance(
    lr,
    lambd,
    alpha,
    t0,
    weight_decay,
    maximize,
    unused6,
    unused7,
    t,
    eta,
    mu,
    C1: tl.constexpr,
    C2: tl.constexpr,
    k,
    mask,
):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + L2, weight_decay, mask)
    tl.store(k + DECAY, 1 - lambd * eta, mask)
    tl.store(k + ETA, eta, mask)
    tl.store(k + MU, mu, mask)
    eta = rounded(divide(lr, power(1 + lambd * lr * t, alpha)), C1)
    mu = rounded(1 / tl.where(t - t0 > 1, t - t0, 1), C2)
    return eta, mu


@triton.jit
def update(k, p, g, ax, unused1, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    p = multiply_add(tl.load(k + ETA) * -1, g, p * tl.load(k + DECAY))
    mu = tl.load(k + MU)
    ax = tl.where(mu == 1, p, multiply_add(mu, p - ax, ax))
    return p, ax, unused1, unused2
