"""What a comparison's report looks like: as a table, as pictures, as a page of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .comparison import loss_differences
from .tasks import Task


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
            *task.rows(*ends),
            *forgetting(run, report["headline"]),
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
        f"trained: {report['tuning']}, {size['trained'] / 1e6:.3g} M parameters in "
        f"{size['trained_tensors']} tensors",
        f"{examples['train']} examples to train on, {examples['held_out']} held out for "
        f"{report['held_out_for']}; "
        f"{len(report['runs'][0]['losses'])} steps of {batch(report)}, lr {report['lr']:g}, "
        f"seed {report['seed']}; {report['precision']} on {report['device']}",
    ]
    ends, headline = report["runs"][-1]["metrics"], report["headline"]
    reached, trivial = ends["end"][headline], ends["end"]["baseline"][headline]
    foot = [
        f"{headline} {reached:.3f}, {reached - trivial:+.3f} over the trivial {trivial:.3f}",
        f"optimizer step, first column over second: {first / second:.2f}x",
        f"largest loss difference at any step: {parity['max_loss_diff']:.2e}",
        f"largest parameter difference at the end: {parity['max_param_diff']:.2e} "
        f"(training moved parameters by up to {parity['max_param_change']:.2e})",
    ]
    rule = "-" * max(map(len, lines))
    notes = task.notes(ends["start"], ends["end"])
    return "\n".join([*head, rule, lines[0], rule, *lines[1:], rule, *foot, *notes])


def forgetting(run: dict[str, Any], headline: str) -> list[tuple[str, str]]:
    """Rows on what a continued run still knows of the earlier data."""
    if "earlier_data" not in run:
        return []
    start, end = (run["earlier_data"][when] for when in ("start", "end"))
    return [
        (f"earlier data, held-out {name}, start to end", f"{start[name]:.4f} to {end[name]:.4f}")
        for name in ("loss", headline)
    ] + [(f"  {headline} forgotten", f"{start[headline] - end[headline]:+.4f}")]


def batch(report: dict[str, Any]) -> str:
    """How many examples make a step, and how they come together."""
    factors = [report["batch_size"], report["gradient_accumulation_steps"], report["processes"]]
    units = ("", " accumulated", " processes")
    return " x ".join(
        f"{factor}{unit}"
        for factor, unit in zip(factors, units, strict=True)
        if factor > 1 or not unit
    )


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


def smooth(values: Sequence[float], memory: float = 0.7) -> list[float]:
    """Exponentially weighted means, unbiased from the first."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = memory * mean + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        means.append(mean / weight)
    return means


def suggested_rate(test: dict[str, list[float]]) -> float | None:
    """A tenth of the rate at which the smoothed loss was least, by a rule of thumb of practice.

    None if the loss never fell below that of the first step.
    """
    losses = smooth(test["losses"])
    least = losses.index(min(losses))
    return test["rates"][least] / 10 if least > 0 else None


def range_picture(test: dict[str, list[float]], path: Path) -> None:
    """The loss over the learning rate, and where the suggestion lies."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(test["rates"], test["losses"], color="#9ec5e8", linewidth=1, label="each step")
    axes.plot(test["rates"], smooth(test["losses"]), color="#b03a2e", label="smoothed")
    rate = suggested_rate(test)
    if rate is not None:
        axes.axvline(rate, color="#333333", linewidth=0.8, label=f"suggested: {rate:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.legend()
    figure.savefig(path, dpi=120)


PAGE_INTRODUCTION = """\
# Fine-tuning, stock optimizer against ours

Made by `make finetune-all`. In every row both optimizers start from the same weights with the same
seed. Loss and metric are those of `fastopt`'s run on examples that took no part in choosing rates
or steps, the metric beside what the trivial answer scores; the loss difference is the largest
between the two runs at any step. Where it is not zero it begins in the last elements of a tensor,
which torch rounds in another way, and grows as far as the model lets it.

| run | trained | steps | held-out loss | metric | trivial | loss difference | \
optimizer, ms: torch | fastopt | share of the step |
|---|---|---|---|---|---|---|---|---|---|
"""


def page(finished: dict[str, tuple[dict[str, Any], list[tuple[list[str], str]]]]) -> str:
    """Markdown of finished runs by name: the report of each, and what its commands printed.

    A command is given as its arguments to bench/finetune.py; the first is the training.
    """
    rows, sections = [], []
    for name, (report, outputs) in finished.items():
        first, second = report["runs"]
        start, end = (second["metrics"][when] for when in ("start", "end"))
        size, headline = report["parameters"], report["headline"]
        times = [run["optimizer_step_ms"]["median"] for run in (first, second)]
        rows.append(
            f"| [{name}](#{name}) "
            f"| {size['trained'] / 1e6:.3g} of {size['total'] / 1e6:.1f} M, "
            f"{size['trained_tensors']} tensors "
            f"| {len(second['losses'])} of {batch(report)} "
            f"| {start['loss']:.3f} to {end['loss']:.3f} "
            f"| {headline} {end[headline]:.3f} | {end['baseline'][headline]:.3f} "
            f"| {report['parity']['max_loss_diff']:.1e} "
            f"| {times[0]:.2f} | {times[1]:.2f} "
            f"| {times[1] / second['train_step_ms']['median']:.1%} |"
        )
        sections.append(f"\n## {name}\n\n![losses](finetune-{name}.png)\n")
        sections += [
            f"\n```\n$ python bench/finetune.py {' '.join(arguments)}\n{text}```\n"
            for arguments, text in outputs
        ]
    return PAGE_INTRODUCTION + "\n".join(rows) + "\n" + "".join(sections)
