"""Trains the two runs in alternating blocks of steps, each of which goes on from a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from . import sharding
from .callbacks import Clock, EndBlock, converged, step_losses
from .setup import Setup, require_finite
from .tasks import InputError
from .tuning import AllocateRanks, restore


class Blocks:
    """The two runs of one setup; files are written by the first of its processes.

    Args:
        setup: in whose OUT/checkpoints the runs leave off and are taken up again.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.last_step = setup.steps  # less once the loss has converged
        if setup.processes.is_main_process:
            self._prepare_checkpoints(setup.options.resume)
        setup.processes.wait_for_everyone()

    def _prepare_checkpoints(self, resume: bool) -> None:
        """An empty folder, or with --resume one that the very same comparison left behind."""
        folder = self.setup.checkpoints
        settings_file = folder / "settings.json"
        settings = json.dumps(self.setup.settings(), indent=2)
        if resume and settings_file.is_file() and settings_file.read_text() != settings:
            raise InputError(f"--resume: the options are not those in {settings_file}")
        try:
            if folder.exists() and not resume:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            settings_file.write_text(settings)
        except OSError as error:
            raise InputError(
                f"--out {self.setup.out} cannot be written: {error.strerror}"
            ) from error

    def train_both(self) -> None:
        """Train both to the end."""
        # Blocks in the order A B B A: a machine that slows down meanwhile slows both alike. Who
        # takes a stretch of steps first decides whether the loss has converged on it.
        first, second = self.setup.contenders
        half = math.ceil(self.setup.steps / 2)
        self.train(first, half, leads=True)
        self.train(second, half, leads=False)
        self.train(second, self.setup.steps, leads=True)
        self.train(first, self.setup.steps, leads=False)

    def train(self, role: str, stop: int, leads: bool) -> None:
        """Train up to step `stop`, from where the last checkpoint left off.

        Args:
            leads: stop earlier, both this run and the other, if the loss has converged.
        """
        setup = self.setup
        stop = min(stop, self.last_step)
        window = setup.options.early_stop if leads else None
        checkpoint, state = self._last_checkpoint(role)
        if state.global_step < stop and not converged(step_losses(state), window):
            contender = setup.contenders[role]
            model = setup.copy_for(contender)
            callbacks = [Clock(), EndBlock(stop, window)]
            if setup.options.tuning == "adalora":
                # After the clock: its arithmetic is not the optimizer's.
                callbacks.append(AllocateRanks(model, checkpoint))
            way = setup.options.shard
            make = functools.partial(
                setup.trainer,
                model,
                contender.name,
                setup.arguments(
                    setup.checkpoints / role,
                    contender,
                    report_to=setup.options.report_to,
                    **sharding.arguments(way),
                ),
                optimizer_cls_and_kwargs=setup.optimizer(contender, model),
                callbacks=callbacks,
            )
            with self._reporting(role), sharding.sharing(way, make) as trainer:
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            setup.processes.wait_for_everyone()
            state = trainer.state
        if converged(step_losses(state), window):
            self.last_step = state.global_step

    def _last_checkpoint(self, role: str) -> tuple[Path | None, TrainerState]:
        folder = self.setup.checkpoints / role
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            return None, TrainerState()
        return Path(last), TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))

    @contextlib.contextmanager
    def _reporting(self, role: str) -> Iterator[None]:
        """Both blocks of a run are one run of wandb; Trainer would begin one for all four."""
        options = self.setup.options
        if options.report_to != "wandb" or not self.setup.processes.is_main_process:
            yield
            return
        import wandb

        name = f"{options.task}-{role}"
        with wandb.init(name=name, id=f"{name}-{self.setup.started:x}", resume="allow"):
            yield

    def finished(self, role: str) -> tuple[nn.Module, list[dict[str, float]]]:
        """The trained model, and the log entry of every step."""
        checkpoint, state = self._last_checkpoint(role)
        history = [entry for entry in state.log_history if "loss" in entry]
        for step, entry in enumerate(history, start=1):
            require_finite(entry["loss"], f"{self.setup.contenders[role].name}, step {step}")
        model = self.setup.copy_for(self.setup.contenders[role])
        restore(model, checkpoint)
        return model, history
