"""csrc/rules/average.h: an exponential moving average."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import lerp

WEIGHT = tl.constexpr(0)


@triton.jit
def advance(decay, unused1, unused2, unused3, unused4, unused5, unused6, unused7, t, k, mask):
    tl.store(k + WEIGHT, tl.where(t == 1, 1, 1 - decay), mask)


@triton.jit
def update(k, p, g, unused0, unused1, unused2, STATES: tl.constexpr):
    return lerp(p, g, tl.load(k + WEIGHT)), unused0, unused1, unused2
