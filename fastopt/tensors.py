"""What the native core leaves to Python: making tensors, moving them, looking into subclasses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def memory(param: Any, tensor: Any) -> Tensor | str:
    """The plain tensor behind a subclass's ``tensor``, laid out as ``param``, or why there is none.

    A DTensor's is its local shard.
    """
    if _is_dtensor(tensor):
        if not _is_dtensor(param) or (
            (tensor.device_mesh, tensor.placements) != (param.device_mesh, param.placements)
        ):
            return "a DTensor is sharded differently than its parameter"
        tensor = tensor._local_tensor
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
        tensor = tensor.wait()  # its values are still on their way
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(tensor).__name__} is a tensor subclass without memory of its own"
    return tensor  # type: ignore[no-any-return]


@torch.no_grad()
def gradient(param: Any, grad: Any) -> tuple[Tensor, bool] | str:
    """The plain tensor to step with for ``grad`` and whether it is a copy, or why there is none.

    A copy is made of a pending conjugation or negation, of float64 for another parameter and of
    other numbers for a float64 one, and of a DTensor that is sharded as its parameter is not: so
    are sums that sequence parallelism has left pending, reduced as torch's operations would.
    """
    own = grad
    if (
        _is_dtensor(grad)
        and _is_dtensor(param)
        and grad.device_mesh == param.device_mesh
        and grad.placements != param.placements
    ):
        grad = grad.redistribute(placements=param.placements)
    found = memory(param, grad)
    if isinstance(found, str):
        return found
    plain = found.resolve_conj().resolve_neg()
    if _is_double(plain) != _is_double(param):
        plain = recast(plain, param)
    return plain, grad is not own or plain is not found


def recast(tensor: Tensor, param: Tensor) -> Tensor:
    """``tensor`` in the dtype of ``param``, where both are complex or both real."""
    return tensor.to(param.dtype) if tensor.is_complex() == param.is_complex() else tensor


Number = float | Tensor


def new_states(
    params: Sequence[Tensor], counts: dict[str, Number], states: dict[str, Number]
) -> dict[str, tuple[Tensor, ...]]:
    """What is kept of several parameters from the first step on, as torch makes it for a fused one.

    Args:
        params: the parameters.
        counts: the keys of numbers to keep beside each, with their values before that step.
        states: likewise of tensors like each; both parts of a complex element get the value.

    Returns:
        The tensors of all parameters, by key.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    devices = {param.device for param in params}
    for device in devices:
        _refuse_in_graph(device, "it would make states anew at every replay")
    made = {key: _new_counts(params, devices) for key in counts}
    made |= {key: tuple(map(torch.zeros_like, params)) for key in states}
    for key, value in {**counts, **states}.items():
        if isinstance(value, Tensor) or value != 0:
            for tensor in made[key]:
                _fill(tensor, value)
    return made


def _new_counts(params: Sequence[Tensor], devices: set[torch.device]) -> tuple[Tensor, ...]:
    """A zero beside each parameter; on one device in one piece, a third of the time of each."""
    if len(devices) == 1:
        return torch.zeros(len(params), dtype=torch.float32, device=devices.pop()).unbind()
    return tuple(torch.zeros((), dtype=torch.float32, device=param.device) for param in params)


@torch.no_grad()
def _fill(tensor: Tensor, value: Number) -> None:
    reals = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    reals.fill_(value.reshape(()) if isinstance(value, Tensor) else value)


def count(value: Any, device: torch.device) -> Any:
    """A step count of any real number or tensor of one, as a tensor on ``device`` that can count.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    if isinstance(value, Tensor):
        value = moved(value, device)
        wide = value.dtype in (torch.float32, torch.float64) or value.is_complex()
        return value if wide else value.float()
    try:
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    except (TypeError, ValueError):
        return value  # which is no count: the core names the parameter


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on another device, without waiting for it.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    _refuse_in_graph(device, f"it would copy a tensor from {tensor.device} at every replay")
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def unscale(grads: Sequence[Tensor], grad_scale: Tensor | float, found_inf: Any = 0) -> None:
    """Divide gradients by ``grad_scale``, unless ``found_inf``; without waiting for either."""
    scale = torch.as_tensor(grad_scale)
    scale = torch.where(torch.as_tensor(found_inf, device=scale.device) != 0, 1, scale)
    on_device: dict[torch.device, Tensor] = {}
    for grad in grads:
        if grad.device not in on_device:
            on_device[grad.device] = scale.to(grad.device, non_blocking=True)
        grad.div_(on_device[grad.device])


def _is_dtensor(tensor: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # loaded where there are DTensors
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


def _refuse_in_graph(device: torch.device, reason: str) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot capture this step: {reason}; make one step before capturing")
