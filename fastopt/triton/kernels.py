"""The kernels. A step launches `advance` and `update`, which are generic over the rule, once each
for a table; where it clips, `sum_squares` before them, and `total` once for all tables.

A rule is a module like adam.py with two functions. `advance` takes the options, the step t,
pointers k to the slots' rows of scalars, and the mask to store these with; a rule that keeps more
COUNTS than the step's also takes two and their dtypes, and returns both. `update` takes k, the
elements of param, grad and states, and how many states are in use; it returns all but the grad.
"""

import triton
import triton.language as tl

from fastopt.triton.arithmetic import divide, square_root
from fastopt.triton.formats import (
    BLOCK,
    any_random,
    format_at,
    in_blocks,
    is_narrow,
    is_random,
    join,
    load,
    nearest,
    pointer,
    random_bits,
    scales,
    seed_of,
    states,
    storage,
    store,
)
from fastopt.triton.norm import LANES as NORM_LANES
from fastopt.triton.norm import add_lanes, clip_factor, is_finite, square

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

# Rows up to so short would fill little of a tile as wide as a block: they have their own.
NARROW = tl.constexpr(16)

# Table.numbers: csrc/table.h's Scaling, then each group's options. The tensor of SKIPPED is no
# number's, but the counter.
FOUND_INF, GRAD_SCALE, NORM, MAX_NORM, SKIP, SKIPPED, GROUPS = map(tl.constexpr, range(7))

# csrc/table.h's enum class Skip.
NONFINITE, UNCLIPPED = map(tl.constexpr, (1, 2))

# What advance leaves for update: a row for each slot, in the type of its arithmetic. The rule's
# scalars come first, these last: the seed of the step's random bits is an integer.
K_SEED, K_GRAD_SCALE, K_CLIP, K_SCALING, K_SKIP, ROW = map(tl.constexpr, (*range(11, 16), 16))

# K_SCALING: what update is to do to gradients, the sum of these. In float a factor that clips may
# have been rounded to 1, and yet it has gradients rounded.
UNSCALE, CLIP = map(tl.constexpr, (1, 2))


@triton.jit
def lower(word):
    """The signed number that a word's lower half is."""
    return (word << 32) >> 32


@triton.jit
def number(numbers, i):
    """Number i in double."""
    at = numbers + i * NUMBER
    return number_of(tl.load(at + VALUE), tl.load(at + TENSOR), tl.load(at + DTYPE))


@triton.jit
def number_of(value, tensor, dtype):
    """A Number in double, be it at hand or in a tensor of any DType."""
    dtype = tl.where(tensor == 0, -1, dtype & 0xFF)
    value = value.to(tl.float64, bitcast=True)
    float32 = load("float32", pointer(tensor, "float32"), dtype == 0).to(tl.float64)
    float64 = load("float64", pointer(tensor, "float64"), dtype == 1)
    bfloat16 = load("bfloat16", pointer(tensor, "bfloat16"), dtype == 2).to(tl.float64)
    float16 = load("float16", pointer(tensor, "float16"), dtype == 3).to(tl.float64)
    value = tl.where(dtype == 0, float32, value)
    value = tl.where(dtype == 1, float64, value)
    value = tl.where(dtype == 2, bfloat16, value)
    return tl.where(dtype == 3, float16, value)


@triton.jit
def count_at(slot, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer to each slot's count number PLACE."""
    return tl.load(slot + LAST_PLACE - PLACE).to(tl.pointer_type(DTYPE))


@triton.jit
def seed_at(k):
    return (k + K_SEED).to(tl.pointer_type(tl.uint32))


@triton.jit
def skips(skip, norm, factor):
    """csrc/table.h: whether a step is to be skipped for its norm."""
    return ((skip == NONFINITE) & ~is_finite(norm)) | ((skip == UNCLIPPED) & (factor == 1))


@triton.jit
def count(counter, mask):
    """One more, in an integer at this address."""
    counter = counter.to(tl.pointer_type(tl.int64))
    tl.store(counter, tl.load(counter, mask) + 1, mask)


@triton.jit(do_not_specialize=["slot_count"])
def advance(
    slots,
    numbers,
    scalars,
    slot_count,
    RULE: tl.constexpr,
    RULES_COUNTS: tl.constexpr,
    RANDOM: tl.constexpr,
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
    norm = number(numbers, NORM)
    factor = clip_factor(norm, number(numbers, MAX_NORM))
    overflows = number(numbers, FOUND_INF) != 0
    stops = ~overflows & skips(number(numbers, SKIP), norm, factor)
    skipped = tl.load(numbers + SKIPPED * NUMBER + TENSOR)
    count(skipped, stops & (skipped != 0) & (tl.program_id(0) == 0))
    skip = overflows | stops
    tl.store(k + K_SKIP, tl.where(skip, 1.0, 0.0), i < slot_count)
    mask = i < tl.where(skip, 0, slot_count)  # a skipped step counts and leaves nothing

    group = tl.load(slot + GROUP)  # its upper half tells whether the slot is fresh
    if COUNTS > 0:
        step = count_at(slot, 0, C0)
        t = tl.load(step) + 1
        tl.store(step, t, mask)
        t = t.to(tl.float64)
        if RANDOM:
            tl.store(seed_at(k), seed_of(t), mask)
    if RULES_COUNTS == 0:
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
    if RULES_COUNTS > 1:
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
    grad_scale = number(numbers, GRAD_SCALE).to(tl.float32)
    scaling = tl.where(grad_scale != 1, UNSCALE, 0) + tl.where(factor != 1, CLIP, 0)
    tl.store(k + K_GRAD_SCALE, grad_scale, mask)
    tl.store(k + K_CLIP, factor, mask)
    tl.store(k + K_SCALING, scaling, mask)


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
def strided(layout, i, FORMATS: tl.constexpr):
    """Where element i of each of a slot's tensors lies, and its index in the whole parameter."""
    STATES: tl.constexpr = states(FORMATS)
    ndim = tl.load(layout)
    p = tl.zeros_like(i)
    g = tl.zeros_like(i)
    s0 = tl.zeros_like(i)
    s1 = tl.zeros_like(i)
    s2 = tl.zeros_like(i)
    rest = tl.zeros_like(i)
    in_whole = tl.zeros_like(i)
    d = ndim - 1
    while d >= 0:
        size = tl.load(layout + 1 + d)
        stride = layout + 1 + ndim + d
        outer = i // size
        index = i - outer * size
        i = outer
        p += index * tl.load(stride)
        g += index * tl.load(stride + ndim)
        if STATES > 0:
            s0 += index * tl.load(stride + 2 * ndim)
        if STATES > 1:
            s1 += index * tl.load(stride + 3 * ndim)
        if STATES > 2:
            s2 += index * tl.load(stride + 4 * ndim)
        if format_at(FORMATS, 0) == "split":
            rest += index * tl.load(stride + (2 + STATES) * ndim)
        if any_random(FORMATS):
            in_whole += index * tl.load(stride + len(FORMATS) * ndim)
        d -= 1
    return p, g, s0, s1, s2, rest, in_whole


@triton.jit
def element(address, FORMAT: tl.constexpr, i, VECTOR: tl.constexpr):
    """Pointers. Where VECTOR is more than 1, the compiler may take so many elements at a time."""
    start = address.to(tl.pointer_type(storage(FORMAT)))  # a hint about a call would be lost
    if VECTOR > 1:
        start = tl.multiple_of(start, 16)
    return start + i


@triton.jit
def random(FORMATS: tl.constexpr, PLACE: tl.constexpr, k, index):
    """What rounding the elements of a tensor takes, of these indices in the whole parameter."""
    if is_random(format_at(FORMATS, PLACE)):
        return random_bits(tl.load(seed_at(k)), PLACE, index)
    else:
        return index  # it is not used


@triton.jit
def update_tile(
    RULE: tl.constexpr,
    FORMATS: tl.constexpr,
    k,
    tensors,
    layouts,
    layout,
    first_index,
    i,
    mask,
    VECTOR: tl.constexpr,
    scale=None,
    block_mask=None,
):
    """Load, compute, store elements i. In place of a state not in use the rule is given the
    parameter."""
    STATES: tl.constexpr = states(FORMATS)
    P: tl.constexpr = format_at(FORMATS, 0)
    G: tl.constexpr = format_at(FORMATS, 1)
    S0: tl.constexpr = format_at(FORMATS, 2)
    S1: tl.constexpr = format_at(FORMATS, 3)
    S2: tl.constexpr = format_at(FORMATS, 4)
    p_i, g_i, s0_i, s1_i, s2_i, rest_i, in_whole = i, i, i, i, i, i, i
    if layout != DENSE:
        p_i, g_i, s0_i, s1_i, s2_i, rest_i, in_whole = strided(layouts + layout, i, FORMATS)
    p_at = element(tensors[0], P, p_i, VECTOR)
    g_at = element(tensors[1], G, g_i, VECTOR)
    p = load(P, p_at, mask)
    if P == "split":
        rest_at = element(tensors[5], "remainder", rest_i, VECTOR)
        p = join(p, tl.load(rest_at, mask))
    g = load(G, g_at, mask)
    s0, s1, s2 = p, p, p
    if STATES > 0:
        s0_at = element(tensors[2], S0, s0_i, VECTOR)
        s0_scale = scales(tensors[2], S0, scale)
        s0 = load(S0, s0_at, mask, s0_scale, block_mask)
    if STATES > 1:
        s1_at = element(tensors[3], S1, s1_i, VECTOR)
        s1_scale = scales(tensors[3], S1, scale)
        s1 = load(S1, s1_at, mask, s1_scale, block_mask)
    if STATES > 2:
        s2_at = element(tensors[4], S2, s2_i, VECTOR)
        s2_scale = scales(tensors[4], S2, scale)
        s2 = load(S2, s2_at, mask, s2_scale, block_mask)
    scaling = tl.load(k + K_SCALING)
    if scaling != 0:  # in forms of which NVIDIA's compiler spills no registers
        if is_narrow(G):
            if scaling == CLIP:
                g = nearest(G, g * tl.load(k + K_CLIP))
            else:
                g = divide(g, tl.load(k + K_GRAD_SCALE))
                clipped = nearest(G, nearest(G, g) * tl.load(k + K_CLIP))  # as if written between
                g = tl.where(scaling == UNSCALE, g, clipped)
                store(G, g_at, g, mask)
        else:  # one of the numbers may be 1
            g = divide(g, tl.load(k + K_GRAD_SCALE)) * tl.load(k + K_CLIP)
            written = scaling != CLIP
            # Not by &: in the interpreter what comparing floats gives is none of integers.
            store(G, g_at, g, written if mask is None else tl.where(written, mask, False))
    p, s0, s1, s2 = RULE(k, p, g, s0, s1, s2, STATES)
    index = first_index + in_whole.to(tl.uint32)  # not before: AMSGrad's registers would spill
    store(P, p_at, p, mask, random(FORMATS, 0, k, index))
    if P == "split":
        store("remainder", rest_at, p, mask)
    if STATES > 0:
        store(S0, s0_at, s0, mask, random(FORMATS, 2, k, index), s0_scale, block_mask)
    if STATES > 1:
        store(S1, s1_at, s1, mask, random(FORMATS, 3, k, index), s1_scale, block_mask)
    if STATES > 2:
        store(S2, s2_at, s2, mask, random(FORMATS, 4, k, index), s2_scale, block_mask)


@triton.jit
def update_elements(
    RULE: tl.constexpr,
    FORMATS: tl.constexpr,
    k,
    tensors,
    layouts,
    layout,
    slot,
    chunk,
    vector,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A chunk, TILE elements of it at a time where that can be VECTOR at a time, the rest LANES."""
    first_index = (tl.load(slot + ROWS) >> 32).to(tl.uint32)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, tl.load(slot + NUMEL))
    while vector & (first + TILE <= end):
        i = tl.max_contiguous(first + tl.arange(0, TILE), VECTOR)
        update_tile(RULE, FORMATS, k, tensors, layouts, DENSE, first_index, i, None, VECTOR)
        first += TILE
    while first < end:
        i = first + tl.arange(0, LANES)
        update_tile(RULE, FORMATS, k, tensors, layouts, layout, first_index, i, i < end, 1)
        first += LANES


@triton.jit
def update_blocks(
    RULE: tl.constexpr,
    FORMATS: tl.constexpr,
    k,
    tensors,
    layouts,
    layout,
    slot,
    chunk,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A chunk of blocks of at most WIDTH elements, in tiles of one a row."""
    rows = tl.load(slot + ROWS)
    first_index = (rows >> 32).to(tl.uint32)
    rows &= 0xFFFFFFFF
    numel = tl.load(slot + NUMEL)
    row = numel // rows
    in_row = (row + BLOCK - 1) // BLOCK
    in_chunk = CHUNK // tl.minimum(row, BLOCK)
    first = chunk * in_chunk
    last = tl.minimum(first + in_chunk, rows * in_row)
    # Blocks are counted from the first of its row on: in 32 bits, for 64 take long to divide.
    first_row = first // in_row
    scale = numel + first_row * in_row
    end = (last - first_row * in_row).to(tl.int32)
    done = (first - first_row * in_row).to(tl.int32)
    in_row = in_row.to(tl.int32)
    COUNT: tl.constexpr = TILE // WIDTH
    lane = tl.arange(0, WIDTH)[None, :]
    while done < end:
        block = done + tl.arange(0, COUNT)
        rows_on = block // in_row
        in_its_row = (block - rows_on * in_row).to(tl.int64) * BLOCK
        begin = (first_row + rows_on) * row + in_its_row
        length = tl.minimum(row - in_its_row, BLOCK).to(tl.int32)
        i = begin[:, None] + lane
        if VECTOR > 1:
            length = tl.multiple_of(length, VECTOR)
            i = tl.max_contiguous(tl.multiple_of(i, [1, VECTOR]), [1, VECTOR])
        block_mask = block < end
        update_tile(
            RULE,
            FORMATS,
            k,
            tensors,
            layouts,
            layout,
            first_index,
            i,
            block_mask[:, None] & (lane < length[:, None]),
            VECTOR,
            scale + block,
            block_mask,
        )
        done += COUNT


@triton.jit(do_not_specialize=["slot_count"])
def update(
    slots,
    grads,
    layouts,
    scalars,
    slot_count,
    RULE: tl.constexpr,
    FORMATS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Phase two, a chunk per program: TILE elements of it at a time where all tensors are dense and
    aligned, the rest LANES at a time."""
    STATES: tl.constexpr = states(FORMATS)
    chunk = tl.program_id(0)
    i = slot_of_chunk(slots, slot_count, chunk)
    k = scalars + i * ROW
    if tl.load(k + K_SKIP) != 0:
        return
    slot = slots + i * SLOT
    p = tl.load(slot + PARAM)
    g = tl.load(grads + i)
    s0 = tl.load(slot + STATE) if STATES > 0 else p
    s1 = tl.load(slot + STATE + 1) if STATES > 1 else p
    s2 = tl.load(slot + STATE + 2) if STATES > 2 else p
    rest = tl.load(slot + STATE + STATES) if format_at(FORMATS, 0) == "split" else p
    tensors = (p, g, s0, s1, s2, rest)
    layout = lower(tl.load(slot + LAYOUT))
    chunk -= tl.load(slot + LAYOUT) >> 32
    vector = (layout == DENSE) & (((p | g | s0 | s1 | s2 | rest) & 15) == 0)
    if in_blocks(FORMATS):
        row = tl.load(slot + NUMEL) // (tl.load(slot + ROWS) & 0xFFFFFFFF)
        if vector & (row % VECTOR == 0):
            if row <= NARROW:
                update_blocks(
                    RULE, FORMATS, k, tensors, layouts, DENSE, slot, chunk, TILE, NARROW, VECTOR
                )
            else:
                update_blocks(
                    RULE, FORMATS, k, tensors, layouts, DENSE, slot, chunk, TILE, BLOCK, VECTOR
                )
        elif row <= NARROW:
            update_blocks(RULE, FORMATS, k, tensors, layouts, layout, slot, chunk, LANES, NARROW, 1)
        else:
            update_blocks(RULE, FORMATS, k, tensors, layouts, layout, slot, chunk, LANES, BLOCK, 1)
    else:
        update_elements(
            RULE, FORMATS, k, tensors, layouts, layout, slot, chunk, vector, TILE, LANES, VECTOR
        )


@triton.jit(do_not_specialize=["slot_count"])
def sum_squares(slots, grads, layouts, sums, slot_count, FORMATS: tl.constexpr, ROWS: tl.constexpr):
    """The sum of the squares of a chunk's gradients, a chunk per program of one warp."""
    G: tl.constexpr = format_at(FORMATS, 1)
    chunk = tl.program_id(0)
    i = slot_of_chunk(slots, slot_count, chunk)
    slot = slots + i * SLOT
    g = pointer(tl.load(grads + i), G)
    layout = lower(tl.load(slot + LAYOUT))
    first = (chunk - (tl.load(slot + LAYOUT) >> 32)) * CHUNK
    end = tl.minimum(first + CHUNK, tl.load(slot + NUMEL))
    lane = tl.arange(0, NORM_LANES)
    lanes = tl.zeros([NORM_LANES], tl.float64)
    if layout == DENSE:
        while first < end:
            for row in tl.static_range(ROWS):  # no load waits for another
                at = first + row * NORM_LANES + lane
                lanes += square(load(G, g + at, at < end, other=0))
            first += ROWS * NORM_LANES
    else:
        while first < end:
            at = first + lane
            _, in_memory, _, _, _, _, _ = strided(layouts + layout, at, FORMATS)
            lanes += square(load(G, g + in_memory, at < end, other=0))
            first += NORM_LANES
    tl.store(sums + chunk, add_lanes(lanes))


@triton.jit(do_not_specialize=["count", "value", "tensor", "dtype"])
def total(sums, count, value, tensor, dtype, norm, ROWS: tl.constexpr):
    """The norm from all chunks' sums, divided by the Number: one program of one warp."""
    lanes = tl.zeros([NORM_LANES], tl.float64)
    first = 0
    while first < count:
        for row in tl.static_range(ROWS):
            i = first + row * NORM_LANES + tl.arange(0, NORM_LANES)
            lanes += tl.load(sums + i, i < count, 0.0)
        first += ROWS * NORM_LANES
    scale = number_of(value.to(tl.int64), tensor.to(tl.int64), dtype)
    tl.store(norm, divide(square_root(add_lanes(lanes)), scale))
