"""The two optimizers of a comparison, as --optimizer and --against name them."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastopt.options import DEFAULTS as OUR_OPTIONS

from .tasks import InputError


@dataclass(frozen=True)
class Contender:
    """One of the two optimizers under comparison."""

    path: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.path}({arguments})" if arguments else self.path

    def require_valid(self, lr: float) -> None:
        """Raise InputError if the class does not take these arguments."""
        try:
            self.cls([nn.Parameter(torch.zeros(1))], lr=lr, **self.kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.name} cannot be made: {error}") from error


def contenders(optimizer: str, against: str | None) -> dict[str, Contender]:
    """The optimizers of --against and --optimizer, in this order."""
    ours = parse_optimizer(optimizer)
    if against is not None:
        return {"against": parse_optimizer(against), "optimizer": ours}
    cls = getattr(torch.optim, ours.cls.__name__, None)
    if cls is None:
        raise InputError(f"torch.optim has no {ours.cls.__name__}: name its rival with --against")
    # fused=True is Trainer's own choice since torch 2.8.
    kwargs = {key: value for key, value in ours.kwargs.items() if key not in OUR_OPTIONS}
    stock = Contender(f"torch.optim.{cls.__name__}", cls, kwargs | {"fused": True})
    return {"against": stock, "optimizer": ours}


def parse_optimizer(spec: str) -> Contender:
    """`package.Class` or `package.Class:key=value,key=value`, values as in Python."""
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
    return Contender(path, cls, kwargs)
