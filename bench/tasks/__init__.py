"""The jobs bench/finetune.py can run: one module here per job, listed in `TASKS`.

A task says where model and data come from, how examples become tensors and how predictions are
judged. Training, timing, comparing and reporting belong to bench/finetune.py and are the same
for all.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

TASKS = ("topics",)


class TaskError(Exception):
    """What stops a run, in one sentence for the user."""

    exit_code = 1


class InputError(TaskError):
    """The user's arguments or files cannot be used as they are."""

    exit_code = 2


class Task(ABC):
    """A model, its data and their measure; `bench/finetune.py` trains and compares.

    Args:
        model: folder or hub name of a Hugging Face model; None for the task's own.
        dataset: file or hub name; None for the task's own.
        cache: folder where the task's own model and data are kept.
    """

    # Defaults of --steps, --batch-size and --lr: enough to learn well past the trivial baseline.
    steps: int
    batch_size: int
    lr: float

    # What the constructor settles. `model` and `dataset` are the names the report prints.
    model: str
    dataset: str
    train: Sequence[dict[str, Any]]
    held_out: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    processor: Any  # tokenizer or image processor: saved with each checkpoint

    @abstractmethod
    def __init__(self, model: str | None, dataset: str | None, cache: Path) -> None: ...

    @abstractmethod
    def load_model(self, checkpoint: Path | None = None) -> PreTrainedModel:
        """The model in float32: from a checkpoint of this task, else as training starts from."""

    @abstractmethod
    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The held-out figures of report.json, the trivial baseline's among them."""

    @abstractmethod
    def rows(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        """The same figures as (name, text) rows of the printed table."""


def find(name: str) -> type[Task]:
    """The task class of one of `TASKS`; importing it only now keeps tasks independent."""
    return importlib.import_module(f"{__name__}.{name}").TASK
