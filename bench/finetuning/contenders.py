"""The two optimizers of a comparison, as --optimizer and --against name them."""

from __future__ import annotations

import argparse
import ast
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastopt.options import DEFAULTS as OUR_OPTIONS

from .tasks import InputError
from .tuning import to_bfloat16

# In fp32, bf16 and fp16 parameters and gradients are float32, and the last two compute in 16 bits
# where autocast does; in WHOLLY_BF16 parameters and gradients are bfloat16, too.
WHOLLY_BF16 = "bf16-true"
PRECISIONS = ("fp32", "bf16", "fp16", WHOLLY_BF16)


@dataclass(frozen=True)
class Contender:
    """One of the two optimizers under comparison."""

    path: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    precision: str

    @property
    def name(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.path}({arguments})" if arguments else self.path

    def require_valid(self, lr: float) -> None:
        """Raise InputError if the class does not take these arguments."""
        try:
            self.cls(self.keeping(nn.Linear(1, 1)).parameters(), lr=lr, **self.kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.name} cannot be made: {error}") from error

    def keeping(self, model: nn.Module) -> nn.Module:
        """`model` itself, its numbers kept as this one trains them."""
        return to_bfloat16(model) if self.precision == WHOLLY_BF16 else model


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """The optimizers of --against and --optimizer, in this order."""
    ours = parse_optimizer(options.optimizer, options.precision, "--precision")
    precision = options.against_precision or options.precision
    if options.against is not None:
        against = parse_optimizer(options.against, precision, "--against-precision")
        return {"against": against, "optimizer": ours}
    cls = getattr(torch.optim, ours.cls.__name__, None)
    if cls is None:
        raise InputError(f"torch.optim has no {ours.cls.__name__}: name its rival with --against")
    # fused=True is Trainer's own choice since torch 2.8.
    kwargs = {key: value for key, value in ours.kwargs.items() if key not in OUR_OPTIONS}
    name = f"torch.optim.{cls.__name__}"
    stock = Contender(name, cls, kwargs | {"fused": True}, precision)
    return {"against": stock, "optimizer": ours}


def parse_optimizer(spec: str, precision: str, option: str) -> Contender:
    """`package.Class` or `package.Class:key=value,key=value`, values as in Python.

    Args:
        precision: that it trains in.
        option: which sets that.
    """
    path, _, arguments = spec.partition(":")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"optimizer {path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"{path!r} is not a torch.optim.Optimizer")
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("a keyword is missing")
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(f"optimizer arguments {arguments!r} are not KEY=VALUE,...") from error
    for key in kwargs.keys() & {"lr", "weight_decay"}:
        raise InputError(f"{spec}: {key} holds for both optimizers, give --{key.replace('_', '-')}")
    if kwargs.get("weights") is not None and precision != WHOLLY_BF16:
        raise InputError(
            f"{spec}: weights= keeps what bfloat16 parameters lose, and in {precision} they are "
            f"float32; give {option} {WHOLLY_BF16}, or leave it out"
        )
    return Contender(path, cls, kwargs, precision)
