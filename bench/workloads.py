"""Lists of parameter shapes to step on, by name; models' own come from their configs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

Shapes = list[tuple[int, ...]]


@functools.cache
def bert_base() -> nn.Module:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return BertModel(BertConfig())


def full(model: Callable[[], nn.Module]) -> Shapes:
    return [tuple(p.shape) for p in model().parameters()]


def lora(model: Callable[[], nn.Module], rank: int) -> Shapes:
    """A and B of every linear layer in the model's encoder."""
    linears = [
        module
        for name, module in model().named_modules()
        if isinstance(module, nn.Linear) and "encoder" in name
    ]
    return [s for m in linears for s in ((rank, m.in_features), (m.out_features, rank))]


def mlp() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32, device="meta") for _ in range(100)))


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "one-tiny": lambda: [(16,)],  # optimizer-in-backward steps one parameter at a time
    "1000x16": lambda: [(16,)] * 1000,
    "mlp": lambda: full(mlp),
    "lora-bert": lambda: lora(bert_base, rank=8),
    "300x4096": lambda: [(4096,)] * 300,
    "300x65536": lambda: [(65536,)] * 300,
    "8x4M": lambda: [(1 << 22,)] * 8,
    "bert-base": lambda: full(bert_base),
}
