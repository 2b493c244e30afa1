"""The page of all runs that bench/finetuning/all_tasks.py keeps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .report import batch

INTRODUCTION = """\
# Fine-tuning, stock optimizer against ours

Made by `make finetune-all` of what each run left in `bench/results/finetune`, on several days and
machines: compare times within a row. In every row both optimizers start from the same weights with
the same seed. Loss and metric are those of `fastopt`'s run on examples that took no part in
choosing rates or steps, the metric beside what the trivial answer scores; the loss difference is
the largest between the two runs at any step. Where it is not zero it begins in the last elements of
a tensor, which torch rounds in another way, and grows as far as the model lets it.

| run | trained | steps | held-out loss | metric | trivial | loss difference | \
optimizer, ms: torch | fastopt | share of the step |
|---|---|---|---|---|---|---|---|---|---|
"""
NARROW_INTRODUCTION = """
## Fewer bytes

Here the two do not take one path, and need not: torch's AdamW trains a model in float32; ours, with
`states="8bit", weights="split"`, one in bfloat16, its parameters, gradients and activations. What
is asked is whether it reaches the same held-out metric, within what float32 itself differs by from
seed to seed. ± is the standard deviation over the seeds; the difference is that of runs with the
same seed, and within the seeds if its mean is no more than the deviation of float32's metric. Bytes
are those of a trained parameter, its gradient and its states: kept, and moved by a step at least.

| run | seeds | metric: float32 | narrow | difference | within the seeds | \
held-out loss: float32 | narrow | bytes kept: float32 | narrow | moved: float32 | narrow |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a run in figures."""
    headline = report["headline"]
    return {
        "task": report["task"],
        "seed": report["seed"],
        "parameters": report["parameters"],
        "steps": f"{len(report['runs'][0]['losses'])} of {batch(report)}",
        "headline": headline,
        "trivial": report["runs"][-1]["metrics"]["end"]["baseline"][headline],
        "max_loss_diff": report["parity"]["max_loss_diff"],
        "runs": [
            {
                "optimizer": run["optimizer"],
                "precision": run["precision"],
                "held_out_loss": [run["metrics"][when]["loss"] for when in ("start", "end")],
                "metric": run["metrics"]["end"][headline],
                "train_step_ms": run["train_step_ms"]["median"],
                "optimizer_step_ms": run["optimizer_step_ms"]["median"],
                "kept_bytes": run["kept_bytes"],
                "moved_bytes": run["moved_bytes"],
            }
            for run in report["runs"]
        ],
    }


def page(finished: dict[str, dict[str, Any]]) -> str:
    """Markdown of finished runs by name.

    Args:
        finished: `figures`, the summary of a run, and `shown`, pairs of a command to
            bench/finetune.py and the lines it printed, the training first.
    """
    equal, narrow = {}, {}
    for name, run in finished.items():
        first, second = run["figures"]["runs"]
        if first["precision"] == second["precision"]:
            equal[name] = run
        else:  # by task, and there by seed
            narrow.setdefault(run["figures"]["task"], {})[name] = run
    parts = [INTRODUCTION, *(row(name, run["figures"]) for name, run in equal.items())]
    if narrow:
        parts.append(NARROW_INTRODUCTION)
        parts += [
            narrow_row({n: run["figures"] for n, run in runs.items()}) for runs in narrow.values()
        ]
    firsts = [next(iter(runs.items())) for runs in narrow.values()]
    for name, run in [*equal.items(), *firsts]:
        parts.append(f"\n## {name}\n\n![losses](finetune/{name}.png)\n")
        for command, printed in run["shown"]:
            lines = ["", "```", f"$ python bench/finetune.py {command}", *printed, "```", ""]
            parts.append("\n".join(lines))
    return "".join(parts)


def row(name: str, figures: dict[str, Any]) -> str:
    first, second = figures["runs"]
    size, (start, end) = figures["parameters"], second["held_out_loss"]
    return (
        f"| [{name}](#{name}) "
        f"| {size['trained'] / 1e6:.3g} of {size['total'] / 1e6:.1f} M, "
        f"{size['trained_tensors']} tensors "
        f"| {figures['steps']} "
        f"| {start:.3f} to {end:.3f} "
        f"| {figures['headline']} {second['metric']:.3f} | {figures['trivial']:.3f} "
        f"| {figures['max_loss_diff']:.1e} "
        f"| {first['optimizer_step_ms']:.2f} | {second['optimizer_step_ms']:.2f} "
        f"| {second['optimizer_step_ms'] / second['train_step_ms']:.1%} |\n"
    )


def narrow_row(runs: dict[str, dict[str, Any]]) -> str:
    """Of a task's runs by name, a seed each; the first is the one that is shown."""
    name, seeds = next(iter(runs)), list(runs.values())
    wide, narrow = ([each["runs"][place] for each in seeds] for place in (0, 1))
    metrics = [[run["metric"] for run in runs] for runs in (wide, narrow)]
    differences = [ours - theirs for theirs, ours in zip(*metrics, strict=True)]
    answer = ""
    if len(seeds) > 1:
        within = abs(statistics.mean(differences)) <= statistics.stdev(metrics[0])
        answer = "yes" if within else "no"
    losses = [[run["held_out_loss"][1] for run in runs] for runs in (wide, narrow)]
    cells = [
        f"[{name}](#{name})",
        ", ".join(str(each["seed"]) for each in seeds),
        f"{seeds[0]['headline']} {mean(metrics[0])}",
        mean(metrics[1]),
        mean(differences, "+.3f"),
        answer,
        *map(mean, losses),
    ]
    for key in ("kept_bytes", "moved_bytes"):
        cells += [f"{each[0][key]:.2f}" for each in (wide, narrow)]
    return f"| {' | '.join(cells)} |\n"


def mean(values: Sequence[float], form: str = ".3f") -> str:
    """`0.934 ± 0.004`; without the deviation if there is but one."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"
