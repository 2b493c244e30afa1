"""What share of a fine-tuning step is the optimizer, and what does ours do to the whole?

MiniLM on BBC News as in bench/finetune.py, tuned fully, its head alone, by LoRA (r=8 on every
linear layer) and by bottleneck adapters, by torch's fused AdamW and by ours: eight models, each
with its own optimizer, take the same batch in turn. A step is forward, backward, clipping to norm 1
(Trainer's default) and the optimizer.

    cd bench && python -m throughput.share --csv results/share-cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import machine
from finetuning.options import parse_options
from finetuning.tasks import Task, TaskError, find
from finetuning.tasks.fetch import default_cache
from finetuning.tuning import tuned

from .memory import state_bytes
from .rivals import CONTENDERS, FUSED, OURS

COLUMNS = [
    *("tuning", "contender", "device", "tensors", "elements", "state_bytes", "steps"),
    *("whole_ms", "whole_p20_ms", "whole_p80_ms", "clip_ms", "optimizer_ms", "optimizer_share"),
    *("machine", "torch", "commit"),
]


TUNINGS = ("full", "head", "lora", "adapter")


class Trained:
    """A model, its optimizer, and the seconds of each phase of its steps."""

    def __init__(self, model: torch.nn.Module, contender: str, device: str) -> None:
        self.model = model.to(device).train()
        self.device = device
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = CONTENDERS[contender].make(self.params, "AdamW", lr=1e-4)
        self.phases: dict[str, list[float]] = {"whole": [], "clip": [], "optimizer": []}

    def step(self, batch: dict[str, Any]) -> None:
        start = self._now()
        self.model(**batch).loss.backward()
        passed = self._now()
        clip_grad_norm_(self.params, 1.0)
        clipped = self._now()
        self.optimizer.step()
        end = self._now()
        self.optimizer.zero_grad()
        for phase, seconds in (
            ("whole", end - start),
            ("clip", clipped - passed),
            ("optimizer", end - clipped),
        ):
            self.phases[phase].append(seconds)

    def _now(self) -> float:
        machine.synchronize(self.device)
        return time.perf_counter()

    def figures(self, warm_up: int) -> dict[str, str]:
        kept = {phase: seconds[warm_up:] for phase, seconds in self.phases.items()}
        _, p20, *_, p80, _ = statistics.quantiles(kept["whole"], n=10)
        medians = {phase: statistics.median(seconds) for phase, seconds in kept.items()}
        return {
            "tensors": str(len(self.params)),
            "elements": str(sum(p.numel() for p in self.params)),
            "state_bytes": str(state_bytes([self.optimizer])),
            "steps": str(len(kept["whole"])),
            "whole_p20_ms": f"{p20 * 1e3:.2f}",
            "whole_p80_ms": f"{p80 * 1e3:.2f}",
            **{f"{phase}_ms": f"{seconds * 1e3:.3f}" for phase, seconds in medians.items()},
            "optimizer_share": f"{medians['optimizer'] / medians['whole']:.4f}",
        }


def train_in_turn(
    task: Task, device: str, warm_up: int, steps: int
) -> dict[tuple[str, str], Trained]:
    """The models, by tuning and contender, after the same batches."""
    runs = {
        (tuning, contender): Trained(
            tuned(task.load_model(), tuning, steps, None), contender, device
        )
        for tuning in TUNINGS
        for contender in (FUSED, OURS)
    }
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    for i in tqdm(range(warm_up + steps), unit="step"):
        chosen = order[i * task.batch_size : (i + 1) * task.batch_size]
        batch = task.collate([task.train[j] for j in chosen])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        for trained in runs.values():
            trained.step(batch)
    return runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="timed, of each; %(default)s")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them; %(default)s")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of model and data")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        task = find("topics")(parse_options(["topics", "--cache", str(args.cache)]))
        runs = train_in_turn(task, args.device, args.warm_up, args.steps)
    except TaskError as error:
        print(f"share: {error}", file=sys.stderr)
        return error.exit_code
    facts = {"device": args.device, **machine.facts(args.device)}
    rows = [
        {"tuning": tuning, "contender": contender, **trained.figures(args.warm_up), **facts}
        for (tuning, contender), trained in runs.items()
    ]
    for row in rows:
        print(
            "{tuning}, {tensors} tensors, {contender}: step {whole_ms} ms "
            "({whole_p20_ms} to {whole_p80_ms}), clipping {clip_ms} ms, "
            "optimizer {optimizer_ms} ms, share {optimizer_share}".format_map(row)
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
