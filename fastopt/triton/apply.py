"""What is sent to the device, and the launches: of a rule on a table, and for a norm."""

from __future__ import annotations

import ctypes
import functools
import struct
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastopt import _C
from fastopt.triton import (
    Table,
    adadelta,
    adagrad,
    adam,
    adamax,
    asgd,
    average,
    kernels,
    lion,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
)
from fastopt.triton.formats import STORAGE, any_random

# As csrc/rules/rules.h: one line here registers a rule's mirror.
RULES = {
    "adadelta": adadelta,
    "adagrad": adagrad,
    "adam": adam,
    "adamax": adamax,
    "asgd": asgd,
    "average": average,
    "lion": lion,
    "nadam": nadam,
    "radam": radam,
    "rmsprop": rmsprop,
    "rprop": rprop,
    "sgd": sgd,
}

# The rules say where to round: no multiplication is fused with an addition.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Slots of a program of advance, one a thread.
SLOTS = 128

# Elements that a program of update takes at a time. A tile is 8 a thread: one 128-bit access to a
# 16-bit tensor, two to float32, four to float64. float32 Adam then needs 72 registers on sm_90. Of
# any rule at least 5 programs share a multiprocessor in float32 and 4 in all other formats but
# float64: Adam has 32 KiB of loads in flight and more, which hides the latency of its memory.
# Lanes, where each access is single anyway, are one a thread: more of them would need more
# registers than the tiles do.
TILE, LANES = 1024, 128

# For a norm a program is one warp, whose threads are the lanes. It has so many bytes of each lane
# on their way at a time: 2 KiB in all, and of 32 programs, which share a multiprocessor, 64 KiB.
# The last one has no other beside it.
NORM_OPTIONS = {**OPTIONS, "num_warps": 1}
LANE_BYTES, LAST_LANE_BYTES = 64, 256

_ROW_BYTES = 8 * kernels.SLOT.value


def apply(cache: dict[Any, Any], rule: str, table: Table) -> None:
    """See fastopt.triton.launch."""
    slot_count = len(table.slots) // _ROW_BYTES
    advance, update = constants(rule, table.formats, table.count_formats, table.device.type)
    with _surroundings(table.device):
        slots, grads, numbers, layouts = on_device(cache, table)
        scalars = torch.empty(
            (slot_count, kernels.ROW.value),
            dtype=torch.float64 if table.formats[0] == "float64" else torch.float32,
            device=table.device,
        )
        kernels.advance[(-(-slot_count // SLOTS),)](
            slots, numbers, scalars, slot_count, *advance, **OPTIONS
        )
        if table.chunk_count:
            kernels.update[(table.chunk_count,)](
                slots, grads, layouts, scalars, slot_count, *update, **OPTIONS
            )


def sum_squares(cache: dict[Any, Any], table: Table) -> Tensor:
    """See fastopt.triton.launch."""
    with _surroundings(table.device):
        slots, grads, _, layouts = on_device(cache, table)
        sums = torch.empty(table.chunk_count, dtype=torch.float64, device=table.device)
        if table.chunk_count:
            kernels.sum_squares[(table.chunk_count,)](
                slots,
                grads,
                layouts,
                sums,
                len(table.grads) // 8,
                table.formats,
                rows(table.formats[1], table.device.type, LANE_BYTES),
                **NORM_OPTIONS,
            )
    return sums


def total(sums: list[Tensor], grad_scale: bytes) -> Tensor:
    """See fastopt.triton.total."""
    # As arguments of the kernel: a graph has them for good, and no memory to read them from.
    value, tensor, dtype = struct.unpack("<qqB7x", grad_scale)
    of_all = sums[0] if len(sums) == 1 else torch.cat(sums)
    norm = torch.empty((), dtype=torch.float64, device=of_all.device)
    with _surroundings(of_all.device):
        kernels.total[(1,)](
            of_all,
            of_all.numel(),
            value,
            tensor,
            dtype,
            norm,
            rows("float64", of_all.device.type, LAST_LANE_BYTES),
            **NORM_OPTIONS,
        )
    return norm


def rows(format: str, device: str, lane_bytes: int) -> int:
    """How many numbers of each lane are loaded at a time."""
    # The interpreter takes them one after another, and had better none past the end.
    return 1 if device == "cpu" else 8 * lane_bytes // STORAGE[format].primitive_bitwidth


class Constants(NamedTuple):
    advance: tuple[Any, ...]
    update: tuple[Any, ...]


@functools.cache
def constants(
    rule: str, formats: tuple[str, ...], count_formats: tuple[str, ...], device: str
) -> Constants:
    """The kernels' constexpr arguments."""
    mirror = RULES[rule]
    counts = [STORAGE[format] for format in count_formats]
    no_counts = [tl.float32] * (kernels.MOST_COUNTS.value - len(counts))
    # As many elements at a time as 128 bits of the widest format hold. Were each format accessed by
    # 128 bits, the compiler would pass some through shared memory, to compute with all alike.
    vector = 128 // max(STORAGE[format].primitive_bitwidth for format in formats)
    # To the interpreter an operation costs the same on any number of elements.
    whole = kernels.CHUNK.value
    tile, lanes = (whole, whole) if device == "cpu" else (TILE, LANES)
    own = len(_C.counts[rule])
    return Constants(
        (mirror.advance, own, any_random(formats), len(counts), *counts, *no_counts, SLOTS),
        (mirror.update, formats, tile, lanes, vector),
    )


def _surroundings(device: torch.device) -> AbstractContextManager[Any]:
    """What a launch needs around it: its device as the current one, or numpy's silence."""
    if device.type == "cpu":
        from fastopt.triton import interpreter

        return interpreter.interpreting()
    return torch.accelerator.device_index(device.index)


def on_device(cache: dict[Any, Any], table: Table) -> list[Tensor]:
    """The table's slots, grads, numbers and layouts on its device: sent only where they changed.

    What was sent is never overwritten, only replaced by a new tensor. Each stream has its own, for
    torch then does the rest: it gives their memory to nobody before the stream's kernels have read
    them. A step on another stream sends them there, too.
    """
    data = (table.slots, table.grads, table.numbers, table.layouts)
    spare: list[Tensor] = cache.setdefault(("spare", table.place, table.device), [])
    if table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Every replay copies them anew, so the pinned memory must live as long as the graph may: as
        # long as the optimizer, whose states it updates. The copies are the graph's own, nothing
        # for later steps; and what earlier steps sent may be gone when it is replayed.
        memory = spare or [pinned(field, table.device) for field in data]
        staged = [stage(field, table.device, at) for field, at in zip(data, memory, strict=True)]
        spare.clear()
        cache.setdefault("captured", []).append(staged)
        return [send(staging, table.device) for staging in staged]
    cpu = table.device.type == "cpu"
    stream = None if cpu else torch.accelerator.current_stream(table.device).stream_id
    held = cache.setdefault((table.place, table.device, stream), {})
    for i, field in enumerate(data):
        if i not in held or held[i][0] != field:
            held[i] = field, send(stage(field, table.device), table.device)
    if table.device.type == "cuda" and not spare:
        # For a graph to come: early versions of torch allocate no pinned memory during capture.
        spare += [pinned(field, table.device) for field in data]
    return [held[i][1] for i in range(len(data))]


def stage(data: bytes, device: torch.device, memory: Tensor | None = None) -> Tensor:
    """The data in pinned memory to send from: what is given if it fits, which nobody may have used.

    Else new: torch reuses it, but not before it has been sent.
    """
    if memory is None or memory.nbytes != len(data):
        memory = pinned(data, device)
    ctypes.memmove(memory.data_ptr(), data, len(data))
    return memory


def pinned(data: bytes, device: torch.device) -> Tensor:
    """Memory for as much data; on the CPU it need not be pinned."""
    return torch.empty(len(data) // 8, dtype=torch.int64, pin_memory=device.type != "cpu")


def send(staging: Tensor, device: torch.device) -> Tensor:
    return staging.to(device, non_blocking=True)
