"""What command-line options share."""

from __future__ import annotations

import argparse
import math
from typing import Any


def number(kind: type, least: float) -> Any:
    """An argparse type: a finite number of this kind, `least` or more."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be finite and at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its own errors
    return parse


def add_few_shot(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.add_argument(
        "--few-shot", type=number(int, 1), metavar="K", help=f"train on K {examples} only"
    )
