"""csrc/rules/nadam.h: NAdam and NAdamW, Adam with Nesterov's momentum."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, lerp, multiply_add, power, rounded, square_root

SIGN, DECAY, L2, WEIGHT1, BETA2, WEIGHT2, GRAD_SIZE, MOMENTUM_SIZE, ROOT_CORRECTION2, EPS = map(
    tl.constexpr, range(10)
)


@triton.jit
def advance(
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    momentum_decay,
    decoupled_weight_decay,
    maximize,
    t,
    mu_product,
    unused,
    C1: tl.constexpr,
    C2: tl.constexpr,
    k,
    mask,
):
    decoupled = decoupled_weight_decay != 0
    base = tl.full(t.shape, 0.96, tl.float64)
    mu = beta1 * (1 - 0.5 * power(base, t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * power(base, (t + 1) * momentum_decay))
    product = rounded(mu_product * rounded(mu, C1), C1)
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + DECAY, tl.where(decoupled, 1 - lr * weight_decay, 1), mask)
    tl.store(k + L2, tl.where(decoupled, 0, weight_decay), mask)
    tl.store(k + WEIGHT1, 1 - beta1, mask)
    tl.store(k + BETA2, beta2, mask)
    tl.store(k + WEIGHT2, 1 - beta2, mask)
    tl.store(k + GRAD_SIZE, divide(lr * (1 - mu), 1 - product), mask)
    tl.store(k + MOMENTUM_SIZE, divide(lr * mu_next, 1 - product * mu_next), mask)
    tl.store(k + ROOT_CORRECTION2, square_root(1 - power(beta2, t)), mask)
    tl.store(k + EPS, eps, mask)
    return product, unused


@triton.jit
def update(k, p, g, m, v, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    p *= tl.load(k + DECAY)
    l2 = tl.load(k + L2)
    g = tl.where(l2 != 0, multiply_add(l2, p, g), g)
    m = lerp(m, g, tl.load(k + WEIGHT1))
    v = multiply_add(tl.load(k + WEIGHT2) * g, g, tl.load(k + BETA2) * v)
    denominator = divide(square_root(v), tl.load(k + ROOT_CORRECTION2)) + tl.load(k + EPS)
    step = multiply_add(tl.load(k + GRAD_SIZE), g, tl.load(k + MOMENTUM_SIZE) * m)
    p -= divide(step, denominator)
    return p, m, v, unused2
