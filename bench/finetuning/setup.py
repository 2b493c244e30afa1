"""What both runs of a comparison have in common, and what Trainer is told of it."""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_parameter_names

from . import sharding
from .callbacks import Progress
from .contenders import WHOLLY_BF16, Contender, contenders
from .earlier import continued, with_replay
from .tasks import InputError, Task, TaskError, find
from .tuning import head_modules, tuned


class Setup:
    """Task, rates, and the model that both runs start from.

    Under torchrun each process has one of these, and Trainer makes them work as one.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        # Deterministic kernels where there are any; filling fresh memory would cost time only.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

        self.options = options
        self.started = time.time_ns()
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        sharding.require_processes(options.shard, self.processes.num_processes)
        self.contenders = contenders(options)
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
        self.batch_size: int = options.batch_size or self.task.batch_size
        self.lr: float = self.task.lr if options.lr is None else options.lr
        self.head_lr: float | None = (
            self.task.head_lr if options.head_lr is None else options.head_lr
        )
        for contender in self.contenders.values():
            contender.require_valid(self.lr)
            self.arguments(self.out, contender)  # raises what this device cannot do
        set_seed(options.seed)  # of new weights: the head's, an adapter's
        model = self.task.load_model()
        self.head = set(head_modules(model))
        self.model = tuned(model, options.tuning, self.steps, self.task.prompt_type)

    def settings(self) -> dict[str, Any]:
        """What a resumed comparison must have in common with the one that left off."""
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
            "shard": options.shard,
            "lr": self.lr,
            "head_lr": self.head_lr,
            "weight_decay": options.weight_decay,
            "seed": options.seed,
            "early_stop": options.early_stop,
            "optimizers": {
                role: f"{contender.name} in {contender.precision}"
                for role, contender in self.contenders.items()
            },
        }

    def copy_for(self, contender: Contender) -> nn.Module:
        """The model that training starts from, kept as this one trains it."""
        return contender.keeping(copy.deepcopy(self.model))

    def arguments(self, folder: Path, contender: Contender, **kwargs: Any) -> TrainingArguments:
        options = self.options
        try:
            return TrainingArguments(
                output_dir=str(folder),
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=4 * self.batch_size,
                gradient_accumulation_steps=options.gradient_accumulation_steps,
                max_grad_norm=options.max_grad_norm,
                bf16=contender.precision in ("bf16", WHOLLY_BF16),
                fp16=contender.precision == "fp16",
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
            raise InputError(f"--precision {contender.precision}: {error}") from error

    def trainer(
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

    def optimizer(self, contender: Contender, model: nn.Module) -> tuple[type, dict[str, Any]]:
        """What Trainer makes the optimizer from; with a rate of its own for the head, if wanted."""
        kwargs: dict[str, Any] = {"lr": self.lr, **contender.kwargs}
        if self.head_lr is not None:
            kwargs["params"] = parameter_groups(
                model, self.head, self.lr, self.head_lr, self.options.weight_decay
            )
        return contender.cls, kwargs

    def evaluate(self, model: nn.Module, task: Task, contender: Contender) -> dict[str, Any]:
        """The figures of the contender's `model` on the held-out examples of `task`."""
        arguments = self.arguments(self.checkpoints, contender, report_to="none")
        figures = task.evaluate(self.trainer(model, "held-out", arguments))
        require_finite(figures["loss"], "held-out")
        return figures


def parameter_groups(
    model: nn.Module, head: set[str], lr: float, head_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    # As in Trainer: biases and norms do not decay.
    decaying = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "norm"]))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = not head.isdisjoint(name.split(".")), name in decaying
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": head_lr if in_head else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (in_head, decays), parameters in groups.items()
    ]


def require_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise TaskError(f"{where}: the loss is {loss}; training diverged, lower --lr")
