"""csrc/rules/arithmetic.h: the few operations rules share, of which IEEE 754 leaves one result."""

import triton
import triton.language as tl


@triton.jit
def power(beta, t):
    """beta^t for a vector of counts t = 1, 2, 3, ... by repeated squaring."""
    limit = tl.full((), 9e15, tl.float64)
    n = tl.where(t < 0, 0, tl.where(t < limit, t, limit)).to(tl.int64)
    result = tl.full(n.shape, 1, tl.float64)
    left = tl.max(n, 0)
    while left > 0:
        result = tl.where((n & 1) != 0, result * beta, result)
        beta *= beta
        n >>= 1
        left >>= 1
    return result


@triton.jit
def multiply_add(a, b, c):
    """a * b + c rounded once."""
    return tl.fma(a, b, c)


@triton.jit
def lerp(start, end, weight):
    """torch.lerp: exact at both ends, hence the two forms."""
    low = weight < 0.5
    return multiply_add(tl.where(low, weight, weight - 1), end - start, tl.where(low, start, end))


@triton.jit
def maximum(a, b):
    """torch.maximum: a NaN on either side stays."""
    return tl.where((b > a) | (b != b), b, a)


# Triton's sqrt and / are IEEE's in double only: in float they are faster unless asked by name.


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)
