"""The one table of cases that the tests share.

A case is (optimizer, options, dtypes, layout, kept): `options` names keyword arguments in OPTIONS,
`layout` shapes and places in memory in LAYOUTS, and `kept` formats, which torch has not, in KEPT.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lion

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


SIZES = ((), (0,), (1,), (3,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (5, 3, 2, 4), (3, 130))
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

KEPT: dict[str, dict[str, Any]] = {
    "": {},
    "bfloat16": {"states": "bfloat16"},
    "8bit": {"states": "8bit"},
    "split": {"weights": "split"},
    "split bfloat16": {"weights": "split", "states": "bfloat16"},
    "split 8bit": {"weights": "split", "states": "8bit"},
    "stochastic": {"weights": "stochastic"},
    "stochastic bfloat16": {"weights": "stochastic", "states": "bfloat16"},
    "stochastic 8bit": {"weights": "stochastic", "states": "8bit"},
}


def in_formats(*names: str) -> list[tuple[dict[str, Any], torch.dtype]]:
    """Of each of these in KEPT the options, and a dtype of parameters that they are for."""
    return [
        (KEPT[name], torch.bfloat16 if "weights" in KEPT[name] else torch.float32) for name in names
    ]


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
    "Adadelta": {
        "default": {},
        "everything": {"rho": 0.7, "eps": 1e-4, "weight_decay": 0.1, "maximize": True},
        "tensor_lr": {"lr": torch.tensor(0.3)},
        "capturable": {"capturable": True},
    },
    "Adagrad": {
        "default": {},
        "everything": {
            "lr_decay": 0.1,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.3,
            "eps": 1e-6,
            "maximize": True,
        },
        "tensor_lr": {"lr": torch.tensor(3e-3)},
    },
    "Adamax": {
        "default": {},
        "everything": {"betas": (0.7, 0.8), "eps": 0.1, "weight_decay": 0.1, "maximize": True},
        "tensor_lr": {"lr": torch.tensor(3e-3)},
        "capturable": {"capturable": True},
    },
    "ASGD": {
        "default": {},
        "averaging": {"t0": 1.0, "lambd": 0.1, "alpha": 0.3},
        "everything": {
            "t0": 2.0,
            "lambd": 0.03,
            "alpha": 1.7,
            "weight_decay": 0.1,
            "maximize": True,
        },
        "tensor_lr": {"lr": torch.tensor(3e-3)},
        "capturable": {"capturable": True},
    },
    "Lion": {
        "default": {},
        "everything": {"betas": (0.7, 0.8), "weight_decay": 0.1, "maximize": True},
        "tensor_lr": {"lr": torch.tensor(3e-3)},
    },
    "NAdam": {
        "default": {},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "everything": {
            "betas": (0.7, 0.8),
            "eps": 1e-3,
            "momentum_decay": 0.3,
            "weight_decay": 0.1,
            "maximize": True,
        },
        "tensor_lr": {"lr": torch.tensor(3e-3)},
        "capturable": {"capturable": True},
    },
    "RAdam": {
        "default": {},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        # rectified from the second step on
        "everything": {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        "tensor_lr": {"lr": torch.tensor(3e-3)},
        "capturable": {"capturable": True},
    },
    "RMSprop": {
        "default": {},
        "momentum": {"momentum": 0.9},
        "centered": {"centered": True, "alpha": 0.8},
        "everything": {
            "momentum": 0.9,
            "centered": True,
            "alpha": 0.8,
            "eps": 1e-3,
            "weight_decay": 0.1,
            "maximize": True,
        },
        "tensor_lr": {"lr": torch.tensor(3e-3)},
        "capturable": {"capturable": True},
    },
    "Rprop": {
        "default": {},
        "everything": {"etas": (0.3, 1.7), "step_sizes": (0.005, 0.02), "maximize": True},
        "tensor_lr": {"lr": torch.tensor(3e-3)},
        "capturable": {"capturable": True},
    },
}

IN_TORCH = [name for name in OPTIONS if name != "Lion"]

# What an optimizer keeps of a parameter: numbers, and tensors like it.
COUNTS = {"SGD": [], "Lion": [], "NAdam": ["step", "mu_product"], "ASGD": ["step", "eta", "mu"]}
STATES = {
    "Adam": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "AdamW": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "SGD": ["momentum_buffer"],
    "Adadelta": ["square_avg", "acc_delta"],
    "Adagrad": ["sum"],
    "Adamax": ["exp_avg", "exp_inf"],
    "ASGD": ["ax"],
    "Lion": ["exp_avg"],
    "NAdam": ["exp_avg", "exp_avg_sq"],
    "RAdam": ["exp_avg", "exp_avg_sq"],
    "RMSprop": ["square_avg", "momentum_buffer", "grad_avg"],
    "Rprop": ["prev", "step_size"],
}
# Of these, the option that asks for it; and the option that says how others begin, or the number.
ONLY_WITH = {"max_exp_avg_sq": "amsgrad", "momentum_buffer": "momentum", "grad_avg": "centered"}
FIRST = {
    "mu_product": 1.0,
    "mu": 1.0,
    "eta": "lr",
    "step_size": "lr",
    "sum": "initial_accumulator_value",
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    options: str
    dtypes: Dtypes
    layout: str
    kept: str = ""

    def __str__(self) -> str:
        names = [self.optimizer, self.options, str(self.dtypes), self.layout, self.kept]
        return "-".join(filter(None, names))

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
        kwargs = copy.deepcopy(OPTIONS[self.optimizer][self.options]) | KEPT[self.kept] | overrides
        optimizer = construct(module, self.optimizer, params, **kwargs)
        if self.dtypes.state != self.dtypes.param:
            for param in params:
                optimizer.state[param] = _first_state(optimizer, param, self.dtypes.state)
        return optimizer


# Options about who makes a step: not every class of torch's knows each.
HINTS = ("fused", "foreach", "capturable", "differentiable")


def construct(module: Any, name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer of torch.optim or fastopt, without the hints that it does not know."""
    cls = lion.Lion if module is torch.optim and name == "Lion" else getattr(module, name)
    known = inspect.signature(cls).parameters
    return cls(params, **{k: v for k, v in kwargs.items() if k not in HINTS or k in known})


def _random(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int, device: str
) -> list[Tensor]:
    """Drawn on the CPU in the widest dtype: all devices and dtypes see the same values. Of float64
    x86 makes a float16 by way of float32, ARM at once: here both do the former."""
    generator = torch.Generator().manual_seed(seed)
    widest = torch.complex128 if dtype.is_complex else torch.float64
    values = [torch.randn(shape, dtype=widest, generator=generator) for shape in shapes]
    if dtype == torch.float16:
        values = [value.float() for value in values]
    return [value.to(device, dtype) for value in values]


def state_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """The per-element states of an optimizer's first group, in torch's names."""
    group = optimizer.param_groups[0]
    return [
        key
        for key in STATES[type(optimizer).__name__]
        if key not in ONLY_WITH or group[ONLY_WITH[key]]
    ]


def count_names(optimizer: torch.optim.Optimizer) -> list[str]:
    return COUNTS.get(type(optimizer).__name__, ["step"])


def first_value(key: str, group: dict[str, Any]) -> float:
    """Of a state before the first step."""
    first = FIRST.get(key, 0.0)
    return float(group[first] if isinstance(first, str) else first)


def _first_state(
    optimizer: torch.optim.Optimizer, param: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    group = optimizer.param_groups[0]
    state = {
        key: torch.full((), first_value(key, group), device=param.device)
        for key in count_names(optimizer)
    }
    for key in state_names(optimizer):
        state[key] = torch.full_like(param, first_value(key, group), dtype=dtype)
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


def _cases_of_torch() -> list[Case]:
    """Of Adam and SGD every option in the usual dtypes, every dtype with the fewest and the most
    options, and every layout with the most; of the others, which share all but the arithmetic with
    them, every option once and the most in all that arithmetic is done in."""
    return [
        Case(optimizer, options, dtypes, layout)
        for optimizer in OPTIONS
        for options in OPTIONS[optimizer]
        for dtypes in [*UNIFORM, *MIXED]
        for layout in LAYOUTS
        if (_is_one_of_many if optimizer in ("Adam", "SGD") else _is_one_of_few)(
            options, dtypes, layout
        )
    ]


def _is_one_of_many(options: str, dtypes: Dtypes, layout: str) -> bool:
    return (
        (layout == "sizes" and dtypes in (FLOAT32, FLOAT64, BFLOAT16))
        or (layout == "sizes" and options in ("default", "everything"))
        or (options == "everything" and dtypes in (FLOAT32, BFLOAT16, COMPLEX64, MIXED[0]))
    )


def _is_one_of_few(options: str, dtypes: Dtypes, layout: str) -> bool:
    if layout == "sizes":
        return dtypes == FLOAT64 or (
            options == "everything" and dtypes in (FLOAT32, BFLOAT16, COMPLEX64, MIXED[0])
        )
    return options == "everything" and (dtypes, layout) in (
        (FLOAT32, "large"),
        (FLOAT16, "every_second"),
        (COMPLEX128, "transposed_grad"),
    )


# Dtypes, and the formats that they are kept in: of every optimizer, and of Adam and SGD.
_FEW_FORMATS = [
    (FLOAT32, "bfloat16"),
    (FLOAT32, "8bit"),
    (BFLOAT16, "split"),
    (BFLOAT16, "split 8bit"),
    (MIXED[0], "stochastic 8bit"),
]
_MANY_FORMATS = [
    *_FEW_FORMATS,
    *((dtypes, "8bit") for dtypes in (FLOAT64, FLOAT16, BFLOAT16, MIXED[4])),
    *((BFLOAT16, kept) for kept in ("split bfloat16", "stochastic")),
    (MIXED[0], "split 8bit"),
]


def _cases_in_formats() -> list[Case]:
    """Of every optimizer the most options, and of Adam and SGD every option and every layout in
    two of them."""
    return [
        Case(optimizer, options, _kept_in(dtypes), layout, kept)
        for optimizer in OPTIONS
        for options in OPTIONS[optimizer]
        for dtypes, kept in (_MANY_FORMATS if optimizer in ("Adam", "SGD") else _FEW_FORMATS)
        for layout in LAYOUTS
        if (layout == "sizes" and options == "everything")
        or (
            optimizer in ("Adam", "SGD")
            and (options == "everything" or layout == "sizes")
            and (dtypes, kept) in ((FLOAT32, "8bit"), (BFLOAT16, "split bfloat16"))
        )
    ]


def _kept_in(dtypes: Dtypes) -> Dtypes:
    """Formats say how states are kept: none is there beforehand."""
    return dtypes._replace(state=dtypes.param)


CASES_OF_TORCH = _cases_of_torch()
CASES = CASES_OF_TORCH + _cases_in_formats()
