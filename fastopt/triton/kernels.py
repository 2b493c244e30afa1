"""The two kernels, generic over the rule. A step launches each once for a table.

A rule is a module like adam.py with two functions. `advance` takes the options, the step t,
pointers k to the slots' rows of scalars, and the mask to store these with; a rule that keeps more
COUNTS than the step's also takes two and their dtypes, and returns both. `update` takes k, the
elements of param, grad and states, and how many states are in use; it returns all but the grad.
"""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide
from fastopt.triton.convert import load, store

# csrc/slot.h in 8-byte words: where members of Slot and Number are, and the size of each. The upper
# half of LAYOUT is first_chunk, that of GROUP is fresh, and that of ROWS first_index.
PARAM, STATE, LAST_PLACE, NUMEL, LAYOUT, GROUP, ROWS, SLOT = map(
    tl.constexpr, (0, 2, 6, 7, 8, 9, 10, 11)
)
VALUE, TENSOR, DTYPE, NUMBER = map(tl.constexpr, range(4))
CHUNK = tl.constexpr(4096)  # kChunk
DENSE = tl.constexpr(-1)  # kDense
OPTIONS = tl.constexpr(8)  # kMaxOptions
MOST_STATES = tl.constexpr(3)  # kMaxStates
MOST_COUNTS = tl.constexpr(3)

# Table.numbers: these two, then each group's options.
FOUND_INF, GRAD_SCALE, GROUPS = map(tl.constexpr, range(3))

# What advance leaves for update: a row for each slot, in the type of its arithmetic. The rule's
# scalars come first, these last.
K_GRAD_SCALE, K_SKIP, ROW = map(tl.constexpr, (14, 15, 16))


@triton.jit
def lower(word):
    """The signed number that a word's lower half is."""
    return (word << 32) >> 32


@triton.jit
def number(numbers, i):
    """Number i in double, be it at hand or in a tensor of any DType."""
    at = numbers + i * NUMBER
    tensor = tl.load(at + TENSOR)
    dtype = tl.where(tensor == 0, -1, tl.load(at + DTYPE) & 0xFF)
    value = tl.load(at + VALUE).to(tl.float64, bitcast=True)
    float32 = load(tensor.to(tl.pointer_type(tl.float32)), dtype == 0).to(tl.float64)
    float64 = load(tensor.to(tl.pointer_type(tl.float64)), dtype == 1)
    bfloat16 = load(tensor.to(tl.pointer_type(tl.uint16)), dtype == 2).to(tl.float64)
    float16 = load(tensor.to(tl.pointer_type(tl.float16)), dtype == 3).to(tl.float64)
    value = tl.where(dtype == 0, float32, value)
    value = tl.where(dtype == 1, float64, value)
    value = tl.where(dtype == 2, bfloat16, value)
    return tl.where(dtype == 3, float16, value)


@triton.jit
def count_at(slot, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer to each slot's count number PLACE."""
    return tl.load(slot + LAST_PLACE - PLACE).to(tl.pointer_type(DTYPE))


@triton.jit(do_not_specialize=["slot_count"])
def advance(
    slots,
    numbers,
    scalars,
    slot_count,
    RULE: tl.constexpr,
    COUNTS: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Phase one, a slot per lane: counts the step and leaves the slot's row of scalars."""
    i = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    slot = slots + tl.minimum(i, slot_count - 1) * SLOT  # lanes past the end read the last slot
    k = scalars + i * ROW
    found_inf = number(numbers, FOUND_INF)
    tl.store(k + K_SKIP, tl.where(found_inf != 0, 1.0, 0.0), i < slot_count)
    mask = i < tl.where(found_inf != 0, 0, slot_count)  # a skipped step counts and leaves nothing

    group = tl.load(slot + GROUP)  # its upper half tells whether the slot is fresh
    if COUNTS > 0:
        step = count_at(slot, 0, C0)
        t = tl.load(step) + 1
        tl.store(step, t, mask)
        t = t.to(tl.float64)
    else:
        t = tl.where(((group >> 32) & 0xFF) != 0, 1.0, 2.0).to(tl.float64)
    options = GROUPS + (group & 0xFFFFFFFF) * OPTIONS
    o0 = number(numbers, options)
    o1 = number(numbers, options + 1)
    o2 = number(numbers, options + 2)
    o3 = number(numbers, options + 3)
    o4 = number(numbers, options + 4)
    o5 = number(numbers, options + 5)
    o6 = number(numbers, options + 6)
    o7 = number(numbers, options + 7)
    if COUNTS > 1:
        c1_at = count_at(slot, 1, C1)
        c2_at = count_at(slot, 2 if COUNTS > 2 else 1, C2 if COUNTS > 2 else C1)
        c1 = tl.load(c1_at).to(tl.float64)
        c2 = tl.load(c2_at).to(tl.float64)
        c1, c2 = RULE(o0, o1, o2, o3, o4, o5, o6, o7, t, c1, c2, C1, C2, k, mask)
        tl.store(c1_at, c1.to(C1), mask)
        if COUNTS > 2:
            tl.store(c2_at, c2.to(C2), mask)
    else:
        RULE(o0, o1, o2, o3, o4, o5, o6, o7, t, k, mask)
    tl.store(k + K_GRAD_SCALE, number(numbers, GRAD_SCALE).to(tl.float32), mask)


@triton.jit
def slot_of_chunk(slots, slot_count, chunk):
    low = 0
    high = slot_count
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(slots + middle * SLOT + LAYOUT) >> 32) <= chunk:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def strided(layout, i, TENSORS: tl.constexpr):
    """Where element i of each of a slot's tensors lies."""
    ndim = tl.load(layout)
    p = tl.zeros_like(i)
    g = tl.zeros_like(i)
    s0 = tl.zeros_like(i)
    s1 = tl.zeros_like(i)
    s2 = tl.zeros_like(i)
    d = ndim - 1
    while d >= 0:
        size = tl.load(layout + 1 + d)
        stride = layout + 1 + ndim + d
        outer = i // size
        index = i - outer * size
        i = outer
        p += index * tl.load(stride)
        g += index * tl.load(stride + ndim)
        if TENSORS > 2:
            s0 += index * tl.load(stride + 2 * ndim)
        if TENSORS > 3:
            s1 += index * tl.load(stride + 3 * ndim)
        if TENSORS > 4:
            s2 += index * tl.load(stride + 4 * ndim)
        d -= 1
    return p, g, s0, s1, s2


@triton.jit
def aligned(address, TYPE: tl.constexpr):
    """A pointer from which the compiler may take 128 bits at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def update_block(
    RULE: tl.constexpr, STATES: tl.constexpr, k, p_at, g_at, s0_at, s1_at, s2_at, mask
):
    """Load, compute, store. In place of a state not in use the rule is given the parameter."""
    p = load(p_at, mask)
    g = load(g_at, mask)
    s0 = load(s0_at, mask) if STATES > 0 else p
    s1 = load(s1_at, mask) if STATES > 1 else p
    s2 = load(s2_at, mask) if STATES > 2 else p
    grad_scale = tl.load(k + K_GRAD_SCALE)
    if grad_scale != 1:
        g = divide(g, grad_scale)
        store(g_at, g, mask)
    p, s0, s1, s2 = RULE(k, p, g, s0, s1, s2, STATES)
    store(p_at, p, mask)
    if STATES > 0:
        store(s0_at, s0, mask)
    if STATES > 1:
        store(s1_at, s1, mask)
    if STATES > 2:
        store(s2_at, s2, mask)


@triton.jit(do_not_specialize=["slot_count"])
def update(
    slots,
    grads,
    layouts,
    scalars,
    slot_count,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Phase two, a chunk per program: whole blocks of it where all tensors are dense and aligned,
    the rest LANES elements at a time."""
    chunk = tl.program_id(0)
    i = slot_of_chunk(slots, slot_count, chunk)
    k = scalars + i * ROW
    if tl.load(k + K_SKIP) != 0:
        return
    slot = slots + i * SLOT
    p = tl.load(slot + PARAM)
    g = tl.load(grads + i)
    s0 = tl.load(slot + STATE)
    s1 = tl.load(slot + STATE + 1)
    s2 = tl.load(slot + STATE + 2)
    layout = lower(tl.load(slot + LAYOUT))
    first = (chunk - (tl.load(slot + LAYOUT) >> 32)) * CHUNK
    end = tl.minimum(first + CHUNK, tl.load(slot + NUMEL))
    vector = (layout == DENSE) & (((p | g | s0 | s1 | s2) & 15) == 0)
    while vector & (first + BLOCK <= end):
        at = tl.max_contiguous(first + tl.arange(0, BLOCK), VECTOR)
        update_block(
            RULE,
            STATES,
            k,
            aligned(p, P) + at,
            aligned(g, G) + at,
            aligned(s0, S0) + at,
            aligned(s1, S1) + at,
            aligned(s2, S2) + at,
            None,
        )
        first += BLOCK
    while first < end:
        at = first + tl.arange(0, LANES)
        p_at, g_at, s0_at, s1_at, s2_at = at, at, at, at, at
        if layout != DENSE:
            p_at, g_at, s0_at, s1_at, s2_at = strided(layouts + layout, at, 2 + STATES)
        update_block(
            RULE,
            STATES,
            k,
            p.to(tl.pointer_type(P)) + p_at,
            g.to(tl.pointer_type(G)) + g_at,
            s0.to(tl.pointer_type(S0)) + s0_at,
            s1.to(tl.pointer_type(S1)) + s1_at,
            s2.to(tl.pointer_type(S2)) + s2_at,
            at < end,
        )
        first += LANES
