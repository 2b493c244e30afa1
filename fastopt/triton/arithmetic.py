"""csrc/rules/arithmetic.h: the few operations rules share, of which IEEE 754 leaves one result."""

import triton
import triton.language as tl

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


@triton.jit
def power(beta, t):
    """beta^t for a vector of counts: the whole part of t by repeated squaring, a fraction by square
    roots from its last bit up."""
    magnitude = tl.abs(t)
    limit = tl.full((), 9e15, tl.float64)
    kept = tl.where(magnitude < limit, magnitude, limit)
    whole = kept.to(tl.int64)
    fraction = ((kept - whole.to(tl.float64)) * 9007199254740992.0).to(tl.int64)
    result = tl.full(whole.shape, 1, tl.float64)
    if tl.max(fraction, 0) > 0:
        for bit in range(53):
            result = square_root(tl.where(((fraction >> bit) & 1) != 0, result * beta, result))
    square = beta
    left = tl.max(whole, 0)
    while left > 0:
        result = tl.where((whole & 1) != 0, result * square, result)
        square *= square
        whole >>= 1
        left >>= 1
    result = tl.where(t < 0, 1 / result, result)
    return tl.where(t != t, t, result)


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
