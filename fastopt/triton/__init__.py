"""The Triton backend: csrc/rules mirrored line for line, applied to the core's tables.

triton is imported in this folder only, and only once somebody asks for it.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OLDEST = (3, 6)  # torch 2.10's; the ones before take subnormal numbers for 0 on NVIDIA's GPUs

_YES = ("1", "true", "yes", "on", "y")  # what any triton takes for one in its environment


class Table(NamedTuple):
    """A table of csrc/table.h, with the groups of its step, as raw little-endian memory.

    Args:
        place: what it is for, and which of the tables that are: ("update", 0).
        device: where all of its tensors are.
        formats: csrc's names of those of param, grad, the states in use and, if the param is split,
            what completes it.
        count_formats: of the slots' counts.
        slots: struct Slot each, without the gradients' addresses.
        grads: the address of each slot's gradient.
        numbers: struct Number each: found_inf (0: none), grad_scale (1: none), norm, max_norm
            (infinite: none), skip (csrc/table.h's Skip), the counter of skipped steps (0: none),
            then every group's. For a norm there are none.
        layouts: Table::layouts.
        chunk_count: of all slots together.
    """

    place: tuple[str, int]
    device: torch.device
    formats: tuple[str, ...]
    count_formats: tuple[str, ...]
    slots: bytes
    grads: bytes
    numbers: bytes
    layouts: bytes
    chunk_count: int


def why_not(device: torch.device) -> str | None:
    """Why Triton cannot step on tensors of this device, or None where it can."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in _YES
    if device.type == "cpu" and not interpreted:
        return "Triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton has no backend for {device.type} tensors"
    if device.type != "cpu" and interpreted:
        return "TRITON_INTERPRET=1 is set, and the interpreter reads CPU memory only"
    return why_not_import()


@functools.cache
def why_not_import() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    oldest = ".".join(map(str, _OLDEST))
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        return f"triton {triton.__version__} is too old; pip install 'triton>={oldest}'"
    return None


def launch(cache: dict[Any, Any], kernels: str, *fields: Any) -> Tensor | None:
    """Run kernels on one table, on its device's current stream, without waiting for it.

    Args:
        cache: what an optimizer keeps on its devices from step to step; its own, empty at first.
        kernels: the kName of a rule, whose step is made, or "norm".
        fields: of a Table; for a norm its parameters are the gradients.

    Returns:
        For a norm the sum of the squares of each chunk, in float64.
    """
    from fastopt.triton.apply import apply, sum_squares

    table = Table(*fields)
    if kernels == "norm":
        return sum_squares(cache, table)
    apply(cache, kernels, table)
    return None


def total(sums: list[Tensor], grad_scale: bytes) -> Tensor:
    """The norm of the gradients whose squares' sums these are, in float64, on their device.

    Args:
        sums: of each table.
        grad_scale: a struct Number: the norm is divided by it.
    """
    from fastopt.triton.apply import total

    return total(sums, grad_scale)
