"""Watch a stream of texts with a trained classifier, and say when negative ones surge.

Each line of input is a text, which came at the time it is read, or a JSON object with `text` and
`time` (ISO 8601, or seconds since 1970). For each text a line with its label, the probability of
it, and the share of negative ones in the window of time that ends with it; an alert when that
share rises to the threshold, and a line when it has fallen below again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from . import InputError, load
from .trained import trained_model

LEAST_TEXTS = 5  # in a window before its share means anything
MAX_TOKENS = 128
SHOWN = 60  # characters of a text


class BadLine(ValueError):
    """One line of input that cannot be understood: said, and passed over."""


class Window:
    """The share of negative texts in the last `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.texts: deque[tuple[float, bool]] = deque()

    def add(self, when: float, negative: bool) -> None:
        self.texts.append((when, negative))
        while self.texts[0][0] <= when - self.seconds:
            self.texts.popleft()

    @property
    def share(self) -> float:
        return sum(negative for _, negative in self.texts) / len(self.texts)


class Alarm:
    """Reports when the window's share reaches the threshold, and when it is below again."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.raised = False

    def update(self, window: Window) -> str | None:
        count = len(window.texts)
        surging = count >= LEAST_TEXTS and window.share >= self.threshold
        if surging == self.raised:
            return None
        self.raised = surging
        word = "ALERT" if surging else "calm again"
        return f"{word}: {window.share:.0%} of {count} texts negative, limit {self.threshold:.0%}"


def parse(line: bytes) -> tuple[float, str]:
    """Time and text of one line."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: {error.reason}") from error
    if not text.startswith("{"):
        return time.time(), text
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"malformed JSON: {error}") from error
    missing = [key for key in ("time", "text") if key not in row]
    if missing:
        raise BadLine(f"no {missing[0]!r} among {', '.join(row) or 'no keys'}")
    return _seconds(row["time"]), str(row["text"])


def _seconds(value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    try:
        when = datetime.fromisoformat(str(value).replace("Z", "+00:00"))  # Python 3.10 knows no Z
    except ValueError as error:
        raise BadLine(f"time {value!r} is neither ISO 8601 nor seconds") from error
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


class Classifier:
    """Label and probability of a text, by the model in a folder."""

    def __init__(self, folder: str, watched: str) -> None:
        self.model = load(AutoModelForSequenceClassification, folder).eval()
        self.tokenizer = load(AutoTokenizer, folder)
        self.labels = self.model.config.id2label
        if watched not in self.labels.values():
            raise InputError(
                f"--negative {watched}: the model knows only {', '.join(self.labels.values())}"
            )

    @torch.no_grad()
    def __call__(self, text: str) -> tuple[str, float]:
        tokens = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        probabilities = self.model(**tokens).logits[0].softmax(-1)
        best = int(probabilities.argmax())
        return self.labels[best], probabilities[best].item()


def report(lines: Iterable[bytes], classify: Classifier, options: argparse.Namespace) -> Iterator:
    """The lines to print, as texts come; complaints about input go to standard error."""
    window, alarm = Window(options.window), Alarm(options.surge)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            when, text = parse(line)
        except BadLine as error:
            print(f"monitor: line {number}: {error}", file=sys.stderr)
            continue
        label, probability = classify(text)
        window.add(when, label == options.negative)
        stamp = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="seconds")
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        share = f"{window.share:4.0%} of {len(window.texts)}"
        yield f"{stamp}  {label} {probability:.2f}  {options.negative} {share}  {shown}"
        change = alarm.update(window)
        if change is not None:
            yield f"{stamp}  {change}"


def run(options: argparse.Namespace) -> int:
    classify = Classifier(trained_model(options), options.negative)
    if options.monitored == "-":
        source: Any = contextlib.nullcontext(sys.stdin.buffer)
    else:
        try:
            source = open(options.monitored, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"--monitor {options.monitored}: {error.strerror}") from error
    with source as lines:
        for line in report(lines, classify, options):
            print(line, flush=True)
    return 0
