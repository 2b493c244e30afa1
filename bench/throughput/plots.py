"""Pictures of the committed CSVs; each carries a digest of the CSV that it shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import scaling
from .measure import Row
from .rivals import CONTENDERS, FUSED, OURS
from .rows import measured, read
from .workloads import WORKLOADS

COLOURS = {OURS: "#b03a2e", FUSED: "#2e6da4"}
SHOWN = ["1000x16", "lora-bert", "8x4M", "bert-base"]
SLOWEST = 5  # times as long as torch fused: how far a bar is drawn


def bars(rows: Sequence[Row]) -> Figure:
    """Every contender's time on some workloads, and the time at the memory's limit.

    All relative to torch fused in the same rounds: from one comparison to the next a shared machine
    is not equally fast.
    """
    plain = [
        row
        for row in measured(rows)
        if (row["optimizer"], row["situation"], row["dtype"]) == ("adamw", "plain", "float32")
    ]
    workloads = [name for name in SHOWN if any(row["workload"] == name for row in plain)]
    figure = Figure(figsize=(9, 1 + 2.2 * len(workloads)), layout="constrained")
    places = figure.subplots(len(workloads), 1, squeeze=False).flat
    for axes, workload in zip(places, workloads, strict=True):
        draw_bars(axes, [row for row in plain if row["workload"] == workload])
        axes.set_title(WORKLOADS[workload].title, loc="left")
    figure.supxlabel(f"a step of AdamW, float32: times as long as torch fused, up to {SLOWEST}")
    return figure


def draw_bars(axes: Axes, rows: list[Row]) -> None:
    times = {row["contender"]: 1 / float(row["ratio"]) for row in rows}
    names = sorted(times, key=times.__getitem__, reverse=True)
    edge = min(SLOWEST, 1.2 * max(times.values()))
    axes.barh(names, [times[name] for name in names], color=[colour(name) for name in names])
    for name in names:
        text = f" {times[name]:.2f}"
        if times[name] > edge:
            axes.annotate(f"{text} ", (edge, name), ha="right", va="center")
        else:
            axes.annotate(text, (times[name], name), va="center")
    for row in rows:
        if row["contender"] == OURS and row["ceiling_share"]:
            limit = times[OURS] * float(row["ceiling_share"])
            axes.axvline(limit, color="black", linestyle="--", label="memory's limit")
            axes.legend(loc="upper right")
    axes.set_xlim(0, edge)
    axes.spines[["top", "right"]].set_visible(False)


def colour(contender: str) -> str:
    return COLOURS.get(contender, "#aab4bd")


def sweeps(rows: Sequence[Row]) -> Figure:
    """Time over the number of tensors, and over the size of one."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    many, large = figure.subplots(1, 2)
    for axes, points in ((many, scaling.over_tensors), (large, scaling.over_elements)):
        for name in (name for name in CONTENDERS if name in COLOURS):
            found = points(rows, name)
            axes.plot(*zip(*found, strict=True), marker="o", color=colour(name), label=name)
        axes.set(xscale="log", yscale="log", ylabel="milliseconds a step of AdamW")
        axes.grid(alpha=0.3)
        axes.legend()
    many.set(xlabel=f"tensors of {scaling.TINY} elements")
    large.set(xlabel="elements of one tensor")
    return figure


# What each shows, and the CSV it comes from.
PICTURES: dict[str, tuple[Callable[[Sequence[Row]], Figure], str]] = {
    "rivals": (bars, "step"),
    "scaling": (sweeps, "scaling"),
}


def digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def save(draw: Callable[[Sequence[Row]], Figure], source: Path, picture: str) -> None:
    """Beside the CSV, if there is one."""
    if not source.exists():
        return
    name = source.name.replace(source.stem.split("-")[0], picture, 1)
    target = source.with_name(name).with_suffix(".png")
    draw(read(source)).savefig(target, dpi=110, metadata={"Source": digest(source)})
