"""csrc/rules/arithmetic.h: the few operations rules share, of which IEEE 754 leaves one result."""

import triton
import triton.language as tl


@triton.jit
def multiply_add(a, b, c):
    """a * b + c rounded once."""
    return tl.fma(a, b, c)


# log(2) in two parts, and what shifts an integer into a double's last bits.
LOG2, LOG2_LOW, SHIFT = map(
    tl.constexpr,
    (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"), 1.5 * 2**52 + 1023),
)
ONE_OVER_LOG2 = tl.constexpr(float.fromhex("0x1.71547652b82fep0"))


@triton.jit
def power(base, exponent):
    """base^exponent in double."""
    bits = base.to(tl.int64, bitcast=True)
    e = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (e << 52)).to(tl.float64, bitcast=True)
    f = m - 1
    d = f + 2
    d_low = f - (d - 2)
    s = f / d
    s_low = (multiply_add(s * -1, d, f) - s * d_low) / d
    series = tl.zeros_like(s)
    for i in tl.static_range(11):
        series = series * (s * s) + 1.0 / (23 - 2 * i)
    high = e.to(tl.float64) * LOG2
    low = e.to(tl.float64) * LOG2_LOW
    sum = high + 2 * s
    rest = (2 * s - (sum - high)) + (2 * (s_low + s * (s * s) * series) + low)
    log = sum + rest
    log_low = rest - (log - sum)

    product = exponent * log
    in_range = (product > -708) & (product < 709)
    x = tl.where(product <= -708, -708, tl.where(product >= 709, 709, product))
    x_low = multiply_add(exponent, log, product * -1) + exponent * log_low
    x_low = tl.where(in_range, x_low, 0)
    shifted = x * ONE_OVER_LOG2 + SHIFT
    k = shifted - SHIFT
    r = x - k * LOG2
    r_low = x_low - k * LOG2_LOW
    t = r + r_low
    t_low = r_low - (t - r)
    q = tl.full(t.shape, 1, tl.float64)
    for i in tl.static_range(12):
        q = t * (1.0 / (14 - i)) * q + 1
    one = t + 1
    result = one + ((t - (one - 1)) + (t_low + t * t / 2 * q))
    scale = (shifted.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
    at_zero = tl.where(exponent > 0, 0.0, 1.0)
    zero = base - base
    result = tl.where(base > 0, result * scale, zero / zero)
    return tl.where(base == 0, at_zero, result)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """A count of csrc's struct Count, which is kept as this dtype."""
    return x.to(DTYPE).to(tl.float64)


@triton.jit
def lerp(start, end, weight):
    """torch.lerp: exact at both ends, hence the two forms."""
    low = weight < 0.5
    return multiply_add(tl.where(low, weight, weight - 1), end - start, tl.where(low, start, end))


@triton.jit
def maximum(a, b):
    """torch.maximum: a NaN on either side stays."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def sign(x):
    """torch.sign: of NaN it is 0."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


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
