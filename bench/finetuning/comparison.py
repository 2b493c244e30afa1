"""Two optimizers on one task: trained, judged, reported."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import machine

from .blocks import Blocks
from .contenders import Contender
from .setup import Setup
from .tuning import merged


def compare(setup: Setup) -> dict[str, Any]:
    """Train both, keep the second's model in OUT/model, and return the report."""
    blocks = Blocks(setup)
    start = {  # of both contenders, unless they train in one precision
        contender.precision: judged(setup, setup.copy_for(contender), contender)
        for contender in {each.precision: each for each in setup.contenders.values()}.values()
    }
    blocks.train_both()
    models, runs = [], []
    for role, contender in setup.contenders.items():
        model, history = blocks.finished(role)
        before, after = start[contender.precision], judged(setup, model, contender)
        models.append(model)
        runs.append(
            {
                "optimizer": contender.name,
                "precision": contender.precision,
                "losses": [entry["loss"] for entry in history],
                **{data: {"start": before[data], "end": after[data]} for data in before},
                "train_step_ms": spread([entry["train_step_ms"] for entry in history]),
                "optimizer_step_ms": spread([entry["optimizer_step_ms"] for entry in history]),
                "kept_bytes": history[-1]["kept_bytes"],
                "moved_bytes": history[-1]["moved_bytes"],
            }
        )
    report = report_of(setup, runs, models)
    save_model(setup, models[1])
    return report


def report_of(setup: Setup, runs: list[dict[str, Any]], models: list[nn.Module]) -> dict[str, Any]:
    return {
        **setup.settings(),
        "parameters": sizes(setup.model),
        "device": machine.device_name(next(setup.model.parameters()).device.type),
        "versions": versions(),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(setup.options).items()
        },
        "runs": runs,
        "parity": {
            "max_loss_diff": max(map(abs, loss_differences(runs))),
            "max_param_diff": max_param_diff(*models),
            # How far training moved any parameter: the scale of the difference above.
            "max_param_change": max_param_diff(setup.model, models[0]),
        },
    }


def judged(setup: Setup, model: nn.Module, contender: Contender) -> dict[str, dict[str, Any]]:
    """Held-out figures; where an earlier run is continued, those on its data, too."""
    figures = {"metrics": setup.evaluate(model, setup.task, contender)}
    if setup.earlier is not None:
        figures["earlier_data"] = setup.evaluate(model, setup.earlier, contender)
    return figures


def save_model(setup: Setup, model: nn.Module) -> None:
    """Leave in OUT/model what `from_pretrained` can load."""
    model = merged(model)
    if model is not None and setup.processes.is_main_process:
        folder = setup.out / "model"
        model.save_pretrained(folder)
        if setup.task.processor is not None:
            setup.task.processor.save_pretrained(folder)


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(milliseconds, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def loss_differences(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Second run's loss minus the first's, step by step."""
    return [b - a for a, b in zip(*(run["losses"] for run in runs), strict=True)]


@torch.no_grad()
def max_param_diff(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a.cpu().double() - b.cpu().double()).abs().max()).item() for a, b in pairs)


def sizes(model: nn.Module) -> dict[str, int]:
    params = list(model.parameters())
    trained = [param for param in params if param.requires_grad]
    return {
        "total": sum(param.numel() for param in params),
        "tensors": len(params),
        "trained": sum(param.numel() for param in trained),
        "trained_tensors": len(trained),
    }


def versions() -> dict[str, str]:
    packages = ("fastopt", "transformers", "accelerate", "peft", "numpy")
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {package: machine.version(package) for package in packages}
