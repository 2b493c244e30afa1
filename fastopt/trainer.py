"""For transformers' Trainer, where the step clips: see `GradNormCallback`."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback


class GradNormCallback(TrainerCallback):
    """Logs the norm that the optimizer's own step has clipped by, as Trainer does its own.

    With ``TrainingArguments(max_grad_norm=0)`` Trainer does not clip, but still reads all gradients
    for the norm it logs; this tells it not to::

        trainer.add_callback(GradNormCallback(trainer))

    Args:
        trainer: whose optimizer is one of ours with ``max_grad_norm=``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # None where there is nothing for Trainer to log.
        vars(trainer)["_get_grad_norm"] = lambda model, grad_norm=None: grad_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Come before the callbacks that print logs or write them down."""
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add ``grad_norm`` to the logs of a step."""
        optimizer: Any = self._trainer.optimizer
        norm = getattr(optimizer, "optimizer", optimizer).grad_norm  # Accelerate wraps it
        if logs is not None and "loss" in logs and norm is not None:
            for log in (logs, state.log_history[-1]):
                log.setdefault("grad_norm", norm.item())
