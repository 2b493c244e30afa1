"""The native core (csrc/module.cpp)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

build: dict[str, str]

def step(
    rule: str,
    param_groups: list[dict[str, Any]],
    state: dict[Any, Any],
    memory: Callable[[Tensor, Tensor], Tensor | str],
    new_states: Callable[[Tensor, list[str], bool], dict[str, Tensor]],
    grad_scale: Tensor | float | None,
    found_inf: Tensor | float | None,
    threads: int,
) -> str | None:
    """One step over all groups; returns why torch must make it instead, having changed nothing."""

def why_not(
    param_groups: list[dict[str, Any]], memory: Callable[[Tensor, Tensor], Tensor | str]
) -> str | None:
    """What ``step`` would return, without making the step."""
