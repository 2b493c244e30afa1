"""Where programs find the model that an earlier run trained."""

from __future__ import annotations

import argparse

from . import InputError


def trained_model(options: argparse.Namespace) -> str:
    """--model, or the one that training left in OUT."""
    if options.model is not None:
        return options.model
    folder = options.out / "model"
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not there: train first (--tuning full, head, lora or adalora leave a "
            "model), or name one with --model"
        )
    return str(folder)
