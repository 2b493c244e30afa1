"""What the native core leaves to Python: making tensors, moving them, looking into subclasses."""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt import _C


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
        plain = plain.to(param.dtype) if plain.is_complex() == param.is_complex() else plain
    return plain, grad is not own or plain is not found


Number = float | Tensor


def formats(optimizer: Any, param: Tensor, keys: list[str]) -> list[str]:
    """The formats, by csrc's names, in which an optimizer keeps its states of a parameter under
    these keys; "" for those that are as torch has them."""
    own = (optimizer._states, optimizer._weights)
    return _C.formats(optimizer._rule, *own, _local(param), keys)


_PACKED = {"block signed": True, "block unsigned": False}  # whether they have a sign
_DTYPES = {
    "float32": torch.float32,
    "bfloat16 stochastic": torch.bfloat16,
    "remainder": torch.int16,
    **dict.fromkeys(_PACKED, torch.uint8),
}


def new_state(param: Any, first: Number, format: str) -> Any:
    """A state of a parameter before the first step, every number being ``first``.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    _refuse_in_graph(param.device, "it would make states anew at every replay")
    if format not in _PACKED:
        state = torch.zeros_like(param, dtype=_DTYPES.get(format))
        _fill(state, first)
        return state
    local = _local(param)
    if isinstance(first, Tensor) or first != 0:
        return recast(torch.full_like(local, float(first)), local, format)
    return torch.zeros(_C.block_bytes(local), dtype=torch.uint8, device=local.device)


@torch.no_grad()
def recast(value: Any, param: Any, format: str = "") -> Any:
    """A state as a format keeps it, beside its parameter; "": in the parameter's dtype.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    device = param.device
    if format == "":
        same_kind = value.is_complex() == param.is_complex()
        wide = is_wider(value.dtype, param.dtype)
        return value.to(device, value.dtype if wide or not same_kind else param.dtype)
    if value.dtype == _DTYPES[format]:
        return value.to(device)
    _refuse_in_graph(device, "it would convert states at every replay")
    if format == "remainder":
        warnings.warn(
            f"the remainder of split weights came back as {value.dtype} and is begun anew: "
            "something that saved or loaded the optimizer cast its states; keep int16 as it is",
            stacklevel=2,
        )
        return torch.zeros_like(param, dtype=torch.int16)
    if is_packed(value):
        raise ValueError(
            "a state is kept in 8 bits, which this optimizer's states= does not ask for; bring it "
            "over with load_state_dict of the other's state_dict"
        )
    if format not in _PACKED:
        return value.to(device, _DTYPES[format])
    shard = _local(value)
    if shard.shape != _local(param).shape:
        return value  # which does not fit: the core names the parameter
    numbers = shard.to("cpu", torch.float32).contiguous()
    packed = torch.empty(_C.block_bytes(numbers), dtype=torch.uint8)
    _C.encode(numbers, _rows(numbers), numbers.numel(), _PACKED[format], packed)
    return packed.to(device)


def is_packed(value: Any) -> bool:
    """Whether a state is one of 8-bit numbers: codes, then scales, in one tensor of bytes."""
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1


@torch.no_grad()
def decoded(packed: Tensor, param: Any, format: str) -> Any:
    """An 8-bit state as bfloat16, of the parameter's shape: on the CPU, or a DTensor as it is."""
    numbers = torch.empty(_local(param).shape, dtype=torch.bfloat16)
    _C.decode(packed.cpu(), _rows(numbers), numbers.numel(), _PACKED[format], numbers)
    if not _is_dtensor(param):
        return numbers
    # from_local would move an offloaded shard to its mesh's device.
    whole = torch.empty_like(param, dtype=torch.bfloat16)
    _local(whole).copy_(numbers)
    return whole


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if _is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def place_in_whole(param: Any) -> tuple[int, tuple[int, ...]] | None:
    """Where a DTensor's shard lies in the whole parameter: the index of its first element, and how
    it grows along each dimension. None where the shard is all there is, or nothing."""
    return _place(param._spec) if _is_dtensor(param) else None


@functools.cache
def _place(spec: Any) -> tuple[int, tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(spec.shape)
    _, offset = compute_local_shape_and_global_offset(shape, spec.mesh, spec.placements)
    strides = [1] * len(shape)
    for d in range(len(shape) - 1, 0, -1):
        strides[d - 1] = strides[d] * shape[d]
    return sum(map(operator.mul, offset, strides)), tuple(strides)


def new_norm(device: torch.device) -> Tensor:
    """Memory for one number on an accelerator."""
    return torch.empty((), dtype=torch.float64, device=device)


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


def is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype == torch.float32 and than in (torch.bfloat16, torch.float16)


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


def _refuse_in_graph(device: torch.device, reason: str) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot capture this step: {reason}; make one step before capturing")
