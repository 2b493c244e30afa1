"""csrc/rules/rprop.h: resilient backpropagation."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import multiply_add, sign

SIGN, ETA_MINUS, ETA_PLUS, SMALLEST, LARGEST = map(tl.constexpr, range(5))


@triton.jit
def advance(
    eta_minus, eta_plus, smallest, largest, maximize, unused5, unused6, unused7, t, k, mask
):
    tl.store(k + SIGN, tl.where(maximize != 0, -1.0, 1.0), mask)
    tl.store(k + ETA_MINUS, eta_minus, mask)
    tl.store(k + ETA_PLUS, eta_plus, mask)
    tl.store(k + SMALLEST, smallest, mask)
    tl.store(k + LARGEST, largest, mask)


@triton.jit
def update(k, p, g, before, size, unused2, STATES: tl.constexpr):
    g *= tl.load(k + SIGN)
    agreement = g * before
    shrinks = agreement < 0
    grown = tl.where(shrinks, tl.load(k + ETA_MINUS), 1)
    grown = size * tl.where(agreement > 0, tl.load(k + ETA_PLUS), grown)
    smallest = tl.load(k + SMALLEST)
    largest = tl.load(k + LARGEST)
    at_least = tl.where(grown < smallest, smallest, grown)
    size = tl.where(at_least > largest, largest, at_least)
    g = tl.where(shrinks, 0, g)
    p = multiply_add(sign(g) * -1, size, p)
    return p, g, size, unused2
