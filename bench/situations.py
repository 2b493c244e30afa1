"""What surrounds a step, by name: each says what is timed and what happens before, untimed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

Make = Callable[..., Optimizer]


class Plain:
    """The step alone.

    Args:
        shapes: of the parameters; they and their gradients are made here.
        make: an optimizer of given parameters.
    """

    # Of torch's Adams, without which the situation cannot be had.
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, shapes: list[tuple[int, ...]], make: Make, dtype: torch.dtype, device: str
    ) -> None:
        self.params = [Parameter(torch.randn(s, dtype=dtype, device=device)) for s in shapes]
        self.grads = [p.detach().clone() for p in self.params]
        self.make = make
        self.optimizers = self.make_optimizers()

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def make_optimizers(self) -> list[Optimizer]:
        return [self.make(self.params)]

    def before(self) -> None:
        self.give(self.grads)  # some optimizers take them away

    def give(self, grads: list[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def turn(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Clip(Plain):
    """Gradients clipped to norm 1 first."""

    def turn(self) -> None:
        clip_grad_norm_(self.params, 1.0)
        super().turn()


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
        return [self.make([param]) for param in self.params]


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
    "scaler": Scaler,
    "fresh": Fresh,
    "first": First,
    "backward": Backward,
    "graph": Graph,
}
