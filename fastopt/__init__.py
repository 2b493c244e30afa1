"""Fused optimizers for PyTorch: torch.optim's classes, one native call a step."""

from importlib.machinery import PathFinder

# As in a clone: its folder hides what is installed, whose core would be that of other sources.
if PathFinder.find_spec("fastopt._C", __path__) is None:
    raise ImportError(
        f"{__path__[0]} has no native core for this Python; if it is part of a clone, run "
        "`pip install -e .` there, or start Python elsewhere to import what is installed"
    )

from fastopt.adam import Adam, AdamW
from fastopt.optimizer import backends
from fastopt.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "backends"]
