"""csrc/rules/adagrad.h: Adagrad."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, multiply_add, square_root

SIGN, L2, STEP_SIZE, EPS = map(tl.constexpr, range(4))


@triton.jit
def advance(lr, lr_decay, weight_decay, eps, maximize, unused5, unused6, unused7, t, k, mask):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + L2, weight_decay, mask)
    tl.store(k + STEP_SIZE, divide(lr, 1 + (t - 1) * lr_decay), mask)
    tl.store(k + EPS, eps, mask)


@triton.jit
def update(k, p, g, sum, unused1, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    sum = multiply_add(g, g, sum)
    p -= divide(tl.load(k + STEP_SIZE) * g, square_root(sum) + tl.load(k + EPS))
    return p, sum, unused1, unused2
