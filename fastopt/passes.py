"""What a step does beside its rule: clips, skips, averages."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastopt.options import Options


@dataclass
class Passes:
    """The options of an optimizer, which csrc/options.cpp reads, and what it notes down.

    Args:
        max_grad_norm, skip_nonfinite, average: see fastopt.options.Options.
        total_norm: of all gradients, for the next step, of which the caller knows more than it.
        norm: the last step's, before clipping: a number, or a tensor of float64 on the device.
        in_double: whether any of its gradients was in float64.
        skipped: how many steps the host has found that were to be skipped.
        counters: and the devices.
        is_averaged: whether the model has the averages now.
    """

    max_grad_norm: float | Tensor | None = None
    skip_nonfinite: bool = False
    average: float | None = None
    total_norm: float | Tensor | None = None
    norm: float | Tensor | None = None
    in_double: bool = False
    skipped: int = 0
    counters: dict[torch.device, Tensor] = field(default_factory=dict)
    is_averaged: bool = False

    def check_step(self) -> None:
        """Raise RuntimeError where a step cannot do what is asked of it."""
        if self.is_averaged:
            raise RuntimeError("the model has its averages; leave averaged() before the next step")
        if (
            self.max_grad_norm is not None
            and self.total_norm is None
            and torch._C._current_graph_task_id() != -1
        ):
            raise RuntimeError(
                "max_grad_norm is about the norm of all gradients, and this step is made during "
                "the backward pass, before all are there; step after it, or say what the norm is "
                "by optimizer.total_norm (if this is the only parameter, by its gradient's norm)"
            )

    def note(self, norm: float | Tensor, in_double: bool) -> None:
        self.norm, self.in_double, self.total_norm = norm, in_double, None

    def count_skipped(self) -> None:
        self.skipped += 1

    def counter(self, device: torch.device) -> Tensor:
        if device not in self.counters:
            self.counters[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self.counters[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "norm": None, "total_norm": None, "is_averaged": False}


def check_norm(name: str, value: float | Tensor | None, without: str) -> None:
    """Raise ValueError, which ends with ``without``, unless it is None or can be a norm."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be one real number, not a tensor of shape {list(value.shape)} and "
                f"{value.dtype}; give torch.tensor(1.0)"
            )
    elif value is not None and not (_is_real(value) and value >= 0):
        raise ValueError(f"{name} must be a number from 0 on, not {value!r}; {without}")


def passes_of(options: Options) -> Passes | None:
    """The passes that the options ask for; None where they ask for none.

    Raises:
        ValueError: an option is out of range or lacks what it needs.
    """
    limit = options["max_grad_norm"]
    check_norm("max_grad_norm", limit, "None does not clip")
    decay = options["average"]
    if decay is not None and not (_is_real(decay) and 0 <= decay < 1):
        raise ValueError(
            f"average must be a decay from 0 up to 1, such as 0.999, not {decay!r}; "
            "None keeps no average"
        )
    skip = options["skip_nonfinite"]
    if not isinstance(skip, bool):
        raise ValueError(f"skip_nonfinite must be True or False, not {skip!r}")
    if skip and limit is None:
        raise ValueError(
            "skip_nonfinite=True needs max_grad_norm=, whose norm it asks; "
            "float('inf') clips nothing"
        )
    if limit is None and decay is None:
        return None
    return Passes(limit, skip, None if decay is None else float(decay))


def _is_real(value: Any) -> bool:
    if isinstance(value, bool | Tensor):
        return False
    try:
        return not math.isnan(float(value)) and not isinstance(value, str)
    except (TypeError, ValueError):
        return False


@contextmanager
def lent(optimizer: torch.optim.Optimizer, passes: Passes) -> Iterator[None]:
    """The parameters' averages in their place, as `FusedOptimizer.averaged` promises."""
    if passes.is_averaged:
        raise RuntimeError("the model has its averages already; leave the inner averaged() out")
    states = optimizer.state
    swapped = [
        (p, states[p]["average"])
        for group in optimizer.param_groups
        for p in group["params"]
        if p in states and "average" in states[p]
    ]
    grad_enabled = torch.is_grad_enabled()
    with torch.no_grad():
        kept = [p.detach().clone() for p, _ in swapped]
        passes.is_averaged = True
        try:
            for p, average in swapped:
                p.copy_(average)
            with torch.set_grad_enabled(grad_enabled):
                yield
        finally:
            for (p, _), weights in zip(swapped, kept, strict=True):
                p.copy_(weights)
            passes.is_averaged = False
