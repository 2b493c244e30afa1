"""What surrounds a step, by name: each says what is timed and what happens before, untimed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter, ParameterList
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastopt
from fastopt.optimizer import FusedOptimizer

Make = Callable[..., Optimizer]


class Plain:
    """The step alone.

    Args:
        shapes: of the parameters; they and their gradients are made here.
        make: an optimizer of given parameters, if it is one of ours with these further options.
    """

    # Of torch's Adams, without which the situation cannot be had.
    options: ClassVar[dict[str, Any]] = {}
    # Of our classes, with which the step does what others leave to the loop.
    ours: ClassVar[dict[str, Any]] = {}
    # float32: parameter, gradient, two states, and as much as foreach takes for a moment.
    bytes_per_element: ClassVar[int] = 24
    shared_bytes_per_element: ClassVar[int] = 0  # by all contenders
    # In its place for an optimizer that does itself what surrounds the step here.
    by_itself: ClassVar[type[Plain] | None] = None

    def __init__(
        self, shapes: list[tuple[int, ...]], make: Make, dtype: torch.dtype, device: str
    ) -> None:
        self.params = [Parameter(torch.randn(s, dtype=dtype, device=device)) for s in shapes]
        self.grads = [p.detach().clone() for p in self.params]
        self.make = make
        self.optimizers = self.make_optimizers()

    @property
    def is_ours(self) -> bool:
        return isinstance(self.optimizers[0], FusedOptimizer)

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def make_optimizers(self) -> list[Optimizer]:
        return [self.make(self.params, self.ours)]

    def before(self) -> None:
        self.give(self.grads)  # some optimizers take them away

    def give(self, grads: list[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def turn(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Clip(Plain):
    """Gradients clipped to norm 1, which theirs is above, by torch's function; but by our steps
    themselves."""

    ours: ClassVar[dict[str, Any]] = {"max_grad_norm": 1.0}

    def before(self) -> None:
        super().before()
        if not hasattr(self, "values"):
            self.values = [grad.clone() for grad in self.grads]
        for grad, values in zip(self.grads, self.values, strict=True):
            grad.copy_(values)

    def turn(self) -> None:
        if not self.is_ours:
            clip_grad_norm_(self.params, 1.0)
        super().turn()


class TorchsClip(Clip):
    """By torch's function before any step."""

    ours: ClassVar[dict[str, Any]] = {}

    def turn(self) -> None:
        clip_grad_norm_(self.params, 1.0)
        super(Clip, self).turn()


class OurClip(Clip):
    """By our function before any step."""

    ours: ClassVar[dict[str, Any]] = {}

    def turn(self) -> None:
        fastopt.clip_grad_norm_(self.params, 1.0)
        super(Clip, self).turn()


class ClipAlone(Clip):
    """Without the step: by our function, and by torch's for all others."""

    ours: ClassVar[dict[str, Any]] = {}

    def turn(self) -> None:
        clip = fastopt.clip_grad_norm_ if self.is_ours else clip_grad_norm_
        clip(self.params, 1.0)


class Skip(Plain):
    """No step where the norm of the gradients is not finite: our step sees to it, for all others
    the loop does."""

    ours: ClassVar[dict[str, Any]] = {"max_grad_norm": math.inf, "skip_nonfinite": True}

    def turn(self) -> None:
        if self.is_ours or get_total_norm(self.grads).isfinite():
            super().turn()


class Average(Plain):
    """An exponential moving average of the parameters: of our step's own, or of AveragedModel."""

    ours: ClassVar[dict[str, Any]] = {"average": 0.999}

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        super().__init__(shapes, make, dtype, device)
        if not self.is_ours:
            self.model = ParameterList(self.params)
            self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def turn(self) -> None:
        super().turn()
        if not self.is_ours:
            self.averaged.update_parameters(self.model)


class Busy(Plain):
    """As many other processes computing as there are cores, as a data loader's workers do."""

    # Of all contenders together: processes for as long as there are contenders.
    workers: ClassVar[list[subprocess.Popen[bytes]]] = []
    contenders: ClassVar[int] = 0

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        super().__init__(shapes, make, dtype, device)
        if not Busy.workers:
            command = [sys.executable, "-c", "while True: pass"]
            cores = len(os.sched_getaffinity(0))
            Busy.workers += [subprocess.Popen(command) for _ in range(cores)]
        Busy.contenders += 1
        weakref.finalize(self, Busy.leave)

    @staticmethod
    def leave() -> None:
        Busy.contenders -= 1
        while Busy.workers and not Busy.contenders:
            Busy.workers.pop().kill()


class Scaler(Plain):
    """Stepped by a GradScaler, whose scale of 1 leaves the gradients as they are."""

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        super().__init__(shapes, make, dtype, device)
        self.scaler = torch.amp.GradScaler(device, init_scale=1.0, growth_interval=1 << 30)
        self.scaler.scale(torch.ones((), device=device))  # makes the scale's tensor

    def turn(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()


class Fresh(Plain):
    """Every gradient at a new address, as backward leaves it after zero_grad(set_to_none=True)."""

    def before(self) -> None:
        self.grads = [grad.clone() for grad in self.grads]  # made before the old ones are freed
        super().before()


class First(Plain):
    """The first step, which makes the states, of a new optimizer each time."""

    def before(self) -> None:
        self.optimizers = self.make_optimizers()
        super().before()


class Backward(Plain):
    """An optimizer for each parameter, as hooks in backward step them; without the backward."""

    def make_optimizers(self) -> list[Optimizer]:
        return [self.make([param], self.ours) for param in self.params]


class Sharded(Plain):
    """DTensors, as FSDP2's parameters are, on a mesh of one process. All contenders step on the
    same, or large models had no room."""

    bytes_per_element: ClassVar[int] = 8  # two states
    shared_bytes_per_element: ClassVar[int] = 16
    beside: ClassVar[weakref.WeakSet[Sharded]] = weakref.WeakSet()

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        other = next((s for s in Sharded.beside if s.is_of(shapes, dtype, device)), None)
        if other is not None:
            self.params, self.grads = other.params, other.grads
        else:
            wholes = [torch.randn(s, dtype=dtype) for s in shapes]
            self.grads = [_sharded(whole.clone(), device) for whole in wholes]
            self.params = [Parameter(_sharded(whole, device)) for whole in wholes]
        self.make = make
        self.optimizers = self.make_optimizers()
        Sharded.beside.add(self)

    def is_of(self, shapes: Any, dtype: torch.dtype, device: str) -> bool:
        mine = [(tuple(p.shape), p.dtype, p.device.type) for p in self.params]
        return mine == [(tuple(shape), dtype, device) for shape in shapes]


def _sharded(whole: Tensor, device: str) -> Tensor:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device, (1,))
    whole = whole.to(device)
    if whole.is_cpu and torch.cuda.is_available():
        whole = whole.pin_memory()  # as offloading does: faster to copy from and to
    return DTensor.from_local(whole, mesh, [Shard(0)], run_check=False)


class OffloadsItself(Plain):
    """What an optimizer of a GPU's parameters does that fetches gradients by hooks in backward,
    steps in the host's memory and takes the new parameters back."""

    def make_optimizers(self) -> list[Optimizer]:
        self.whole: Any = self.make(self.params, self.ours)
        of_small = [self.whole.d_opt] if self.whole.d_opt else []
        return [*self.whole.optim_dict.values(), *of_small]

    def before(self) -> None:
        self.whole.zero_grad()

    def turn(self) -> None:
        torch.autograd.backward(self.params, self.grads)  # runs the hooks, and nothing else
        self.whole.step()


class Offloaded(Sharded):
    """The step that FSDP2's CPUOffloadPolicy leaves to a CPU: on DTensors in the host's memory. If
    there is a GPU, with what moves: its gradients before the step, its parameters after it."""

    by_itself: ClassVar[type[Plain] | None] = OffloadsItself

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        super().__init__(shapes, make, dtype, "cpu")
        of_gpu = [] if device == "cpu" else self.params
        self.grads_there = [torch.randn_like(p.to_local(), device=device) for p in of_gpu]
        self.params_there = [grad.clone() for grad in self.grads_there]

    def turn(self) -> None:
        for there, grad in zip(self.grads_there, self.grads, strict=False):
            grad.to_local().copy_(there, non_blocking=True)
        if self.grads_there:
            torch.accelerator.synchronize()
        super().turn()
        for there, param in zip(self.params_there, self.params, strict=False):
            there.copy_(param.to_local(), non_blocking=True)


class HalfGradients(Plain):
    """float32 parameters whose gradients come in bfloat16: ours reads them as they are, for all
    others they are converted."""

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        super().__init__(shapes, make, dtype, device)
        self.grads = [grad.bfloat16() for grad in self.grads]
        for param in self.params:
            param.grad_dtype = None  # any

    def turn(self) -> None:
        if not self.is_ours:
            self.give([g.to(p.dtype) for p, g in zip(self.params, self.grads, strict=True)])
        super().turn()


class Graph(Plain):
    """Replay of a CUDA graph of the step."""

    options: ClassVar[dict[str, Any]] = {"capturable": True}

    def __init__(self, shapes: Any, make: Make, dtype: torch.dtype, device: str) -> None:
        super().__init__(shapes, make, dtype, device)
        self.before()
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            super().turn()
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            super().turn()

    def turn(self) -> None:
        self.graph.replay()


SITUATIONS: dict[str, type[Plain]] = {
    "plain": Plain,
    "clip": Clip,
    "torch's clip": TorchsClip,
    "our clip": OurClip,
    "clip alone": ClipAlone,
    "skip": Skip,
    "average": Average,
    "busy": Busy,
    "scaler": Scaler,
    "fresh": Fresh,
    "first": First,
    "backward": Backward,
    "sharded": Sharded,
    "offloaded": Offloaded,
    "bfloat16 gradients": HalfGradients,
    "graph": Graph,
}
