"""The jobs bench/finetune.py can run: one module here per job, listed in `TASKS`.

A task says where model and data come from, how examples become tensors and how predictions are
judged. Training, timing, comparing and reporting belong to bench/finetune.py and are the same
for all.
"""

from __future__ import annotations

import argparse
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer, logging

TASKS = (
    "topics",
    "sentiment",
    "ner",
    "images",
    "multimodal",
    "recommend",
    "translation",
    "dialogue",
)


class TaskError(Exception):
    """What stops a run, in one sentence for the user."""

    exit_code = 1


class InputError(TaskError):
    """The user's arguments or files cannot be used as they are."""

    exit_code = 2


class Task(ABC):
    """A model, its data and their measure; `bench/finetune.py` trains and compares.

    Args:
        options: the command line. Every task reads `model` (folder or hub name of a Hugging Face
            model; None for the task's own), `dataset` (file or hub name; None for the task's
            own), `cache` (where the task's own model and data are kept), `validate` (which part
            of the data to hold out: tasks/split.py), and what its `add_options` adds.
    """

    # Defaults of --steps, --batch-size, --lr and --head-lr: enough to learn well past the
    # trivial baseline.
    steps: int
    batch_size: int
    lr: float
    head_lr: float | None = None

    columns: tuple[str, ...]  # of a --dataset file
    headline: str  # the key of `metrics`, and of the baseline among them, that says it in a number
    continuable = True  # whether --continue-from can load what a run leaves in OUT/model
    prompt_type: str | None = None  # peft's name of the kind of model, if it reads text

    # What the constructor settles. `model` and `dataset` are the names the report prints.
    model: str
    dataset: str
    train: Sequence[dict[str, Any]]
    held_out: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    processor: (
        Any  # tokenizer or image processor: saved with each checkpoint; None if there is none
    )

    @staticmethod  # noqa: B027 - many have none to add
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add what only this task understands."""

    @staticmethod
    def program(options: argparse.Namespace) -> int | None:
        """Do what the options ask for in place of training; None if they ask for no such thing."""
        return None

    @abstractmethod
    def __init__(self, options: argparse.Namespace) -> None: ...

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The model that training starts from, in float32."""

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        """The held-out figures of report.json for the trainer's model, `loss` among them."""
        output = trainer.predict(self.held_out)
        return {
            "loss": output.metrics["test_loss"],
            **self.metrics(output.predictions, output.label_ids),
        }

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Of `evaluate`, what follows from predictions; the trivial baseline's among them."""
        raise NotImplementedError

    @staticmethod
    def compact(logits: Any, labels: Any) -> Any:
        """What `metrics` needs of a batch's logits, where these are too large to keep."""
        return logits

    @abstractmethod
    def rows(self, start: dict[str, Any], end: dict[str, Any]) -> list[tuple[str, str]]:
        """(Name, text) rows of the printed table, from the figures before and after training."""

    def notes(self, start: dict[str, Any], end: dict[str, Any]) -> list[str]:
        """Lines below the table, from the figures before and after training."""
        return []


def find(name: str) -> type[Task]:
    """The task class of one of `TASKS`; importing it only now keeps tasks independent."""
    return importlib.import_module(f"{__name__}.{name}").TASK


def head_labels(config: Any, found: set[str], options: argparse.Namespace) -> list[str]:
    """The labels in the order of the model's head if it knows all of them, else of a new one."""
    known = [config.id2label[number] for number in range(config.num_labels)]
    unknown = sorted(found - set(known))
    if unknown and options.continue_from is not None:
        raise InputError(
            f"--continue-from {options.continue_from}: label {unknown[0]!r} is unknown to its "
            f"model, which knows {', '.join(known)}"
        )
    return sorted(found) if unknown else known


def load(auto: Any, name: str, **kwargs: Any) -> Any:
    """`from_pretrained` without its report on the head it must add, and with one clear error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return auto.from_pretrained(name, local_files_only=Path(name).is_dir(), **kwargs)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model {name} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
