"""How many bytes a step moves at least, and how many its states keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .situations import Plain


def moved_bytes(situation: Plain) -> int:
    """What a step reads and writes at least: all but the gradient is both."""
    params = sum(p.nbytes for p in situation.params)
    return (
        2 * params + sum(g.nbytes for g in situation.grads) + 2 * state_bytes(situation.optimizers)
    )


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Of all states that are no single numbers; one that several parameters share counts once."""
    found = {id(t): t for o in optimizers for t in tensors_in(dict(o.state))}
    return sum(t.nbytes for t in found.values() if t.dim())


def tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor) and hasattr(state, "__tensor_flatten__"):  # quantised, say
        names, _ = state.__tensor_flatten__()
        state = [getattr(state, name) for name in names]
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)
