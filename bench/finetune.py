"""Fine-tune one pretrained model twice, each time with another optimizer, and compare.

Both runs start from the same weights and go through the same Hugging Face `Trainer` with the same
seed: same batches in the same order, same dropout. What differs is the optimizer. The default,
`topics`, trains MiniLM-L6 (22.7 M parameters) on BBC News: 70 steps of 16 texts for each
optimizer, 2 to 4 minutes on two cores.

    python bench/finetune.py
    python bench/finetune.py --model FOLDER_OR_NAME --dataset texts.csv --steps 200
    python bench/finetune.py --optimizer fastopt.SGD:momentum=0.9 --lr 0.05

OUT receives report.json, losses.png and checkpoints/, from which --resume continues.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# cuBLAS reads this when CUDA starts; without it matrix products differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from tasks import TASKS, InputError, Task, TaskError, find
from tasks.fetch import default_cache


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


class StopAfter(TrainerCallback):
    """Ends a block of steps with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


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
    """The two runs of one task: trained in alternating blocks, judged, reported."""

    def __init__(self, options: argparse.Namespace) -> None:
        # Deterministic kernels where there are any; filling fresh memory would cost time only.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

        self.contenders = contenders(options.optimizer, options.against)
        self.task: Task = find(options.task)(options.model, options.dataset, options.cache)
        self.task_name = options.task
        self.out: Path = options.out
        self.checkpoints = self.out / "checkpoints"
        self.seed: int = options.seed
        self.steps: int = options.steps or self.task.steps
        self.batch_size: int = options.batch_size or self.task.batch_size
        self.lr: float = self.task.lr if options.lr is None else options.lr
        self.weight_decay: float = options.weight_decay
        for contender in self.contenders.values():
            try:
                contender.cls([torch.nn.Parameter(torch.zeros(1))], lr=self.lr, **contender.kwargs)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{contender.name} cannot be made: {error}") from error
        set_seed(self.seed)  # of the new head's weights
        self.start = self.task.load_model()
        self._prepare_checkpoints(options.resume)

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
        return {
            "task": self.task_name,
            "model": self.task.model,
            "dataset": self.task.dataset,
            "examples": {"train": len(self.task.train), "held_out": len(self.task.held_out)},
            "steps": self.steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "optimizers": {role: contender.name for role, contender in self.contenders.items()},
        }

    def run(self) -> dict[str, Any]:
        """Train both, and return the report."""
        start = self._evaluate(self.start)
        # Blocks in the order A B B A: a machine that slows down meanwhile slows both alike.
        first, second = self.contenders
        half = math.ceil(self.steps / 2)
        blocks = [(first, half), (second, half), (second, self.steps), (first, self.steps)]
        for role, stop in blocks:
            self.train(role, stop)
        finished = [self.finished(role) for role in self.contenders]
        runs = [
            {
                "optimizer": contender.name,
                "losses": [entry["loss"] for entry in history],
                "metrics": {"start": start, "end": self._evaluate(model)},
                "train_step_ms": spread([entry["train_step_ms"] for entry in history]),
                "optimizer_step_ms": spread([entry["optimizer_step_ms"] for entry in history]),
            }
            for contender, (model, history) in zip(self.contenders.values(), finished, strict=True)
        ]
        models = [model for model, _ in finished]
        return {
            **self.settings(),
            "parameters": {
                "total": sum(p.numel() for p in self.start.parameters()),
                "tensors": sum(1 for _ in self.start.parameters()),
            },
            "device": device_name(self.start.device),
            "versions": versions(),
            "runs": runs,
            "parity": {
                "max_loss_diff": max(map(abs, loss_differences(runs))),
                "max_param_diff": max_param_diff(*models),
                # How far training moved any parameter: the scale of the difference above.
                "max_param_change": max_param_diff(self.start, models[0]),
            },
        }

    def _trainer(self, model: PreTrainedModel, title: str, folder: Path, **kwargs: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=4 * self.batch_size,
            learning_rate=self.lr,
            weight_decay=self.weight_decay,
            seed=self.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",  # StopAfter says when
            save_total_limit=1,
            report_to="none",
            disable_tqdm=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=self.task.collate,
            train_dataset=self.task.train,
            processing_class=self.task.processor,
            **kwargs,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(title))
        return trainer

    def _last_checkpoint(self, role: str) -> tuple[Path | None, TrainerState]:
        folder = self.checkpoints / role
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            return None, TrainerState()
        return Path(last), TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))

    def train(self, role: str, stop: int) -> None:
        """Train up to step `stop`, from where the last checkpoint left off."""
        checkpoint, state = self._last_checkpoint(role)
        if state.global_step >= stop:
            return
        contender = self.contenders[role]
        trainer = self._trainer(
            copy.deepcopy(self.start),
            contender.name,
            self.checkpoints / role,
            optimizer_cls_and_kwargs=(contender.cls, {"lr": self.lr, **contender.kwargs}),
            callbacks=[Clock(), StopAfter(stop)],
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    def finished(self, role: str) -> tuple[PreTrainedModel, list[dict[str, float]]]:
        """The trained model, and the log entry of every step."""
        checkpoint, state = self._last_checkpoint(role)
        history = [entry for entry in state.log_history if "loss" in entry]
        for step, entry in enumerate(history, start=1):
            require_finite(entry["loss"], f"{self.contenders[role].name}, step {step}")
        return self.task.load_model(checkpoint), history

    def _evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        output = self._trainer(model, "held-out", self.checkpoints).predict(self.task.held_out)
        loss = output.metrics["test_loss"]
        require_finite(loss, "held-out")
        return {"loss": loss} | self.task.metrics(output.predictions, output.label_ids)


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
def max_param_diff(one: PreTrainedModel, other: PreTrainedModel) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a.cpu().double() - b.cpu().double()).abs().max()).item() for a, b in pairs)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(device)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("fastopt", "torch", "transformers", "accelerate", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "used from its source folder"
    return found


def table(report: dict[str, Any], task: Task) -> str:
    """The report as one table, a column for each optimizer."""

    def timing(run: dict[str, Any], clock: str) -> str:
        return "{median:.2f} ({p20:.2f} to {p80:.2f})".format_map(run[clock])

    def share(run: dict[str, Any]) -> str:
        return f"{run['optimizer_step_ms']['median'] / run['train_step_ms']['median']:.1%}"

    def column(run: dict[str, Any]) -> list[tuple[str, str]]:
        ends = run["metrics"]["start"], run["metrics"]["end"]
        return [
            ("", run["optimizer"]),
            (
                "training loss, first to last step",
                f"{run['losses'][0]:.4f} to {run['losses'][-1]:.4f}",
            ),
            ("held-out loss, start to end", f"{ends[0]['loss']:.4f} to {ends[1]['loss']:.4f}"),
            *task.rows(ends[1]),
            ("whole step, ms: median (p20 to p80)", timing(run, "train_step_ms")),
            ("optimizer step, ms: median (p20 to p80)", timing(run, "optimizer_step_ms")),
            ("  share of the whole step", share(run)),
        ]

    columns = [column(run) for run in report["runs"]]
    widths = [max(len(text) for _, text in rows) for rows in columns]
    label_width = max(len(label) for label, _ in columns[0])
    lines = [
        "  ".join(
            [f"{cells[0][0]:{label_width}}"]
            + [f"{text:>{width}}" for (_, text), width in zip(cells, widths, strict=True)]
        )
        for cells in zip(*columns, strict=True)
    ]
    parity, examples = report["parity"], report["examples"]
    first, second = (run["optimizer_step_ms"]["median"] for run in report["runs"])
    size = report["parameters"]
    head = [
        f"{report['task']}: {report['model']}, {size['total'] / 1e6:.1f} M parameters in "
        f"{size['tensors']} tensors, on {report['dataset']}",
        f"{examples['train']} examples to train on, {examples['held_out']} held out; "
        f"{report['steps']} steps of {report['batch_size']}, lr {report['lr']:g}, "
        f"seed {report['seed']}; {report['device']}",
    ]
    foot = [
        f"optimizer step, first column over second: {first / second:.2f}x",
        f"largest loss difference at any step: {parity['max_loss_diff']:.2e}",
        f"largest parameter difference at the end: {parity['max_param_diff']:.2e} "
        f"(training moved parameters by up to {parity['max_param_change']:.2e})",
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([*head, rule, lines[0], rule, *lines[1:], rule, *foot])


def picture(report: dict[str, Any], path: Path) -> None:
    """Both loss curves, and below them their difference."""
    first, second = report["runs"]
    steps = range(1, len(first["losses"]) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, difference = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    # The wide pale line shows beside the thin dark one where the two coincide.
    curves.plot(steps, first["losses"], color="#9ec5e8", linewidth=6, label=first["optimizer"])
    curves.plot(steps, second["losses"], color="#b03a2e", linewidth=1.2, label=second["optimizer"])
    curves.set(ylabel="training loss", title=f"{report['task']}: {report['model']}")
    curves.set_ylim(bottom=0)
    curves.legend()
    difference.axhline(0, color="#999999", linewidth=0.8)
    difference.plot(steps, loss_differences(report["runs"]), color="#333333", linewidth=1.2)
    largest = report["parity"]["max_loss_diff"]
    difference.set(xlabel="step", ylabel="difference", title=f"at most {largest:.1e} apart")
    difference.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.savefig(path, dpi=120)


def number(kind: type, least: float) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be finite and at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its own errors
    return parse


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = "default: the task's own"
    parser.add_argument("task", nargs="?", choices=TASKS, default=TASKS[0])
    parser.add_argument("--model", help=f"folder or hub name of a Hugging Face model; {own}")
    parser.add_argument(
        "--dataset",
        help=f"CSV, TSV, JSON or JSONL file, or hub name, with columns text and label; {own}",
    )
    parser.add_argument("--optimizer", default="fastopt.AdamW", help="CLASS[:KEY=VALUE,...]")
    parser.add_argument(
        "--against",
        help="CLASS[:KEY=VALUE,...]; default: torch.optim's class of the same name, fused=True, "
        "as Trainer uses it",
    )
    parser.add_argument("--steps", type=number(int, 1), help=own)
    parser.add_argument("--batch-size", type=number(int, 1), help=own)
    parser.add_argument("--lr", type=number(float, 0), help=own)
    parser.add_argument("--weight-decay", type=number(float, 0), default=0.01, help="%(default)s")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="of dropout, data order and new head"
    )
    parser.add_argument("--out", type=Path, help="folder to write to; default: runs/TASK")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="of models and data; %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="continue from OUT's checkpoints")
    options = parser.parse_args(argv)
    options.out = options.out or Path("runs", options.task)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    disable_progress_bar()  # of single files read and written; those of the training stay
    try:
        comparison = Comparison(options)
        report = comparison.run()
    except TaskError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    picture(report, options.out / "losses.png")
    print(table(report, comparison.task))
    print(f"written: {options.out / 'report.json'}, {options.out / 'losses.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
