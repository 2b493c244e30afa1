"""csrc/formats/nearest.h: rounding between storage and arithmetic, in every tensor access.

bfloat16 is stored and rounded as uint16, in integer arithmetic: Triton's interpreter truncates.
"""

import triton
import triton.language as tl

STORAGE = {
    "float32": tl.float32,
    "float64": tl.float64,
    "bfloat16": tl.uint16,
    "float16": tl.float16,
}


@triton.jit
def load(pointers, mask):
    """Elements as the arithmetic sees them: double for float64, float for all others."""
    x = tl.load(pointers, mask)
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def store(pointers, x, mask):
    """Rounds to nearest even."""
    if pointers.dtype.element_ty == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointers, tl.where(x != x, 0x7FC0, rounded).to(tl.uint16), mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask)
