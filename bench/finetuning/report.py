"""What a comparison's report looks like: as a table, and as a picture of its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .comparison import loss_differences
from .tasks import Task


def table(report: dict[str, Any], task: Task) -> str:
    """The report as one table, a column for each optimizer."""
    columns = [column(run, report["headline"], task) for run in report["runs"]]
    widths = [max(len(text) for _, text in rows) for rows in columns]
    label_width = max(len(label) for label, _ in columns[0])
    lines = [
        "  ".join(
            [f"{cells[0][0]:{label_width}}"]
            + [f"{text:>{width}}" for (_, text), width in zip(cells, widths, strict=True)]
        )
        for cells in zip(*columns, strict=True)
    ]
    rule = "-" * max(map(len, lines))
    ends = report["runs"][-1]["metrics"]
    notes = task.notes(ends["start"], ends["end"])
    return "\n".join([*head(report), rule, lines[0], rule, *lines[1:], rule, *foot(report), *notes])


def column(run: dict[str, Any], headline: str, task: Task) -> list[tuple[str, str]]:
    start, end = run["metrics"]["start"], run["metrics"]["end"]
    losses, whole, step = run["losses"], run["train_step_ms"], run["optimizer_step_ms"]
    timing = "{median:.2f} ({p20:.2f} to {p80:.2f})"
    return [
        ("", run["optimizer"]),
        ("precision", run["precision"]),
        ("training loss, first to last step", f"{losses[0]:.4f} to {losses[-1]:.4f}"),
        ("held-out loss, start to end", f"{start['loss']:.4f} to {end['loss']:.4f}"),
        *task.rows(start, end),
        *forgetting(run, headline),
        ("whole step, ms: median (p20 to p80)", timing.format_map(whole)),
        ("optimizer step, ms: median (p20 to p80)", timing.format_map(step)),
        ("  share of the whole step", f"{step['median'] / whole['median']:.1%}"),
        ("bytes a trained parameter, kept", f"{run['kept_bytes']:.2f}"),
        ("  moved by a step", f"{run['moved_bytes']:.2f}"),
    ]


def head(report: dict[str, Any]) -> list[str]:
    size, examples = report["parameters"], report["examples"]
    return [
        f"{report['task']}: {report['model']}, {size['total'] / 1e6:.1f} M parameters in "
        f"{size['tensors']} tensors, on {report['dataset']}",
        f"trained: {report['tuning']}, {size['trained'] / 1e6:.3g} M parameters in "
        f"{size['trained_tensors']} tensors",
        f"{examples['train']} examples to train on, {examples['held_out']} held out for "
        f"{report['held_out_for']}; "
        f"{len(report['runs'][0]['losses'])} steps of {batch(report)}, lr {report['lr']:g}, "
        f"seed {report['seed']}; on {report['device']}",
    ]


def foot(report: dict[str, Any]) -> list[str]:
    end, headline, parity = (
        report["runs"][-1]["metrics"]["end"],
        report["headline"],
        report["parity"],
    )
    reached, trivial = end[headline], end["baseline"][headline]
    first, second = (run["optimizer_step_ms"]["median"] for run in report["runs"])
    return [
        f"{headline} {reached:.3f}, {reached - trivial:+.3f} over the trivial {trivial:.3f}",
        f"optimizer step, first column over second: {first / second:.2f}x",
        f"largest loss difference at any step: {parity['max_loss_diff']:.2e}",
        f"largest parameter difference at the end: {parity['max_param_diff']:.2e} "
        f"(training moved parameters by up to {parity['max_param_change']:.2e})",
    ]


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
