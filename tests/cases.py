"""The one table of cases that tests and benchmarks share, and the oracle that judges them.

A case is (optimizer, options, dtypes, layout): `options` names keyword arguments in OPTIONS and
`layout` names shapes and places in memory in LAYOUTS.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 16384  # elements one worker takes at a time


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
    "large": Layout(((2 * CHUNK + 5,),)),
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


# The oracle.


def tensors_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Every parameter together with its states, by name; the tensors themselves, in group order."""
    return [
        {
            "param": param,
            **{k: v for k, v in optimizer.state.get(param, {}).items() if v is not None},
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def assert_same_tensors(
    actual: torch.optim.Optimizer, expected: torch.optim.Optimizer, **tolerance: Any
) -> None:
    """Parameters and states agree: as torch.testing does by default, or within rtol and atol."""
    for ours, theirs in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(
                ours[name].detach(),
                theirs[name].detach(),
                equal_nan=True,
                msg=lambda difference, name=name: f"{name}: {difference}",
                **tolerance,
            )


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [
        {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for tensors in tensors_of(optimizer)
    ]


def assert_unchanged(optimizer: torch.optim.Optimizer, since: list[dict[str, Tensor]]) -> None:
    """Not a bit of the parameters and states differs, and no state has come or gone."""
    for now, then in zip(tensors_of(optimizer), since, strict=True):
        assert now.keys() == then.keys()
        for name in now:
            torch.testing.assert_close(
                now[name].detach(), then[name], rtol=0, atol=0, equal_nan=True
            )


def wide(tensor: Tensor) -> Tensor:
    """A float64 copy; complex numbers become pairs, as the optimizers treat them."""
    tensor = tensor.detach().resolve_conj()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(
        torch.float64, copy=True
    )


class Oracle:
    """The optimizers' mathematics in float64, shadowing a real optimizer.

    It starts from the real parameters and states, then follows its own. A step reads the real
    groups and gradients, so it must come before the real step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._rule = _sgd if isinstance(optimizer, torch.optim.SGD) else _adam
        self.values = [
            {name: wide(tensor) for name, tensor in tensors.items()}
            for tensors in tensors_of(optimizer)
        ]

    def step(self) -> None:
        values = iter(self.values)
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                value = next(values)
                if param.grad is not None:
                    grad = wide(param.grad)
                    self._rule(value, -grad if group["maximize"] else grad, group)

    def ulp_errors(self) -> dict[str, Tensor]:
        """How far the real optimizer is off, element by element, in ulp of the real dtype.

        Where the truth is smaller than the root mean square of its kind, ulp of that are
        meant: next to zero a sum's error is that of its terms, and has no bound in ulp of the sum.
        """
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for real, truth in zip(tensors_of(self._optimizer), self.values, strict=True):
            assert real.keys() == truth.keys()
            for name, tensor in real.items():
                pairs.setdefault(name, []).append((tensor, truth[name]))
        errors = {}
        for name, kind in pairs.items():
            floor = torch.cat([truth.flatten() for _, truth in kind]).square().mean().sqrt()
            errors[name] = torch.cat(
                [
                    (
                        (wide(real) - truth).abs() / _ulp(real.dtype, truth.abs().clamp(min=floor))
                    ).flatten()
                    for real, truth in kind
                ]
            )
        return errors


def _ulp(dtype: torch.dtype, at: Tensor) -> Tensor:
    info = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(at, info.eps), torch.frexp(at).exponent - 1)
    return spacing.clamp(min=info.smallest_normal * info.eps)


def _adam(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    param = values["param"]
    step = values["step"] = values.get("step", torch.zeros((), dtype=torch.float64)) + 1

    if group["decoupled_weight_decay"]:
        param = param * (1 - lr * weight_decay)
    elif weight_decay != 0:
        grad = grad + weight_decay * param
    m = beta1 * values.get("exp_avg", torch.zeros_like(param)) + (1 - beta1) * grad
    v = beta2 * values.get("exp_avg_sq", torch.zeros_like(param)) + (1 - beta2) * grad**2
    values["exp_avg"], values["exp_avg_sq"] = m, v
    if group["amsgrad"]:
        v = torch.maximum(values.get("max_exp_avg_sq", torch.zeros_like(param)), v)
        values["max_exp_avg_sq"] = v
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    values["param"] = param - lr * m_hat / (v_hat.sqrt() + group["eps"])


def _sgd(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    lr, weight_decay, momentum = (float(group[k]) for k in ("lr", "weight_decay", "momentum"))
    if weight_decay != 0:
        grad = grad + weight_decay * values["param"]
    if momentum != 0:
        buffer = values.get("momentum_buffer")
        buffer = grad if buffer is None else momentum * buffer + (1 - group["dampening"]) * grad
        values["momentum_buffer"] = buffer
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    values["param"] = values["param"] - lr * grad
