"""csrc/rules/lion.h: Lion."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import lerp, multiply_add, sign

SIGN, DECAY, WEIGHT1, WEIGHT2, LR = map(tl.constexpr, range(5))


@triton.jit
def advance(lr, beta1, beta2, weight_decay, maximize, unused5, unused6, unused7, t, k, mask):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + DECAY, 1 - lr * weight_decay, mask)
    tl.store(k + WEIGHT1, 1 - beta1, mask)
    tl.store(k + WEIGHT2, 1 - beta2, mask)
    tl.store(k + LR, lr, mask)


@triton.jit
def update(k, p, g, m, unused1, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    p *= tl.load(k + DECAY)
    p = multiply_add(tl.load(k + LR) * -1, sign(lerp(m, g, tl.load(k + WEIGHT1))), p)
    m = lerp(m, g, tl.load(k + WEIGHT2))
    return p, m, unused1, unused2
