"""csrc/rules/rmsprop.h: RMSprop, with momentum and centered."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, lerp, multiply_add, square_root

SIGN, L2, ALPHA, WEIGHT, EPS, MOMENTUM, LR, CENTERED = map(tl.constexpr, range(8))


@triton.jit
def advance(lr, alpha, eps, weight_decay, momentum, centered, maximize, unused7, t, k, mask):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + L2, weight_decay, mask)
    tl.store(k + ALPHA, alpha, mask)
    tl.store(k + WEIGHT, 1 - alpha, mask)
    tl.store(k + EPS, eps, mask)
    tl.store(k + MOMENTUM, tl.where(momentum > 0, momentum, 0), mask)
    tl.store(k + LR, lr, mask)
    tl.store(k + CENTERED, tl.where(centered != 0, 1.0, 0.0), mask)


@triton.jit
def update(k, p, g, v, b, a, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    weight = tl.load(k + WEIGHT)
    v = multiply_add(weight * g, g, tl.load(k + ALPHA) * v)
    variance = v
    if STATES > 1:
        centered = tl.load(k + CENTERED) != 0
        before = a if STATES == 3 else b
        average = tl.where(centered, lerp(before, g, weight), before)
        variance = tl.where(centered, multiply_add(average * -1, average, v), v)
        if STATES == 3:
            a = average
        else:
            b = average
    direction = divide(g, square_root(variance) + tl.load(k + EPS))
    if STATES > 1:
        moves = (STATES == 3) | (tl.load(k + CENTERED) == 0)
        moved = multiply_add(tl.load(k + MOMENTUM), b, direction)
        direction = tl.where(moves, moved, direction)
        b = tl.where(moves, moved, b)
    p = multiply_add(tl.load(k + LR) * -1, direction, p)
    return p, v, b, a
