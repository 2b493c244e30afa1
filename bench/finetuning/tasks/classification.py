"""Classification: what every task shares that assigns one label to a text or an image."""

from __future__ import annotations

import argparse
import random
from abc import abstractmethod
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from . import InputError, Task, head_labels, load
from .fetch import Source
from .files import read_rows
from .options import add_few_shot
from .split import SEED, divide, share_of

Input = TypeVar("Input")  # what is classified
Example = tuple[str, str]  # text, label


class Classification(Task):
    """Examples of two classes or more; accuracy, and precision, recall and F1 of each class."""

    labels: list[str]
    headline = "accuracy"
    majority: str  # the label most training examples have

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add_few_shot(parser, "examples of each class")

    def parts(
        self, examples: list[tuple[Input, str]], options: argparse.Namespace
    ) -> tuple[list[tuple[Input, str]], list[tuple[Input, str]]]:
        """Settle labels and majority, and return what to train on and what to hold out."""
        train, held_out = split(examples, options.validate)
        if options.few_shot is not None:
            train = first_of_each_class(train, options.few_shot)
        counts = Counter(label for _, label in train)
        self.labels = sorted(counts)
        self.majority = counts.most_common(1)[0][0]
        return train, held_out

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        chosen = predictions.argmax(axis=-1)
        columns = precision_recall_fscore_support(
            labels, chosen, labels=range(len(self.labels)), zero_division=0
        )
        per_class = {
            label: {"precision": p, "recall": r, "f1": f1, "support": int(support)}
            for label, p, r, f1, support in zip(
                self.labels, *(column.tolist() for column in columns), strict=True
            )
        }
        return {
            "accuracy": float((chosen == labels).mean()),
            "baseline": {
                "always": self.majority,
                "accuracy": float((labels == self.labels.index(self.majority)).mean()),
            },
            "per_class": per_class,
        }

    def rows(self, start: dict[str, Any], end: dict[str, Any]) -> list[tuple[str, str]]:
        baseline = end["baseline"]
        return [
            (
                "held-out accuracy, start to end",
                f"{start['accuracy']:.3f} to {end['accuracy']:.3f}",
            ),
            (f"  trivial baseline: always {baseline['always']}", f"{baseline['accuracy']:.3f}"),
            ("held-out class (support)", "precision  recall      f1"),
        ] + [
            (
                f"  {label} ({figures['support']})",
                f"{figures['precision']:9.3f} {figures['recall']:7.3f} {figures['f1']:7.3f}",
            )
            for label, figures in end["per_class"].items()
        ]


class TextClassification(Classification):
    """A pretrained encoder with a new linear head, trained on (text, label) examples."""

    columns = ("text", "label")
    prompt_type = "SEQ_CLS"
    own_model: Source
    max_tokens: int  # of a text; the rest is cut off

    @abstractmethod
    def own_examples(self, cache: Path) -> tuple[str, list[Example]]:
        """Name and examples of the task's own data."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.dataset is None:
            self.dataset, examples = self.own_examples(options.cache)
        else:
            self.dataset, examples = options.dataset, read_rows(options.dataset, self.columns)
        train, held_out = self.parts(examples, options)

        self.model = options.model or self.own_model.name
        self._weights = options.model or str(self.own_model.fetch(options.cache))
        config = load(AutoConfig, self._weights)
        if config.dtype not in (None, torch.float32):
            self.model += f" (stored in {config.dtype})"
        self.labels = head_labels(config, set(self.labels), options)
        self.processor = load(AutoTokenizer, self._weights)
        if self.processor.pad_token is None:  # decoder-only models have none
            self.processor.pad_token = self.processor.eos_token
        self.collate = DataCollatorWithPadding(self.processor)
        self.train, self.held_out = self._encode(train), self._encode(held_out)

    def _encode(self, examples: list[Example]) -> list[dict[str, Any]]:
        texts, labels = zip(*examples, strict=True)
        tokens = self.processor(list(texts), truncation=True, max_length=self.max_tokens)
        return [
            {name: column[row] for name, column in tokens.items()}
            | {"label": self.labels.index(label)}
            for row, label in enumerate(labels)
        ]

    def load_model(self) -> PreTrainedModel:
        model = load(
            AutoModelForSequenceClassification,
            self._weights,
            dtype=torch.float32,
            id2label=dict(enumerate(self.labels)),
            label2id={label: number for number, label in enumerate(self.labels)},
            ignore_mismatched_sizes=True,  # a head trained for other labels gives way to a new one
        )
        model.config.pad_token_id = self.processor.pad_token_id
        return model


def split(
    examples: list[tuple[Input, str]], validate: bool
) -> tuple[list[tuple[Input, str]], list[tuple[Input, str]]]:
    """Divide into train and held-out parts, class by class; the same at every call.

    Repeated inputs count once, or the held-out part would hold some seen in training.
    """
    by_label: dict[str, list[tuple[Input, str]]] = defaultdict(list)
    unique = dict(examples)
    for example in unique.items():
        by_label[example[1]].append(example)
    if len(by_label) < 2:
        raise InputError(
            f"the dataset has only one class, {next(iter(by_label))!r}: nothing to learn"
        )
    rng = random.Random(SEED)
    train, held_out = [], []
    for label in sorted(by_label):
        rows = by_label[label]
        rng.shuffle(rows)
        some, others = divide(rows, share_of(len(unique)), validate, f"class {label!r}")
        train += some
        held_out += others
    return train, held_out


def first_of_each_class(examples: list[tuple[Input, str]], few: int) -> list[tuple[Input, str]]:
    by_label: dict[str, list[tuple[Input, str]]] = defaultdict(list)
    for example in examples:
        by_label[example[1]].append(example)
    for label, rows in by_label.items():
        if len(rows) < few:
            raise InputError(f"--few-shot {few}: class {label!r} has {len(rows)} to train on")
    return [example for rows in by_label.values() for example in rows[:few]]
