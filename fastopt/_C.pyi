"""The native core (csrc/module.cpp)."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

build: dict[str, str]

counts: dict[str, list[str]]
"""The numbers that a rule keeps for a parameter, by the rule's name; the step count first."""

def step(
    rule: str,
    param_groups: Iterable[Mapping[str, Any]],
    state: MutableMapping[Any, Any],
    grad_scale: Tensor | float | None,
    found_inf: Tensor | float | None,
    threads: int,
    backend: str | None,
    launch_triton: Callable[..., None],
) -> str | None:
    """One step over all groups; returns why torch must make it instead, having changed nothing."""

def why_not_cuda(index: int = 0) -> str:
    """Why this build's CUDA kernels cannot run on a device; empty where they can."""
