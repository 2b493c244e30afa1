"""Two optimizers on one task: trained in alternating blocks of steps, judged, reported."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import get_last_checkpoint

from .tasks import InputError, Task, TaskError, find
from .tuning import AllocateRanks, head_modules, merged, restore, tuned

# The loss has converged once its mean over a window of steps is less than this below the mean
# over the window before.
CONVERGED = 0.01


@dataclass(frozen=True)
class Contender:
    """One of the two optimizers under comparison."""

    path: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.path}({arguments})" if arguments else self.path


def contenders(optimizer: str, against: str | None) -> dict[str, Contender]:
    """The optimizers of --against and --optimizer, in this order."""
    ours = parse_optimizer(optimizer)
    if against is not None:
        return {"against": parse_optimizer(against), "optimizer": ours}
    cls = getattr(torch.optim, ours.cls.__name__, None)
    if cls is None:
        raise InputError(f"torch.optim has no {ours.cls.__name__}: name its rival with --against")
    # fused=True is Trainer's own choice since torch 2.8. backend= is fastopt's keyword.
    kwargs = {key: value for key, value in ours.kwargs.items() if key != "backend"}
    stock = Contender(f"torch.optim.{cls.__name__}", cls, kwargs | {"fused": True})
    return {"against": stock, "optimizer": ours}


def parse_optimizer(spec: str) -> Contender:
    """`package.Class` or `package.Class:key=value,key=value`, values as in Python."""
    path, _, arguments = spec.partition(":")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"optimizer {path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"{path!r} is not a torch.optim.Optimizer")
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("a keyword is missing")
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(f"optimizer arguments {arguments!r} are not KEY=VALUE,...") from error
    for key in kwargs.keys() & {"lr", "weight_decay"}:
        raise InputError(f"{spec}: {key} holds for both optimizers, give --{key.replace('_', '-')}")
    return Contender(path, cls, kwargs)


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

    Args:
        window: of `converged`, in steps; None to go on until `stop`.
    """

    def __init__(self, stop: int, window: int | None) -> None:
        self.stop = stop
        self.window = window

    def on_log(self, args, state, control, logs, **kwargs):
        done = state.global_step == self.stop or converged(step_losses(state), self.window)
        if "loss" in logs and done:
            control.should_save = control.should_training_stop = True


def step_losses(state: TrainerState) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def converged(losses: Sequence[float], window: int | None) -> bool:
    """Whether the last `window` losses are hardly lower than the `window` losses before."""
    if window is None or len(losses) < 2 * window:
        return False
    before, last = losses[-2 * window : -window], losses[-window:]
    return sum(last) > (1 - CONVERGED) * sum(before)


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


class Comparison:
    """The two runs of one task.

    Under torchrun each process has one of these, and Trainer makes them work as one; files are
    written by the first.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        # Deterministic kernels where there are any; filling fresh memory would cost time only.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

        self.options = options
        self.started = time.time_ns()
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self.contenders = contenders(options.optimizer, options.against)
        with self.processes.main_process_first():  # fetches what the others then find
            self.earlier: Task | None = None
            if options.continue_from is not None:
                self.earlier, options = continued(options)
            self.task: Task = find(options.task)(options)
        if self.earlier is not None:
            self.task.train = with_replay(self.task.train, self.earlier.train, options.replay)
        self.out: Path = options.out
        self.checkpoints = self.out / "checkpoints"
        self.steps: int = options.steps or self.task.steps
        self.last_step = self.steps  # less once the loss has converged
        self.batch_size: int = options.batch_size or self.task.batch_size
        self.lr: float = self.task.lr if options.lr is None else options.lr
        self.head_lr: float | None = (
            self.task.head_lr if options.head_lr is None else options.head_lr
        )
        for contender in self.contenders.values():
            try:
                contender.cls([nn.Parameter(torch.zeros(1))], lr=self.lr, **contender.kwargs)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{contender.name} cannot be made: {error}") from error
        set_seed(options.seed)  # of new weights: the head's, an adapter's
        model = self.task.load_model()
        self.head = set(head_modules(model))
        self.start = tuned(model, options.tuning, self.steps, self.task.prompt_type)
        self._arguments(self.out)  # raises what this device cannot do
        # A range test leaves what training has left there as it is.
        if self.processes.is_main_process and not options.find_lr:
            self._prepare_checkpoints(options.resume)
        self.processes.wait_for_everyone()

    def _prepare_checkpoints(self, resume: bool) -> None:
        """An empty folder, or with --resume one that the very same comparison left behind."""
        settings_file = self.checkpoints / "settings.json"
        settings = json.dumps(self.settings(), indent=2)
        if resume and settings_file.is_file() and settings_file.read_text() != settings:
            raise InputError(f"--resume: the options are not those in {settings_file}")
        try:
            if self.checkpoints.exists() and not resume:
                shutil.rmtree(self.checkpoints)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            settings_file.write_text(settings)
        except OSError as error:
            raise InputError(f"--out {self.out} cannot be written: {error.strerror}") from error

    def settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "task": options.task,
            "model": self.task.model,
            "dataset": self.task.dataset,
            "headline": self.task.headline,
            "examples": {"train": len(self.task.train), "held_out": len(self.task.held_out)},
            "held_out_for": "validation" if options.validate else "test",
            "continued_from": options.continue_from and str(options.continue_from),
            "replay": options.replay,
            "tuning": options.tuning,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "max_grad_norm": options.max_grad_norm,
            "processes": self.processes.num_processes,
            "precision": options.precision,
            "lr": self.lr,
            "head_lr": self.head_lr,
            "weight_decay": options.weight_decay,
            "seed": options.seed,
            "early_stop": options.early_stop,
            "optimizers": {role: contender.name for role, contender in self.contenders.items()},
        }

    def run(self) -> dict[str, Any]:
        """Train both, keep the second's model in OUT/model, and return the report."""
        start = self._evaluate(self.start, self.task)
        if self.earlier is not None:
            remembered = self._evaluate(self.start, self.earlier)
        # Blocks in the order A B B A: a machine that slows down meanwhile slows both alike. Who
        # takes a stretch of steps first decides whether the loss has converged on it.
        first, second = self.contenders
        half = math.ceil(self.steps / 2)
        self.train(first, half, leads=True)
        self.train(second, half, leads=False)
        self.train(second, self.steps, leads=True)
        self.train(first, self.steps, leads=False)
        finished = [self.finished(role) for role in self.contenders]
        runs = [
            {
                "optimizer": contender.name,
                "losses": [entry["loss"] for entry in history],
                "metrics": {"start": start, "end": self._evaluate(model, self.task)},
                "train_step_ms": spread([entry["train_step_ms"] for entry in history]),
                "optimizer_step_ms": spread([entry["optimizer_step_ms"] for entry in history]),
            }
            for contender, (model, history) in zip(self.contenders.values(), finished, strict=True)
        ]
        models = [model for model, _ in finished]
        if self.earlier is not None:
            for run, model in zip(runs, models, strict=True):
                still = self._evaluate(model, self.earlier)
                run["earlier_data"] = {"start": remembered, "end": still}
        trained = [parameter for parameter in self.start.parameters() if parameter.requires_grad]
        report = {
            **self.settings(),
            "parameters": {
                "total": sum(p.numel() for p in self.start.parameters()),
                "tensors": sum(1 for _ in self.start.parameters()),
                "trained": sum(p.numel() for p in trained),
                "trained_tensors": len(trained),
            },
            "device": device_name(next(self.start.parameters()).device),
            "versions": versions(),
            "options": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(self.options).items()
            },
            "runs": runs,
            "parity": {
                "max_loss_diff": max(map(abs, loss_differences(runs))),
                "max_param_diff": max_param_diff(*models),
                # How far training moved any parameter: the scale of the difference above.
                "max_param_change": max_param_diff(self.start, models[0]),
            },
        }
        self._save_model(models[1])
        return report

    def _save_model(self, model: nn.Module) -> None:
        """Leave in OUT/model what `from_pretrained` can load."""
        model = merged(model)
        if model is not None and self.processes.is_main_process:
            folder = self.out / "model"
            model.save_pretrained(folder)
            if self.task.processor is not None:
                self.task.processor.save_pretrained(folder)

    def _arguments(self, folder: Path, **kwargs: Any) -> TrainingArguments:
        options = self.options
        try:
            return TrainingArguments(
                output_dir=str(folder),
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=4 * self.batch_size,
                gradient_accumulation_steps=options.gradient_accumulation_steps,
                max_grad_norm=options.max_grad_norm,
                bf16=options.precision == "bf16",
                fp16=options.precision == "fp16",
                learning_rate=self.lr,
                weight_decay=options.weight_decay,
                seed=options.seed,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",  # EndBlock says when
                save_total_limit=1,
                disable_tqdm=False,
                label_names=["labels"],
                remove_unused_columns=False,
                use_cpu=not torch.accelerator.is_available(),  # else it refuses bfloat16 there
                dataloader_pin_memory=torch.accelerator.is_available(),
                **kwargs,
            )
        except (ValueError, ImportError) as error:
            raise InputError(f"--precision {options.precision}: {error}") from error

    def _trainer(
        self, model: nn.Module, title: str, arguments: TrainingArguments, **kwargs: Any
    ) -> Trainer:
        trainer = Trainer(
            model,
            arguments,
            data_collator=self.task.collate,
            train_dataset=self.task.train,
            processing_class=self.task.processor,
            preprocess_logits_for_metrics=self.task.compact,
            **kwargs,
        )
        # Else Trainer adds up the losses of accumulated batches, and of processes, wherever a model
        # takes the number of examples but does not heed it, as BERT does.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(title))
        return trainer

    def _optimizer(self, contender: Contender, model: nn.Module) -> tuple[type, dict[str, Any]]:
        """What Trainer makes the optimizer from; with a rate of its own for the head, if wanted."""
        kwargs: dict[str, Any] = {"lr": self.lr, **contender.kwargs}
        if self.head_lr is not None:
            kwargs["params"] = self._parameter_groups(model)
        return contender.cls, kwargs

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        # As in Trainer: biases and norms do not decay.
        decaying = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "norm"]))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = not self.head.isdisjoint(name.split(".")), name in decaying
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.head_lr if in_head else self.lr,
                "weight_decay": self.options.weight_decay if decays else 0.0,
            }
            for (in_head, decays), parameters in groups.items()
        ]

    def _last_checkpoint(self, role: str) -> tuple[Path | None, TrainerState]:
        folder = self.checkpoints / role
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            return None, TrainerState()
        return Path(last), TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))

    def train(self, role: str, stop: int, leads: bool) -> None:
        """Train up to step `stop`, from where the last checkpoint left off.

        Args:
            leads: stop earlier, both this run and the other, if the loss has converged.
        """
        stop = min(stop, self.last_step)
        window = self.options.early_stop if leads else None
        checkpoint, state = self._last_checkpoint(role)
        if state.global_step < stop and not converged(step_losses(state), window):
            contender = self.contenders[role]
            model = copy.deepcopy(self.start)
            callbacks = [Clock(), EndBlock(stop, window)]
            if self.options.tuning == "adalora":
                # After the clock: its arithmetic is not the optimizer's.
                callbacks.append(AllocateRanks(model, checkpoint))
            arguments = self._arguments(self.checkpoints / role, report_to=self.options.report_to)
            trainer = self._trainer(
                model,
                contender.name,
                arguments,
                optimizer_cls_and_kwargs=self._optimizer(contender, model),
                callbacks=callbacks,
            )
            with self._reporting(role):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            self.processes.wait_for_everyone()
            state = trainer.state
        if converged(step_losses(state), window):
            self.last_step = state.global_step

    @contextlib.contextmanager
    def _reporting(self, role: str) -> Iterator[None]:
        """Both blocks of a run are one run of wandb; Trainer would begin one for all four."""
        if self.options.report_to != "wandb" or not self.processes.is_main_process:
            yield
            return
        import wandb

        name = f"{self.options.task}-{role}"
        with wandb.init(name=name, id=f"{name}-{self.started:x}", resume="allow"):
            yield

    def finished(self, role: str) -> tuple[nn.Module, list[dict[str, float]]]:
        """The trained model, and the log entry of every step."""
        checkpoint, state = self._last_checkpoint(role)
        history = [entry for entry in state.log_history if "loss" in entry]
        for step, entry in enumerate(history, start=1):
            require_finite(entry["loss"], f"{self.contenders[role].name}, step {step}")
        model = copy.deepcopy(self.start)
        restore(model, checkpoint)
        return model, history

    def range_test(self, least: float = 1e-7, most: float = 1.0) -> dict[str, list[float]]:
        """The loss of each step while the learning rate grows from `least` to `most`."""
        rates = np.geomspace(least, most, self.steps).tolist()
        contender = self.contenders["optimizer"]
        arguments = self._arguments(
            self.checkpoints / "range", report_to="none", lr_scheduler_type="constant"
        )
        trainer = self._trainer(
            copy.deepcopy(self.start),
            f"{contender.name}, growing lr",
            arguments,
            optimizer_cls_and_kwargs=(contender.cls, {"lr": least, **contender.kwargs}),
            callbacks=[GrowingRate(rates)],
        )
        trainer.train()
        losses = [loss for loss in step_losses(trainer.state) if math.isfinite(loss)]
        return {"rates": rates[: len(losses)], "losses": losses}

    def _evaluate(self, model: nn.Module, task: Task) -> dict[str, Any]:
        arguments = self._arguments(self.checkpoints, report_to="none")
        figures = task.evaluate(self._trainer(model, "held-out", arguments))
        require_finite(figures["loss"], "held-out")
        return figures


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


def require_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise TaskError(f"{where}: the loss is {loss}; training diverged, lower --lr")


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


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(device)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastopt", "transformers", "accelerate", "peft", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "used from its source folder"
    return found
