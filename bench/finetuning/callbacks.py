"""What Trainer is given: a clock, where a block of steps ends, a progress bar with a name."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerState

from throughput.memory import state_bytes, tensors_in

# The loss has converged once its mean over a window of steps is less than this below the mean
# over the window before.
CONVERGED = 0.01


class Clock(TrainerCallback):
    """Adds to each step's log entry how long the step took, and the optimizer within it.

    Trainer keeps the entries in its checkpoints: a resumed run has those of all its steps.
    """

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.took: dict[str, float] = {}

    def _begin(self, clock: str) -> None:
        self.began[clock] = now()

    def _end(self, clock: str) -> None:
        self.took[clock] = 1e3 * (now() - self.began[clock])

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin("train_step_ms")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._begin("optimizer_step_ms")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._end("optimizer_step_ms")

    def on_step_end(self, args, state, control, **kwargs):
        self._end("train_step_ms")

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            state.log_history[-1] |= self.took


def now() -> float:
    """Seconds, once the device has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class EndBlock(TrainerCallback):
    """Ends a block of steps with a checkpoint: at step `stop`, or once the loss has converged.

    The last step's log entry says, too, what is kept and moved for each parameter.

    Args:
        window: of `converged`, in steps; None to go on until `stop`.
    """

    def __init__(self, stop: int, window: int | None) -> None:
        self.stop = stop
        self.window = window

    def on_log(self, args, state, control, logs, optimizer=None, **kwargs):
        done = state.global_step == self.stop or converged(step_losses(state), self.window)
        if "loss" in logs and done:
            state.log_history[-1] |= bytes_per_parameter(optimizer)
            control.should_save = control.should_training_stop = True


def bytes_per_parameter(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Of the trained parameters with gradients and states: kept, and moved by a step at least."""
    # Of DTensors, what this process has.
    params = list(tensors_in([group["params"] for group in optimizer.param_groups]))
    # A gradient is as large as its parameter, and gone by now; a step only reads it.
    gradients = sum(p.nbytes for p in params)
    kept = 2 * gradients + state_bytes([optimizer])
    count = sum(p.numel() for p in params)
    return {"kept_bytes": kept / count, "moved_bytes": (2 * kept - gradients) / count}


def step_losses(state: TrainerState) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def converged(losses: Sequence[float], window: int | None) -> bool:
    """Whether the last `window` losses are hardly lower than the `window` losses before."""
    if window is None or len(losses) < 2 * window:
        return False
    before, last = losses[-2 * window : -window], losses[-window:]
    return sum(last) > (1 - CONVERGED) * sum(before)


class Progress(ProgressCallback):
    """Trainer's progress bar, with name and loss on it in place of a line for every step."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._name(self.training_bar)

    def on_prediction_step(self, args, state, control, **kwargs):
        super().on_prediction_step(args, state, control, **kwargs)
        self._name(self.prediction_bar)

    def _name(self, bar) -> None:
        if bar is not None:  # only the first of several processes shows one
            bar.set_description(self.title, refresh=False)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
