"""csrc/formats/: how the numbers of one tensor are kept in memory, in every access to one.

16-bit formats but float16 are stored and rounded as integers, in integer arithmetic: Triton's
interpreter truncates.
"""

import triton
import triton.language as tl

# In what a format, by csrc's name, keeps a number.
STORAGE = {
    "float32": tl.float32,
    "float64": tl.float64,
    "bfloat16": tl.uint16,
    "float16": tl.float16,
    "bfloat16 stochastic": tl.uint16,
    "split": tl.uint16,
    "remainder": tl.int16,
    "block signed": tl.uint8,
    "block unsigned": tl.uint8,
}

_OCTAVES = {"block signed": 15, "block unsigned": 31}

BLOCK = tl.constexpr(128)  # kBlock


@triton.constexpr_function
def is_random(format):
    return format in ("bfloat16 stochastic", "block unsigned")


@triton.constexpr_function
def is_block(format):
    return format in _OCTAVES


@triton.constexpr_function
def is_narrow(format):
    """Of a gradient's formats: whether the arithmetic has more bits."""
    return format in ("bfloat16", "float16")


# Of all formats of a table: of param, grad and states, and of what completes a split parameter.


@triton.constexpr_function
def states(formats):
    """How many they are."""
    return len(formats) - 2 - (formats[0] == "split")


@triton.constexpr_function
def format_at(formats, place):
    """One of them, or None where there are not so many."""
    return formats[place] if place < len(formats) else None


@triton.constexpr_function
def any_random(formats):
    return any(map(is_random, formats))


@triton.constexpr_function
def in_blocks(formats):
    """Whether the states are: all of them or none."""
    return any(map(is_block, formats))


@triton.constexpr_function
def storage(format):
    return STORAGE[format]


@triton.constexpr_function
def octaves(format):
    return _OCTAVES[format]


@triton.jit
def pointer(address, FORMAT: tl.constexpr):
    return address.to(tl.pointer_type(storage(FORMAT)))


@triton.jit
def scales(address, FORMAT: tl.constexpr, i):
    """Pointers to blocks' scales; i counts the bytes before each."""
    if is_block(FORMAT):
        return pointer(address, FORMAT) + i
    else:
        return address  # it is not used


# random.h


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def seed_of(step):
    """Of a step in double."""
    bits = step.to(tl.uint64, bitcast=True)
    return mix(bits.to(tl.uint32) ^ mix((bits >> 32).to(tl.uint32)))


@triton.jit
def random_bits(seed, PLACE: tl.constexpr, index):
    """16 for each index; a hash has 32, and is shared with a neighbouring place of the slot."""
    key = mix(seed + ((0x9E3779B9 * (PLACE // 2)) & 0xFFFFFFFF))
    return (mix(key + index) >> (PLACE % 2 * 16)) & 0xFFFF


# split.h


@triton.jit
def split_bits(x):
    return tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True))


@triton.jit
def join(parameter, remainder):
    bits = parameter.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    stale = ((magnitude == 0) & (remainder < 0)) | ((magnitude == 0x7F800000) & (remainder > 0))
    rest = tl.where(stale, 0, remainder.to(tl.int32)).to(tl.uint32, bitcast=True)
    return (bits + rest).to(tl.float32, bitcast=True)


# block.h


@triton.jit
def magnitude_of(x):
    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.where(magnitude > 0x7F800000, 0x7FC00000, magnitude)


@triton.jit
def scale_of(FORMAT: tl.constexpr, largest):
    exponent = (largest + 0x7FFFFF) >> 23
    return tl.minimum(tl.maximum(exponent, octaves(FORMAT) + 1), 255)


@triton.jit
def base_of(FORMAT: tl.constexpr, scale):
    return (scale - octaves(FORMAT)) << 23


@triton.jit
def decode(FORMAT: tl.constexpr, code, base):
    if FORMAT == "block signed":
        magnitude = code & 0x7F
        sign = (code & 0x80) << 24
    else:
        magnitude = code
        sign = tl.zeros_like(code)
    bits = tl.where(magnitude != 0, (magnitude << 20) + base, 0) | sign
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode(FORMAT: tl.constexpr, x, base, random):
    magnitude = magnitude_of(x)
    above = (magnitude - base).to(tl.int32, bitcast=True)
    if FORMAT == "block signed":
        rounded = tl.maximum((above + 0x7FFFF + ((above >> 20) & 1)) >> 20, 0)
        code = rounded.to(tl.uint32) | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    else:
        rounded = tl.maximum((above + (random << 4).to(tl.int32)) >> 20, 1)
        code = tl.where(magnitude == 0, 0, rounded.to(tl.uint32))
    return code.to(tl.uint8)


# nearest.h


@triton.jit
def bfloat16_bits(x):
    """Of the nearest bfloat16."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded)


@triton.jit
def nearest(FORMAT: tl.constexpr, x):
    """Numbers as they would be loaded if they were stored in a gradient's format."""
    if FORMAT == "bfloat16":
        return (bfloat16_bits(x) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "float16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


# All of them. Of blocks, which are the rows of two-dimensional tensors, `scale_at` are pointers to
# the scales, one a row, and `block_mask` tells which rows are blocks.


@triton.jit
def load(FORMAT: tl.constexpr, at, mask, scale_at=None, block_mask=None, other=None):
    """Elements as the arithmetic sees them: double for float64, float for all others."""
    x = tl.load(at, mask, other)
    if is_block(FORMAT):
        scale = tl.load(scale_at, block_mask).to(tl.uint32)
        return decode(FORMAT, x.to(tl.uint32), base_of(FORMAT, scale)[:, None])
    elif x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def store(FORMAT: tl.constexpr, at, x, mask, random=None, scale_at=None, block_mask=None):
    """Rounds to nearest even, or as the format says; those that are random take `random` bits."""
    if is_block(FORMAT):
        largest = tl.max(tl.where(mask, magnitude_of(x), 0), 1)
        scale = scale_of(FORMAT, largest)
        tl.store(scale_at, scale.to(tl.uint8), block_mask)
        tl.store(at, encode(FORMAT, x, base_of(FORMAT, scale)[:, None], random), mask)
    elif FORMAT == "split":
        tl.store(at, ((split_bits(x) + 0x8000) >> 16).to(tl.uint16), mask)
    elif FORMAT == "remainder":
        tl.store(at, split_bits(x).to(tl.uint16).to(tl.int16, bitcast=True), mask)
    elif FORMAT == "bfloat16 stochastic":
        rounded = (x.to(tl.uint32, bitcast=True) + random) >> 16
        tl.store(at, tl.where(x != x, 0x7FC0, rounded).to(tl.uint16), mask)
    elif FORMAT == "bfloat16":
        tl.store(at, bfloat16_bits(x).to(tl.uint16), mask)
    else:
        tl.store(at, x.to(at.dtype.element_ty), mask)
