"""Text classification: what every task shares that assigns one label to a text."""

from __future__ import annotations

import csv
import json
import random
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    logging,
)

from . import InputError, Task
from .fetch import Package

Example = tuple[str, str]  # text, label

HELD_OUT_SHARE = 0.2
# Not --seed: all seeds are judged on the same held-out texts and can be compared.
SPLIT_SEED = 0
COLUMNS = ("text", "label")


class TextClassification(Task):
    """A pretrained encoder with a new linear head, trained on (text, label) examples."""

    package: Package  # of the task's own model
    max_tokens: int  # of a text; the rest is cut off

    @abstractmethod
    def own_examples(self, cache: Path) -> tuple[str, list[Example]]:
        """Name and examples of the task's own data."""

    def __init__(self, model: str | None, dataset: str | None, cache: Path) -> None:
        if dataset is None:
            self.dataset, examples = self.own_examples(cache)
        else:
            self.dataset, examples = dataset, read_examples(dataset)
        train, held_out = split(examples)
        self.labels = sorted({label for _, label in train})
        self.majority = Counter(label for _, label in train).most_common(1)[0][0]

        self.model = model or self.package.requirement
        self._weights = model or str(self.package.fetch(cache))
        stored = _load(AutoConfig, self._weights).dtype
        if stored not in (None, torch.float32):
            self.model += f" (stored in {stored})"
        self.processor = _load(AutoTokenizer, self._weights)
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

    def load_model(self, checkpoint: Path | None = None) -> PreTrainedModel:
        model = _load(
            AutoModelForSequenceClassification,
            str(checkpoint or self._weights),
            dtype=torch.float32,
            id2label=dict(enumerate(self.labels)),
            label2id={label: number for number, label in enumerate(self.labels)},
            ignore_mismatched_sizes=True,  # a head trained for other labels gives way to a new one
        )
        model.config.pad_token_id = self.processor.pad_token_id
        return model

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

    def rows(self, metrics: dict[str, Any]) -> list[tuple[str, str]]:
        baseline = metrics["baseline"]
        return [
            ("held-out accuracy", f"{metrics['accuracy']:.3f}"),
            (f"  trivial baseline: always {baseline['always']}", f"{baseline['accuracy']:.3f}"),
            ("held-out class (support)", "precision  recall      f1"),
        ] + [
            (
                f"  {label} ({figures['support']})",
                f"{figures['precision']:9.3f} {figures['recall']:7.3f} {figures['f1']:7.3f}",
            )
            for label, figures in metrics["per_class"].items()
        ]


def _load(auto: Any, name: str, **kwargs: Any) -> Any:
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


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Divide into train and held-out parts, class by class; the same at every call.

    Repeated texts count once, or the held-out part would hold texts seen in training.
    """
    by_label: dict[str, list[Example]] = defaultdict(list)
    for text, label in dict(examples).items():
        by_label[label].append((text, label))
    if len(by_label) < 2:
        raise InputError(
            f"the dataset has only one class, {next(iter(by_label))!r}: nothing to learn"
        )
    rng = random.Random(SPLIT_SEED)
    train, held_out = [], []
    for label in sorted(by_label):
        rows = by_label[label]
        if len(rows) < 2:
            raise InputError(
                f"class {label!r} has one example; it takes two, to train on and to hold out"
            )
        rng.shuffle(rows)
        count = max(1, round(len(rows) * HELD_OUT_SHARE))
        held_out += rows[:count]
        train += rows[count:]
    return train, held_out


def read_examples(source: str) -> list[Example]:
    """The examples of a file, or of a data set that the `datasets` library knows by name."""
    path = Path(source)
    if path.suffix in _READERS:
        rows = _read_file(path)
    elif path.is_file():
        raise InputError(f"--dataset {source}: expected a file ending in {', '.join(_READERS)}")
    else:
        rows = _read_hub(source)

    examples = []
    for number, row in enumerate(rows, start=1):
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            found = ", ".join(str(column) for column in row)
            raise InputError(
                f"--dataset {source}: row {number} has no column {missing[0]!r}; "
                f"it needs {' and '.join(COLUMNS)}, found {found}"
            )
        text, label = (str(row[column]).strip() for column in COLUMNS)
        if not text or not label:
            raise InputError(f"--dataset {source}: row {number} has an empty text or label")
        examples.append((text, label))
    if not examples:
        raise InputError(f"--dataset {source} has no rows")
    return examples


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(_READERS[path.suffix](file))
    except OSError as error:
        raise InputError(f"--dataset {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--dataset {path} is not UTF-8: {error.reason}; convert it") from error
    except (csv.Error, json.JSONDecodeError, _NotARow) as error:
        raise InputError(f"--dataset {path} is malformed: {error}") from error


class _NotARow(ValueError):
    pass


def _read_json(file: Any) -> Iterator[dict[str, Any]]:
    rows = json.load(file)
    if not isinstance(rows, list):
        raise _NotARow("expected a list of objects")
    yield from _objects(rows)


def _read_jsonl(file: Any) -> Iterator[dict[str, Any]]:
    yield from _objects(json.loads(line) for line in file if line.strip())


def _objects(rows: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise _NotARow(f"expected objects with {' and '.join(COLUMNS)}, found {row!r:.40}")
        yield row


_READERS = {
    ".csv": csv.DictReader,
    ".tsv": lambda file: csv.DictReader(file, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


def _read_hub(name: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset  # wanted by this one option only
    except ImportError as error:
        raise InputError(
            f"--dataset {name} is no file; to look it up on the hub: pip install datasets"
        ) from error
    try:
        table = load_dataset(name, split="train")
    except Exception as error:  # the library documents no common base of what it raises
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--dataset {name} cannot be loaded: {reason}") from error
    names = getattr(table.features.get("label"), "names", None)
    return [row | {"label": names[row["label"]]} if names else row for row in table]
