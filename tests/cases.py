"""The one table of cases that the tests share.

A case is (optimizer, options, dtypes, layout): `options` names keyword arguments in OPTIONS and
`layout` names shapes and places in memory in LAYOUTS.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 4096  # elements of a slot that are one task, as in csrc/slot.h
PARALLEL = 32768  # elements from which threads share a step, as in csrc/cpu/apply.cpp


class Dtypes(NamedTuple):
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in self]
        return names[0] if len(set(names)) == 1 else "/".join(names)


def all_of(dtype: torch.dtype) -> Dtypes:
    return Dtypes(dtype, dtype, dtype)


# Places in memory: each function copies a tensor to one of the same shape and values.


def contiguous(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def unaligned(values: Tensor) -> Tensor:
    """One element past an allocation's start, so that no vector load is aligned."""
    return values.new_empty(values.numel() + 1)[1:].view(values.shape).copy_(values)


def every_second(values: Tensor) -> Tensor:
    """Every second element of a wider tensor: neither contiguous nor dense."""
    *outer, last = values.shape or (1,)
    wider = values.new_empty(*outer, 2 * last)
    return wider[..., ::2].view(values.shape).copy_(values)


def transposed(values: Tensor) -> Tensor:
    backwards = tuple(reversed(range(values.dim())))
    return contiguous(values.permute(backwards)).permute(backwards)


def channels_last(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Layout:
    shapes: tuple[tuple[int, ...], ...]
    param: Callable[[Tensor], Tensor] = contiguous
    grad: Callable[[Tensor], Tensor] = contiguous


SIZES = ((), (0,), (1,), (3,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (5, 3, 2, 4))
IMAGES = ((4, 3, 5, 5), (2, 8, 1, 1))

LAYOUTS = {
    "sizes": Layout(SIZES),
    "large": Layout(((PARALLEL + CHUNK + 5,),)),
    "many": Layout((*[(7,), (2, 9), (1,)] * 100, (0,))),
    "unaligned": Layout(SIZES, unaligned, unaligned),
    "every_second": Layout(SIZES, every_second, every_second),
    "transposed": Layout(SIZES, transposed, transposed),
    "channels_last": Layout(IMAGES, channels_last, channels_last),
    "transposed_grad": Layout(SIZES, contiguous, transposed),
    "every_second_param": Layout(SIZES, every_second, contiguous),
    "channels_last_grad": Layout(IMAGES, contiguous, channels_last),
}

_ADAM_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "decay": {"weight_decay": 0.1},
    "no_decay": {"weight_decay": 0.0},
    "everything": {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
    "low_betas": {"betas": (0.3, 0.4)},
    "tensor_lr": {"lr": torch.tensor(3e-3)},
    "tensor_betas": {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
    "capturable": {"capturable": True},
}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "Adam": {**_ADAM_OPTIONS, "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True}},
    "AdamW": _ADAM_OPTIONS,
    "SGD": {
        "default": {},
        "decay": {"weight_decay": 0.1},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "maximize": {"maximize": True},
        "everything": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        "tensor_lr": {"lr": torch.tensor(3e-3), "momentum": 0.9},
    },
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    options: str
    dtypes: Dtypes
    layout: str

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.options}-{self.dtypes}-{self.layout}"

    def parameters(self, seed: int = 0, device: str = "cpu") -> list[torch.nn.Parameter]:
        layout = LAYOUTS[self.layout]
        values = _random(layout.shapes, self.dtypes.param, seed, device)
        params = [torch.nn.Parameter(layout.param(value)) for value in values]
        for param in params:
            param.grad_dtype = self.dtypes.grad
        return params

    def set_gradients(self, params: Sequence[Tensor], seed: int) -> None:
        """Gives every parameter the gradient of step `seed`."""
        layout = LAYOUTS[self.layout]
        values = _random(layout.shapes, self.dtypes.grad, 1 + seed, str(params[0].device))
        for param, value in zip(params, values, strict=True):
            param.grad = layout.grad(value)

    def make_optimizer(
        self, params: Sequence[Tensor], module: Any = torch.optim, **overrides: Any
    ) -> torch.optim.Optimizer:
        """The case's optimizer out of `module`: torch.optim, fastopt."""
        kwargs = copy.deepcopy(OPTIONS[self.optimizer][self.options]) | overrides
        optimizer = getattr(module, self.optimizer)(params, **kwargs)
        if self.dtypes.state != self.dtypes.param:
            for param in params:
                optimizer.state[param] = _zero_state(optimizer, param, self.dtypes.state)
        return optimizer


def _random(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int, device: str
) -> list[Tensor]:
    """Drawn on the CPU in the widest dtype: all devices and dtypes see the same values."""
    generator = torch.Generator().manual_seed(seed)
    widest = torch.complex128 if dtype.is_complex else torch.float64
    return [
        torch.randn(shape, dtype=widest, generator=generator).to(device, dtype) for shape in shapes
    ]


def state_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """The per-element states of an optimizer's first group, in torch's names."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return ["momentum_buffer"] if group["momentum"] != 0 else []
    return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]


def _zero_state(
    optimizer: torch.optim.Optimizer, param: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(param, dtype=dtype) for name in state_names(optimizer)}
    if not isinstance(optimizer, torch.optim.SGD):
        state["step"] = torch.zeros((), device=param.device)
    return state


FLOAT32 = all_of(torch.float32)
BFLOAT16 = all_of(torch.bfloat16)
FLOAT16 = all_of(torch.float16)
FLOAT64 = all_of(torch.float64)
COMPLEX64 = all_of(torch.complex64)
COMPLEX128 = all_of(torch.complex128)
UNIFORM = [FLOAT32, FLOAT64, BFLOAT16, FLOAT16, COMPLEX64, COMPLEX128]
MIXED = [
    Dtypes(torch.bfloat16, torch.float32, torch.float32),
    Dtypes(torch.bfloat16, torch.bfloat16, torch.float32),
    Dtypes(torch.bfloat16, torch.float32, torch.bfloat16),
    Dtypes(torch.float16, torch.float16, torch.float32),
    Dtypes(torch.float32, torch.bfloat16, torch.float32),
    Dtypes(torch.float32, torch.float32, torch.bfloat16),
]


def _cases() -> list[Case]:
    """Every option in the usual dtypes, every dtype with the fewest and the most options, and every
    layout with the most."""
    return [
        Case(optimizer, options, dtypes, layout)
        for optimizer in OPTIONS
        for options in OPTIONS[optimizer]
        for dtypes in [*UNIFORM, *MIXED]
        for layout in LAYOUTS
        if (layout == "sizes" and dtypes in (FLOAT32, FLOAT64, BFLOAT16))
        or (layout == "sizes" and options in ("default", "everything"))
        or (options == "everything" and dtypes in (FLOAT32, BFLOAT16, COMPLEX64, MIXED[0]))
    ]


CASES = _cases()
