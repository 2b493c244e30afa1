"""formats.md and formats.png: what the runs came to, beside the reference's with the same seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from throughput import plots, rivals, tables
from throughput.measure import Row
from throughput.rows import measured

from .training import (
    BATCH,
    CONTEXT,
    FORMATS,
    LR,
    MAX_NORM,
    REFERENCE,
    WEIGHT_DECAY,
    WINDOWS,
)

INTRODUCTION = f"""\
# Narrow states and weights: the held-out loss

Made by `python bench/pretrain.py`. A GPT-2 of {{elements:.3g}} M parameters learns BBC News from
scratch with AdamW: {BATCH} windows of {CONTEXT} tokens a step, learning rate {LR:g} after a warm-up
and then down a cosine to 0, weight decay {WEIGHT_DECAY:g}, gradients clipped to norm {MAX_NORM:g}.
A seed settles the first weights, rounded to bfloat16, and the batches: with one seed all contenders
have the same. The loss, in nats a token, is that on {WINDOWS} windows of articles not trained on,
the same for all. ± is the standard deviation over the seeds; a difference is to `{REFERENCE}` with
the same seed, and within the seed spread if its mean is no more than that one's deviation. Kept are
parameter, gradient and states.

Forward and backward compute in float32 on parameters widened to it, and a gradient is rounded once,
to its parameter's dtype: in bfloat16 they took 1.5 to 1.8 times as long on an Intel Xeon with
AVX512-BF16. So what is compared is how numbers are kept and updated, not the model's arithmetic."""


@dataclass(frozen=True)
class Outcome:
    """A contender's runs with one pair of betas.

    Args:
        losses: by seed, of the runs that did not diverge.
        differences: to the reference's with the same seed.
        spread: the standard deviation of the reference's losses, if it has several.
        diverged: the step, by seed.
    """

    losses: dict[str, float]
    differences: list[float]
    spread: float | None
    diverged: dict[str, str]
    kept: str

    @property
    def within(self) -> bool | None:
        """Whether the mean difference is no more than the spread; None if that is not known."""
        if self.diverged:
            return False
        if self.spread is None or not self.differences:
            return None
        return abs(statistics.mean(self.differences)) <= self.spread


def outcomes(rows: Iterable[Row]) -> dict[str, Outcome]:
    """By contender, in the order of FORMATS, of the rows of one pair of betas."""
    found = {name: tables.pick(measured(rows), contender=name) for name in FORMATS}
    losses = {
        name: {row["seed"]: float(row["held_out_loss"]) for row in own if not row["diverged"]}
        for name, own in found.items()
    }
    reference = losses[REFERENCE]
    spread = statistics.stdev(reference.values()) if len(reference) > 1 else None
    return {
        name: Outcome(
            losses=losses[name],
            differences=[
                loss - reference[seed] for seed, loss in losses[name].items() if seed in reference
            ],
            spread=spread,
            diverged={row["seed"]: row["diverged"] for row in own if row["diverged"]},
            kept=own[0]["kept_bytes_per_param"],
        )
        for name, own in found.items()
        if own
    }


def settings(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each pair of betas and number of steps, by its title."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        title = "betas {betas}; {steps} steps".format_map(row).replace(",", ", ")
        grouped.setdefault(title, []).append(row)
    return grouped


def mean(values: Iterable[float], form: str) -> str:
    """`5.8700 ± 0.0120`; without the deviation if there is but one."""
    numbers = list(values)
    if not numbers:
        return ""
    deviation = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):{form}}" + deviation


def table(found: dict[str, Outcome]) -> str:
    answers = {True: "yes", False: "no", None: ""}
    lines = [
        [
            name,
            str(FORMATS[name].dtype).removeprefix("torch."),
            outcome.kept,
            str(len(outcome.losses) + len(outcome.diverged)),
            mean(outcome.losses.values(), ".4f") or "diverged",
            mean(outcome.differences, "+.4f") if name != REFERENCE else "",
            answers[outcome.within] if name != REFERENCE else "",
        ]
        for name, outcome in found.items()
    ]
    head = ["", "parameters", "kept, bytes a parameter", "seeds"]
    head += ["held-out loss", "difference", "within the seed spread"]
    return tables.markdown(head, lines)


def sentences(found: dict[str, Outcome]) -> list[str]:
    reference = found.get(REFERENCE)
    if reference is None or reference.spread is None:
        return [f"`{REFERENCE}` needs two seeds before there is a spread to compare with."]
    lines = [
        f"`{REFERENCE}` reaches {statistics.mean(reference.losses.values()):.4f}, and its seeds "
        f"spread by {reference.spread:.4f}."
    ]
    for answer, text in ((True, "Within that spread"), (False, "Outside of it")):
        names = [n for n, o in found.items() if n != REFERENCE and o.within is answer]
        lines.append(f"{text}: {'; '.join(f'`{name}`' for name in names) or 'none'}.")
    lines += [
        f"`{name}` diverged with seed {seed} at step {at}."
        for name, outcome in found.items()
        for seed, at in outcome.diverged.items()
    ]
    return lines


def page(rows: Sequence[Row]) -> str:
    """formats.md."""
    good = measured(rows)
    parts = [INTRODUCTION.format(elements=int(good[0]["elements"]) / 1e6)] if good else []
    for title, own in settings(good).items():
        found = outcomes(own)
        parts += [f"## {title.capitalize()}", table(found), " ".join(sentences(found))]
    if good:
        parts += ["![Differences of the held-out loss](formats.png)", f"{measured_on(good)}."]
    return "\n\n".join([*parts, "## Not run", not_run(rows)]) + "\n"


def not_run(rows: Sequence[Row]) -> str:
    tried = {row["contender"] for row in rows}
    missing = "\n".join(f"- {name}: not tried yet" for name in FORMATS if name not in tried)
    skipped = any(row["skipped"] for row in rows) or not missing
    return "\n".join([missing] * bool(missing) + [tables.skipped_list(rows)] * skipped)


def measured_on(rows: Iterable[Row]) -> str:
    versions = dict.fromkeys(row["version"] for row in rows)
    return "; ".join([tables.measured_on(list(rows)), *versions])


def differences(rows: Sequence[Row]) -> Figure:
    """Every run's difference, a dot each, before the reference's spread."""
    grouped = settings(measured(rows))
    figure = Figure(figsize=(9, 0.8 + 4 * max(1, len(grouped))), layout="constrained")
    places = figure.subplots(max(1, len(grouped)), 1, squeeze=False).flat
    for axes, (title, own) in zip(places, grouped.items(), strict=False):
        draw_differences(axes, outcomes(own))
        axes.set_title(title, loc="left")
    figure.supxlabel(f"held-out loss less that of {REFERENCE} with the same seed")
    return figure


def draw_differences(axes: Axes, found: dict[str, Outcome]) -> None:
    names = [name for name in reversed(found) if name != REFERENCE]
    spread = next(iter(found.values())).spread
    if spread is not None:
        axes.axvspan(-spread, spread, color="#dfe7ee", label="seed spread of float32")
        axes.legend(loc="best")
    axes.axvline(0, color="#999999", linewidth=0.8)
    for place, name in enumerate(names):
        dots = found[name].differences
        colour = plots.colour(rivals.OURS) if FORMATS[name].is_ours else "#555555"
        axes.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.7)
    axes.set_yticks(range(len(names)), names)
