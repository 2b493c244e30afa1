"""csrc/rules/adam.h: Adam, AdamW and AMSGrad."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, lerp, maximum, multiply_add, power, square_root

SIGN, DECAY, L2, WEIGHT1, BETA2, WEIGHT2, STEP_SIZE, ROOT_CORRECTION2, EPS = map(
    tl.constexpr, range(9)
)


@triton.jit
def advance(
    lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay, t, k, mask
):
    decoupled = decoupled_weight_decay != 0
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + DECAY, tl.where(decoupled, 1 - lr * weight_decay, 1), mask)
    tl.store(k + L2, tl.where(decoupled, 0, weight_decay), mask)
    tl.store(k + WEIGHT1, 1 - beta1, mask)
    tl.store(k + BETA2, beta2, mask)
    tl.store(k + WEIGHT2, 1 - beta2, mask)
    tl.store(k + STEP_SIZE, divide(lr, 1 - power(beta1, t)), mask)
    tl.store(k + ROOT_CORRECTION2, square_root(1 - power(beta2, t)), mask)
    tl.store(k + EPS, eps, mask)


@triton.jit
def update(k, p, g, m, v, v_max, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    p *= tl.load(k + DECAY)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    m = lerp(m, g, tl.load(k + WEIGHT1))
    v = multiply_add(tl.load(k + WEIGHT2) * g, g, tl.load(k + BETA2) * v)
    if STATES == 3:
        v_max = maximum(v_max, v)
    root = square_root(v_max if STATES == 3 else v)
    denominator = divide(root, tl.load(k + ROOT_CORRECTION2)) + tl.load(k + EPS)
    p -= divide(tl.load(k + STEP_SIZE) * m, denominator)
    return p, m, v, v_max
