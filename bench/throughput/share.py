"""What share of a fine-tuning step is the optimizer, and what does ours do to the whole?

Of each job, such as MiniLM on BBC News tuned fully, by its head alone, by LoRA (r=8 on every linear
layer) or by bottleneck adapters, every contender trains a model of its own: they start from the
same weights and take the same batches in turn. A step is forward, backward, clipping to norm 1
(Trainer's default) and the optimizer, which may clip by itself.

    cd bench && python -m throughput.share --csv results/share-cpu.csv
    cd bench && python -m throughput.share --device cuda --random --job "dialogue full"

Columns of the CSV: whole, a step until the device has finished it, with p20 and p80; host, clipping
and optimizer until they have returned; clip and optimizer, on a GPU its own time for them, with no
waiting for the host; peak_mb, parameters, states and the most that a step needs beside them; loss,
of the last step; loss_diff, the largest to the job's first contender at any step; skipped, the
reason where a contender could not run. On a GPU every other step is timed as a whole, without a
wait in between, and the others in parts.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import machine
from finetuning.options import parse_options
from finetuning.tasks import TaskError, find
from finetuning.tasks.fetch import default_cache
from finetuning.tuning import to_bfloat16, tuned

from .clock import CYCLES_PER_SECOND
from .measure import Row, reason, refuse_fallbacks, time_limit
from .memory import state_bytes
from .rivals import CONTENDERS, FUSED, INSIDE, OURS

COLUMNS = [
    *("tuning", "contender", "device", "tensors", "elements", "state_bytes", "steps"),
    *("whole_ms", "whole_p20_ms", "whole_p80_ms", "clip_ms", "optimizer_ms", "optimizer_share"),
    *("machine", "torch", "commit"),
    *("model", "dtype", "host_ms", "tokens_per_s", "peak_mb", "loss", "loss_diff", "skipped"),
]
MAX_NORM = 1.0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What is trained.

    Args:
        task: of bench/finetune.py.
        tuning: how much of its model.
        dtype: of the parameters.
    """

    task: str
    tuning: str
    dtype: torch.dtype = torch.float32


JOBS = {
    **{f"topics {way}": Job("topics", way) for way in ("full", "head", "lora", "adapter")},
    "dialogue full": Job("dialogue", "full", torch.bfloat16),
}
ON_CPU = [name for name in JOBS if name.startswith("topics")]


@dataclass(frozen=True)
class Source:
    """Where a task's model and batches come from.

    Args:
        model: its name.
        load: in float32.
        batches: so many.
    """

    model: str
    load: Callable[[], nn.Module]
    batches: Callable[[int], list[Batch]]


def published(task: str, cache: Path) -> Source:
    """The task's own weights and data."""
    found = find(task)(parse_options([task, "--cache", str(cache)]))
    order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0)).tolist()

    def batches(count: int) -> list[Batch]:
        size = found.batch_size
        parts = [order[i * size : (i + 1) * size] for i in range(count)]
        return [found.collate([found.train[j] for j in part]) for part in parts]

    return Source(found.model, found.load_model, batches)


def random_weights(task: str, tiny: bool) -> Source:
    """A model of the same shapes and batches of tokens, both random: nothing is fetched. What is
    learned means nothing, but a step's time does not depend on it.

    Args:
        tiny: one layer, few words and short texts, of which no figure means anything.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BertConfig,
        LlamaConfig,
    )

    words = 256 if tiny else None
    if task == "topics":
        name, rows, length, classes = "MiniLM-L6", 16, 64, 5
        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=1 if tiny else 6,
            num_attention_heads=12,
            intermediate_size=1536,
            num_labels=classes,
            vocab_size=words or 30522,
        )
        build = AutoModelForSequenceClassification.from_config
    else:
        name, rows, length, classes = "SmolLM2-135M", 8, 512, 0
        config = LlamaConfig(
            hidden_size=576,
            num_hidden_layers=1 if tiny else 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=words or 49152,
            tie_word_embeddings=True,
        )
        build = AutoModelForCausalLM.from_config
    if tiny:
        rows, length = 2, 8

    def load() -> nn.Module:
        torch.manual_seed(0)
        return build(config, dtype=torch.float32)

    def batches(count: int) -> list[Batch]:
        made = torch.Generator().manual_seed(0)
        found = []
        for _ in range(count):
            tokens = torch.randint(config.vocab_size, (rows, length), generator=made)
            labels = torch.randint(classes, (rows,), generator=made) if classes else tokens
            mask = torch.ones_like(tokens)
            found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
        return found

    return Source(f"{name}'s shapes, random", load, batches)


class Trained:
    """A model, its optimizer, and the seconds of each phase of its steps."""

    def __init__(self, model: nn.Module, contender: str, device: str) -> None:
        self.model = model.to(device).train()
        self.device = device
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        rival = contender.removesuffix(INSIDE)
        self.clips_inside = rival != contender
        inside = {"max_grad_norm": MAX_NORM} if self.clips_inside else {}
        self.optimizer = CONTENDERS[rival].make(self.params, "AdamW", lr=1e-4, **inside)
        self.phases: dict[str, list[float]] = {
            phase: [] for phase in ("whole", "host", "clip", "optimizer")
        }
        self.losses: list[Tensor] = []
        self.last: Batch = {}

    def step(self, batch: Batch) -> None:
        self.last = batch
        in_parts = len(self.losses) % 2 == 1
        machine.synchronize(self.device)
        start = time.perf_counter()
        self._backward(batch)
        if self.device == "cuda" and in_parts:
            self._note(zip(("clip", "optimizer"), self._device_seconds(), strict=True))
        else:
            passed = time.perf_counter()
            self._clip()
            clipped = time.perf_counter()
            self.optimizer.step()
            end = time.perf_counter()
            self._note([("host", end - passed)])
            if self.device == "cpu":
                self._note([("clip", clipped - passed), ("optimizer", end - clipped)])
        self.optimizer.zero_grad()
        machine.synchronize(self.device)
        if self.device == "cpu" or not in_parts:
            self._note([("whole", time.perf_counter() - start)])

    def _note(self, phases: Any) -> None:
        for phase, seconds in phases:
            self.phases[phase].append(seconds)

    def _backward(self, batch: Batch) -> None:
        loss = self.model(**batch).loss
        loss.backward()
        self.losses.append(loss.detach().float())

    def _clip(self) -> None:
        if not self.clips_inside:
            clip_grad_norm_(self.params, MAX_NORM)

    def _device_seconds(self) -> tuple[float, float]:
        """Of clipping and optimizer: the device sleeps while they are enqueued."""
        machine.synchronize(self.device)
        begin, clipped, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(int(1.5 * self.phases["host"][-1] * CYCLES_PER_SECOND))
        begin.record()
        self._clip()
        clipped.record()
        self.optimizer.step()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(clipped), 1e-3 * clipped.elapsed_time(end)

    def peak_bytes(self) -> int:
        """Of a further step: what stays, and the most that it needs beside that."""
        tensors = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        stay = sum(tensor.nbytes for tensor in tensors.values()) + state_bytes([self.optimizer])
        return stay + machine.extra_bytes(lambda: self.step(self.last), self.device)

    def figures(self, warm_up: int, first: list[float]) -> Row:
        """
        Args:
            first: losses of the job's first contender, empty where this is the first.
        """
        # On a GPU each phase is of every other step.
        passed = warm_up if self.device == "cpu" else -(-warm_up // 2)
        kept = {phase: seconds[passed:] for phase, seconds in self.phases.items()}
        medians = {phase: statistics.median(seconds) for phase, seconds in kept.items()}
        p20, *_, p80 = statistics.quantiles(kept["whole"], n=5, method="inclusive")
        losses = [float(loss) for loss in self.losses]
        differences = [abs(a - b) for a, b in zip(losses, first, strict=True)] if first else [0.0]
        return {
            "tensors": str(len(self.params)),
            "elements": str(sum(p.numel() for p in self.params)),
            "state_bytes": str(state_bytes([self.optimizer])),
            "steps": str(len(kept["whole"])),
            "whole_p20_ms": f"{p20 * 1e3:.2f}",
            "whole_p80_ms": f"{p80 * 1e3:.2f}",
            **{f"{phase}_ms": f"{seconds * 1e3:.3f}" for phase, seconds in medians.items()},
            "optimizer_share": f"{medians['optimizer'] / medians['whole']:.4f}",
            "tokens_per_s": f"{self.last['input_ids'].numel() / medians['whole']:.0f}",
            "loss": f"{losses[-1]:.6f}",
            "loss_diff": f"{max(differences):.1e}",
            "peak_mb": f"{self.peak_bytes() / 1e6:.1f}",
        }


def train_in_turn(
    job: Job, source: Source, contenders: list[str], args: argparse.Namespace
) -> list[Row]:
    """The figures of each contender after the same batches."""
    total = args.warm_up + args.steps
    runs: dict[str, Trained] = {}
    skipped: dict[str, str] = {}
    batches = [
        {name: tensor.to(args.device) for name, tensor in batch.items()}
        for batch in source.batches(total)
    ]

    def without_failing(name: str, call: Callable[[], Any]) -> Any:
        try:
            with time_limit(args.patience):
                return call()
        except Exception as error:  # a rival's own: whatever it is, the others go on
            skipped[name] = reason(error)
            runs.pop(name, None)
            return None

    def begin(name: str) -> None:
        model = tuned(source.load(), job.tuning, total, None)
        model = to_bfloat16(model) if job.dtype == torch.bfloat16 else model
        runs[name] = Trained(model, name, args.device)

    for name in contenders:
        without_failing(name, lambda: begin(name))  # noqa: B023 - called at once
    for batch in tqdm(batches, unit="step"):
        for name, trained in list(runs.items()):
            torch.manual_seed(len(trained.losses))  # the same dropout for all
            without_failing(name, lambda: trained.step(batch))  # noqa: B023
    rows: list[Row] = []
    first: list[float] = []
    for name in contenders:
        figures = None
        if name in runs:
            figures = without_failing(name, lambda: runs[name].figures(args.warm_up, first))  # noqa: B023
            if figures and not first:
                first = [float(loss) for loss in runs[name].losses[:total]]
        rows.append({"contender": name, **(figures or {"skipped": skipped[name]})})
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*CONTENDERS, *(f"{name}{INSIDE}" for name in CONTENDERS if name.startswith(OURS))]
    for flag, choices, default in (
        ("--job", list(JOBS), ON_CPU),
        ("--contender", known, [FUSED, OURS]),
    ):
        text = f"default: {', '.join(default)}"
        parser.add_argument(
            flag, nargs="+", choices=choices, default=default, metavar="NAME", help=text
        )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="timed, of each; %(default)s")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them; %(default)s")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of model and data")
    parser.add_argument(
        "--random", action="store_true", help="models of the same shapes, and tokens, made here"
    )
    parser.add_argument("--tiny", action="store_true", help="nearly nothing of them, for a dry run")
    parser.add_argument(
        "--patience", type=float, default=100, help="seconds for a step at most; %(default)s"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    refuse_fallbacks()
    facts = {"device": args.device, **machine.facts(args.device)}
    rows: list[Row] = []
    for name in args.job:
        job = JOBS[name]
        try:
            own = (
                random_weights(job.task, args.tiny)
                if args.random
                else published(job.task, args.cache)
            )
            found = train_in_turn(job, own, args.contender, args)
        except TaskError as error:
            print(f"share: {error}", file=sys.stderr)
            return error.exit_code
        described = {"tuning": job.tuning, "model": own.model, "dtype": str(job.dtype)[6:]}
        rows += [dict.fromkeys(COLUMNS, "") | described | row | facts for row in found]
        for row in rows[-len(found) :]:
            print(summary(row))
        gc.collect()
        if args.csv:  # after each: what ends the program loses none of them
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    failed = [row for row in rows if row["skipped"] and row["contender"] in (FUSED, OURS)]
    return 1 if failed else 0


def summary(row: Row) -> str:
    named = "{model}, {tuning}, {dtype}, {contender}: ".format_map(row)
    if row["skipped"]:
        return f"{named}skipped: {row['skipped']}"
    return named + (
        "step {whole_ms} ms ({whole_p20_ms} to {whole_p80_ms}), {tokens_per_s} tokens/s, "
        "optimizer {optimizer_ms} ms and clipping {clip_ms} ms, of the host {host_ms} ms; "
        "peak {peak_mb} MB; loss {loss}, at most {loss_diff} from the first's".format_map(row)
    )


if __name__ == "__main__":
    sys.exit(main())
