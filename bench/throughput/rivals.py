"""Everything a step is measured against, by name: ours, torch's own, other libraries'.

To add one: a function that imports the library and makes the optimizer called `name` (Adam, AdamW,
SGD, ...) with torch's options, and a line in CONTENDERS. Whatever it raises, there or in the first
steps, is the reason for which the contender is skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

OURS = "fastopt"
FUSED, FOREACH, AUTHORS = "torch fused", "torch foreach", "authors' loop"
INSIDE = ", clipping inside"  # after the name of one of ours: its step clips, no call before it
LR = 1e-3  # some have no default


def reference_of(name: str) -> str:
    """What the others are measured against: torch's fused step, or else its foreach step, or else
    the authors' loop."""
    cls = getattr(torch.optim, name, None)
    if cls is None:
        return AUTHORS
    return FUSED if "fused" in inspect.signature(cls).parameters else FOREACH


def fastopt(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import fastopt

    return getattr(fastopt, name)(params, **{"lr": LR} | options)


def keeping(**formats: str) -> Callable[..., Optimizer]:
    """Ours with states or weights kept in these formats."""

    def make(params: list[Parameter], name: str, **options: Any) -> Optimizer:
        if "weights" in formats and params[0].dtype != torch.bfloat16:
            raise ValueError("it is for bfloat16 parameters")
        return fastopt(params, name, **formats, **options)

    return make


def fastopt_triton(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    return fastopt(params, name, backend="triton", **options)


def torch_fused(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    return getattr(torch.optim, name)(params, fused=True, **{"lr": LR} | options)


def torch_foreach(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    return getattr(torch.optim, name)(params, foreach=True, **{"lr": LR} | options)


def torch_loop(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    return getattr(torch.optim, name)(params, foreach=False, **{"lr": LR} | options)


def authors_loop(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import lion  # of the tests

    return getattr(lion, name)(params, **{"lr": LR} | options)


def torch_compile(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    optimizer = torch_foreach(params, name, **options)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def torch_optimi(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import optimi

    return getattr(optimi, name)(params, **{"lr": LR} | options)


def torchao_8bit(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import torchao.optim

    return getattr(torchao.optim, f"{name}8bit")(params, **{"lr": LR} | options)


def torchao_4bit(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import torchao.optim

    return getattr(torchao.optim, f"{name}4bit")(params, **{"lr": LR} | options)


def torchao_offload(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    from torchao.optim import CPUOffloadOptimizer

    cls = getattr(torch.optim, name)
    return CPUOffloadOptimizer(params, cls, fused=True, **{"lr": LR} | options)


def torchao_offload_of_ours(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    from torchao.optim import CPUOffloadOptimizer

    import fastopt

    return CPUOffloadOptimizer(params, getattr(fastopt, name), **{"lr": LR} | options)


def bitsandbytes(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(params, **{"lr": LR} | options)


def bitsandbytes_8bit(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import bitsandbytes

    return getattr(bitsandbytes.optim, f"{name}8bit")(params, **{"lr": LR} | options)


def flashoptim(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import flashoptim

    return getattr(flashoptim, f"Flash{name}")(params, **{"lr": LR} | options)


def heavyball(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    import heavyball

    return getattr(heavyball, name)(params, **{"lr": LR} | options)


def deepspeed_fused(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(params, adam_w_mode=_decoupled(name), **{"lr": LR} | options)


def deepspeed_cpu(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if not all(p.is_cpu for p in params):
        raise ValueError("DeepSpeedCPUAdam steps on CPU parameters")
    # Of DTensors it is given the shards, as its own engine gives it plain tensors.
    shards = [Parameter(p.to_local()) if isinstance(p, DTensor) else p for p in params]
    optimizer = DeepSpeedCPUAdam(shards, adamw_mode=_decoupled(name), **{"lr": LR} | options)

    def hand_over(*_: Any) -> None:
        for param, shard in zip(params, shards, strict=True):
            if isinstance(param.grad, DTensor):
                shard.grad = param.grad.to_local()

    optimizer.register_step_pre_hook(hand_over)
    return optimizer


def apex(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    from apex.optimizers import FusedAdam, FusedSGD

    if name == "SGD":
        return FusedSGD(params, **{"lr": LR} | options)
    return FusedAdam(params, adam_w_mode=_decoupled(name), **{"lr": LR} | options)


def transformer_engine(params: list[Parameter], name: str, **options: Any) -> Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam, FusedSGD

    if name == "SGD":
        return FusedSGD(params, **{"lr": LR} | options)
    return FusedAdam(params, adam_w_mode=_decoupled(name), **{"lr": LR} | options)


def _decoupled(name: str) -> bool:
    """Which of the two Adams, where one class is both."""
    modes = {"Adam": False, "AdamW": True}
    if name not in modes:
        raise ValueError(f"it has no {name}")
    return modes[name]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Args:
        make: its optimizer, given parameters, torch's name and torch's options.
        package: whose version the results state.
        compiles: it does so when made or first stepped, for up to minutes; left out by default.
        offloads: it keeps a GPU's parameters in the host's memory, and is for `offloaded` alone.
    """

    make: Callable[..., Optimizer]
    package: str
    compiles: bool = False
    offloads: bool = False

    def version(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package


CONTENDERS = {
    OURS: Contender(fastopt, "fastopt"),
    FUSED: Contender(torch_fused, "torch"),
    "fastopt bfloat16 states": Contender(keeping(states="bfloat16"), "fastopt"),
    "fastopt 8-bit states": Contender(keeping(states="8bit"), "fastopt"),
    "fastopt split": Contender(keeping(weights="split"), "fastopt"),
    "fastopt split, bfloat16 states": Contender(
        keeping(weights="split", states="bfloat16"), "fastopt"
    ),
    "fastopt split, 8-bit states": Contender(keeping(weights="split", states="8bit"), "fastopt"),
    "fastopt stochastic": Contender(keeping(weights="stochastic"), "fastopt"),
    "fastopt stochastic, bfloat16 states": Contender(
        keeping(weights="stochastic", states="bfloat16"), "fastopt"
    ),
    "fastopt stochastic, 8-bit states": Contender(
        keeping(weights="stochastic", states="8bit"), "fastopt"
    ),
    "fastopt triton": Contender(fastopt_triton, "fastopt"),
    FOREACH: Contender(torch_foreach, "torch"),
    "torch loop": Contender(torch_loop, "torch"),
    AUTHORS: Contender(authors_loop, "torch"),
    "torch compile": Contender(torch_compile, "torch", compiles=True),
    "torch-optimi": Contender(torch_optimi, "torch-optimi"),
    "torchao 8-bit": Contender(torchao_8bit, "torchao", compiles=True),
    "torchao 4-bit": Contender(torchao_4bit, "torchao", compiles=True),
    "bitsandbytes": Contender(bitsandbytes, "bitsandbytes"),
    "bitsandbytes 8-bit": Contender(bitsandbytes_8bit, "bitsandbytes"),
    "FlashOptim": Contender(flashoptim, "flashoptim"),
    "heavyball": Contender(heavyball, "heavyball", compiles=True),
    "DeepSpeed FusedAdam": Contender(deepspeed_fused, "deepspeed", compiles=True),
    "DeepSpeed CPUAdam": Contender(deepspeed_cpu, "deepspeed", compiles=True),
    "torchao offload": Contender(torchao_offload, "torchao", offloads=True),
    "torchao offload, fastopt": Contender(torchao_offload_of_ours, "torchao", offloads=True),
    "apex": Contender(apex, "apex"),
    "Transformer Engine": Contender(transformer_engine, "transformer-engine"),
}
