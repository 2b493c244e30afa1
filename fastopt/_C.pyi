"""The native core (csrc/module.cpp)."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

build: dict[str, Any]

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
    states: str | None,
    weights: str | None,
    launch_triton: Callable[..., Any],
    passes: Any,
) -> str | None:
    """One step over all groups; returns why torch must make it instead, having changed nothing."""

def clip_grad_norm(
    tensors: Iterable[Tensor],
    max_norm: Tensor | float | None,
    error_if_nonfinite: bool,
    threads: int,
    backend: str | None,
    launch_triton: Callable[..., Any],
) -> tuple[Tensor | float, str] | str:
    """Clips the tensors' gradients; returns their norm and the name of its dtype, or why torch must
    do it instead. Without a limit it is the norm of the tensors themselves, and nothing is
    written, nor where the norm is to be finite and is not."""

def formats(
    rule: str, states: str | None, weights: str | None, param: Tensor, keys: list[str]
) -> list[str]:
    """A parameter's state under each key by the format's name in csrc/table.cpp; "" for torch's."""

def block_bytes(param: Tensor) -> int:
    """The size of a parameter's state in 8 bits: codes and scales."""

def encode(numbers: Tensor, rows: int, numel: int, is_signed: bool, packed: Tensor) -> None:
    """Fill the bytes of an 8-bit state from float32 numbers; all contiguous, on the CPU."""

def decode(packed: Tensor, rows: int, numel: int, is_signed: bool, numbers: Tensor) -> None:
    """Fill bfloat16 numbers from an 8-bit state; all contiguous, on the CPU."""

def why_not_cuda(index: int = 0) -> str:
    """Why this build's CUDA kernels cannot run on a device; empty where they can."""
