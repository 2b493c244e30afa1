"""csrc/norm.h: how squares are summed, and what a norm clips by."""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide

LANES = tl.constexpr(32)  # kLanes


@triton.jit
def square(x):
    x = x.to(tl.float64)
    return x * x


@triton.jit
def add_lanes(lanes):
    """Pairs of neighbours until one is left."""
    for halved in tl.static_range(1, 6):
        lanes = tl.sum(tl.reshape(lanes, [LANES >> halved, 2]), 1)
    return tl.sum(lanes)  # of one


@triton.jit
def clip_factor(norm, max_norm):
    factor = divide(max_norm, norm + 1e-6)
    return tl.where((factor > 1) | (max_norm > 1.7976931348623157e308), 1, factor)


@triton.jit
def is_finite(x):
    return x - x == 0
