"""What the native core leaves to Python: making tensors, moving them, looking into subclasses."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def memory(param: Tensor, tensor: Tensor) -> Tensor | str:
    """The plain tensor behind a subclass's ``tensor``, laid out as ``param``, or why there is none.

    A DTensor's is its local shard.
    """
    distributed = sys.modules.get("torch.distributed.tensor")  # loaded where there are DTensors
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        if not isinstance(param, distributed.DTensor) or (
            (tensor.device_mesh, tensor.placements) != (param.device_mesh, param.placements)
        ):
            return "a DTensor is sharded differently than its parameter"
        tensor = tensor._local_tensor
    if hasattr(tensor, "wait"):  # AsyncCollectiveTensor: its values are still on their way
        tensor = tensor.wait()
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(tensor).__name__} is a tensor subclass without memory of its own"
    return tensor


def new_states(param: Tensor, keys: list[str], counts_steps: bool) -> dict[str, Tensor]:
    """The states of a parameter's first step, as torch makes them for a fused step.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    _refuse_in_graph(param.device, "it would make states anew at every replay")
    states = (
        {"step": torch.zeros((), dtype=torch.float32, device=param.device)} if counts_steps else {}
    )
    for key in keys:
        states[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return states


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on another device, without waiting for it.

    Raises:
        RuntimeError: the step is being captured in a graph.
    """
    _refuse_in_graph(device, f"it would copy a tensor from {tensor.device} at every replay")
    return tensor.to(device, non_blocking=True)


def _refuse_in_graph(device: torch.device, reason: str) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot capture this step: {reason}; make one step before capturing")
