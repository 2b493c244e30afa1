"""Fused optimizers for PyTorch: torch.optim's classes, one native call a step."""

from importlib.machinery import PathFinder

__version__ = "0.2.0"

# As in a clone: its folder hides what is installed, whose core would be that of other sources.
if PathFinder.find_spec("fastopt._C", __path__) is None:
    raise ImportError(
        f"{__path__[0]} has no native core for this Python; if it is part of a clone, run "
        "`pip install -e .` there, or start Python elsewhere to import what is installed"
    )

from fastopt.adadelta import Adadelta
from fastopt.adagrad import Adagrad
from fastopt.adam import Adam, AdamW
from fastopt.adamax import Adamax
from fastopt.asgd import ASGD
from fastopt.clip import clip_grad_norm_, get_total_norm
from fastopt.lion import Lion
from fastopt.nadam import NAdam
from fastopt.optimizer import backends
from fastopt.options import Options
from fastopt.patching import patch
from fastopt.radam import RAdam
from fastopt.rmsprop import RMSprop
from fastopt.rprop import Rprop
from fastopt.sgd import SGD

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "Options",
    "RAdam",
    "RMSprop",
    "Rprop",
    "backends",
    "clip_grad_norm_",
    "get_total_norm",
    "patch",
]
