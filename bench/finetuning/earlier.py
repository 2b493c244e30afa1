"""An earlier run that --continue-from names: its model to start from, its data to remember."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

from .tasks import InputError, Task, find


def continued(options: argparse.Namespace) -> tuple[Task, argparse.Namespace]:
    """The task of an earlier run on its own data, and options that start from its model."""
    folder = options.continue_from
    try:
        earlier = json.loads((folder / "report.json").read_text())["options"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--continue-from {folder}: no report.json of a finished run") from error
    if earlier["task"] != options.task or not find(options.task).continuable:
        raise InputError(
            f"--continue-from {folder}: a run of {earlier['task']}, which {options.task} cannot "
            "start from"
        )
    if not (folder / "model").is_dir():
        raise InputError(
            f"--continue-from {folder}: --tuning {earlier['tuning']} left no model to start from"
        )
    here = {"model": str(folder / "model")}
    here |= {name: getattr(options, name) for name in ("continue_from", "cache", "out")}
    task = find(options.task)(argparse.Namespace(**(earlier | here)))
    return task, argparse.Namespace(**(vars(options) | here))


def with_replay(new: Sequence[Any], old: Sequence[Any], share: float) -> list[Any]:
    """`new`, and a random choice of `old` that is `share` times as long, as far as it goes."""
    count = min(len(old), round(share * len(new)))
    return [*new, *random.Random(0).sample(list(old), count)]
