"""--find-lr: raise the learning rate step by step, and suggest one by the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import TrainerCallback

from .callbacks import step_losses
from .setup import Setup


class GrowingRate(TrainerCallback):
    """Raises the learning rate a little at each step, and stops when the loss takes off."""

    TAKE_OFF = 3  # times the least loss seen

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = rates

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = self.rates[state.global_step]

    def on_log(self, args, state, control, logs, **kwargs):
        losses = step_losses(state)
        if not losses[-1] < self.TAKE_OFF * min(losses):  # so written, NaN stops it, too
            control.should_training_stop = True


def range_test(setup: Setup, least: float = 1e-7, most: float = 1.0) -> dict[str, list[float]]:
    """The loss of each step while the learning rate grows from `least` to `most`."""
    rates = np.geomspace(least, most, setup.steps).tolist()
    contender = setup.contenders["optimizer"]
    arguments = setup.arguments(
        setup.checkpoints / "range", contender, report_to="none", lr_scheduler_type="constant"
    )
    trainer = setup.trainer(
        setup.copy_for(contender),
        f"{contender.name}, growing lr",
        arguments,
        optimizer_cls_and_kwargs=(contender.cls, {"lr": least, **contender.kwargs}),
        callbacks=[GrowingRate(rates)],
    )
    trainer.train()
    losses = [loss for loss in step_losses(trainer.state) if math.isfinite(loss)]
    return {"rates": rates[: len(losses)], "losses": losses}


def smooth(values: Sequence[float], memory: float = 0.7) -> list[float]:
    """Exponentially weighted means, unbiased from the first."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = memory * mean + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        means.append(mean / weight)
    return means


def suggested(test: dict[str, list[float]]) -> float | None:
    """A tenth of the rate at which the smoothed loss was least, by a rule of thumb of practice.

    None if the loss never fell below that of the first step.
    """
    losses = smooth(test["losses"])
    least = losses.index(min(losses))
    return test["rates"][least] / 10 if least > 0 else None


def picture(test: dict[str, list[float]], path: Path) -> None:
    """The loss over the learning rate, and where the suggestion lies."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(test["rates"], test["losses"], color="#9ec5e8", linewidth=1, label="each step")
    axes.plot(test["rates"], smooth(test["losses"]), color="#b03a2e", label="smoothed")
    rate = suggested(test)
    if rate is not None:
        axes.axvline(rate, color="#333333", linewidth=0.8, label=f"suggested: {rate:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.legend()
    figure.savefig(path, dpi=120)
