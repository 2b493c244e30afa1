"""Gradient norms and clipping: torch.nn.utils' functions in one native call."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

from fastopt import _C, triton
from fastopt.options import Backend


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` in one native call, for the 2-norm of dense gradients.

    Squares are summed in float64 and in the same order on every backend. Gradients are not written
    where their norm is within ``max_norm``. Other norms and sparse gradients are torch's to clip.

    Args:
        parameters: whose gradients, in place, are multiplied by ``max_norm / (norm + 1e-6)`` if
            that is less than 1; any shapes, devices and floating-point or complex dtypes.
        max_norm: the largest norm that is left alone, a float or a 1-element tensor.
        norm_type: of the norm; other values than 2 take torch's function (default: 2.0).
        error_if_nonfinite: raise instead of clipping by a norm that is infinite or NaN
            (default: False).
        foreach: a hint for torch's function (default: None).
        backend: "cpu", "cuda", "triton" or, for torch's own function, "torch"; None picks by device
            (default: None).

    Returns:
        The norm of all gradients together before clipping, a tensor of no dimensions on the first
        gradient's device and in the widest of the gradients' dtypes. Of DTensors on one mesh it is
        one, replicated.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and it is not; no gradient has been changed.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if float(norm_type) == 2.0 and backend != "torch":
        limit = max_norm if isinstance(max_norm, Tensor) else float(max_norm)
        found = _norm(parameters, limit, error_if_nonfinite, backend)
        if found is not None:
            return found
    return torch_clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`torch.nn.utils.get_total_norm` in one native call, for the 2-norm of dense tensors.

    Args:
        tensors: those whose norm is asked for, such as gradients.
        norm_type, error_if_nonfinite, foreach, backend: as of `clip_grad_norm_`.

    Returns:
        As `clip_grad_norm_`.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and it is not.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if float(norm_type) == 2.0 and backend != "torch":
        found = _norm(tensors, None, error_if_nonfinite, backend)
        if found is not None:
            return found
    return torch_get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)


@torch.no_grad()
def _norm(
    tensors: list[Tensor], limit: float | Tensor | None, must_be_finite: bool, backend: str | None
) -> Tensor | None:
    """The norm, clipped by unless the limit is None; or None where it is torch's to do."""
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return None
    buffers: dict[Any, Any] = _of_thread.__dict__.setdefault("buffers", {})
    launch = functools.partial(triton.launch, buffers)
    threads = torch.get_num_threads()
    found = _C.clip_grad_norm(tensors, limit, must_be_finite, threads, backend, launch)
    if isinstance(found, str):
        if backend is not None:
            raise RuntimeError(f"backend={backend!r} cannot take these gradients: {found}")
        return None
    value, dtype = found
    if must_be_finite and not math.isfinite(value):
        raise RuntimeError(
            "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To disable this error and scale the gradients by the non-finite "
            "norm anyway, set `error_if_nonfinite=False`"
        )
    norm = torch.as_tensor(value, dtype=getattr(torch, dtype))
    return _replicated(norm, tensors if limit is None else [p.grad for p in tensors])


# What Triton keeps on devices from call to call, and for good for CUDA graphs that hold one. Of
# each thread its own: two may clip at once.
_of_thread = threading.local()


def _replicated(norm: Tensor, grads: list[Any]) -> Tensor:
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None:
        return norm
    grads = [grad for grad in grads if grad is not None]
    if not grads or not all(isinstance(grad, distributed.DTensor) for grad in grads):
        return norm
    mesh = grads[0].device_mesh
    if any(grad.device_mesh != mesh for grad in grads):
        return norm
    placements = [distributed.Replicate()] * mesh.ndim
    whole: Tensor = distributed.DTensor.from_local(norm, mesh, placements, run_check=False)
    return whole


@functools.cache
def _sharded_dims(placements: tuple[Any, ...]) -> tuple[int, ...] | str:
    if any(placement.is_partial() for placement in placements):
        return "a gradient is a sum that is pending along a mesh"
    return tuple(d for d, placement in enumerate(placements) if placement.is_shard())


def sharded_along(grad: Any) -> Any:
    """What a gradient's squares are to be summed over: None, a mesh and its dimensions, or a
    reason why that cannot be done."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(grad, distributed.DTensor):
        return None
    dims = _sharded_dims(tuple(grad.placements))
    return dims if isinstance(dims, str) else (grad.device_mesh, dims) if dims else None


def combined(norms: list[float | Tensor], meshes: list[Any]) -> Tensor | float:
    """The norm of all from those of parts, each to be summed over the dimensions of a mesh."""
    total: Tensor | float = 0.0
    for norm, mesh in zip(norms, meshes, strict=True):
        square: Tensor | float = norm * norm
        if mesh is not None:
            square = _summed(square, *mesh)
        if isinstance(total, Tensor) and isinstance(square, Tensor):
            square = square.to(total.device, non_blocking=True)
        total = total + square
    return total.sqrt() if isinstance(total, Tensor) else math.sqrt(total)


def _summed(square: float | Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor | float:
    if mesh.get_coordinate() is None:
        return square
    tensor = torch.as_tensor(square, dtype=torch.float64)
    for dim in dims:
        torch.distributed.all_reduce(tensor, group=mesh.get_group(dim))
    return tensor if isinstance(square, Tensor) else tensor.item()
