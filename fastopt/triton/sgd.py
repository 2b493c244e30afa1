"""csrc/rules/sgd.h: stochastic gradient descent with momentum."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import multiply_add

SIGN, L2, MOMENTUM, WEIGHT, LR, FIRST, NESTEROV = map(tl.constexpr, range(7))


@triton.jit
def advance(
    lr, momentum, dampening, weight_decay, nesterov, maximize, unused6, unused7, t, k, mask
):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + L2, weight_decay, mask)
    tl.store(k + MOMENTUM, momentum, mask)
    tl.store(k + WEIGHT, 1 - dampening, mask)
    tl.store(k + LR, lr, mask)
    tl.store(k + FIRST, tl.where(t == 1, 1.0, 0.0), mask)
    tl.store(k + NESTEROV, nesterov, mask)


@triton.jit
def update(k, p, g, b, unused1, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    if STATES == 1:
        momentum = tl.load(k + MOMENTUM)
        later = multiply_add(tl.load(k + WEIGHT), g, momentum * b)
        b = tl.where(tl.load(k + FIRST) != 0, g, later)
        g = tl.where(tl.load(k + NESTEROV) != 0, multiply_add(momentum, b, g), b)
    # Times -1: Triton's own minus is 0 - x, which for 0 is not -0.
    p = multiply_add(tl.load(k + LR) * -1, g, p)
    return p, b, unused1, unused2
