"""Fused optimizers for PyTorch: torch.optim's classes, one native call a step."""

from fastopt.adam import Adam, AdamW
from fastopt.optimizer import backends
from fastopt.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "backends"]
