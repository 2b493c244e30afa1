"""Write the tables and pictures of the pages and of bench/results/README.md from committed CSVs.

    make tables                         after new figures
    make tables ARGS="--results DIR"    DIR/README.md alone, of figures that lie elsewhere

In README.md and docs/ a generated table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from machine import RESULTS, ROOT

from . import plots, scaling, tables
from .rivals import FUSED, OURS
from .rows import measured
from .tables import DEVICES, NOT_YET, measured_on, pick, rows_of
from .tune import best_table

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES: dict[str, Callable[[Path], str]] = {
    "tuning-cpu": tables.tuning_table,
    **{
        f"{name}-{device}": functools.partial(table, device=device)
        for name, table, devices in (
            ("short", tables.short_table, ("cpu", "cuda")),
            ("step", tables.step_table, ("cpu", "cuda")),
            ("sharded", tables.sharded_table, ("cpu", "cuda")),
            ("offload", tables.offload_table, ("cpu", "cuda")),
            ("bytes", tables.bytes_table, ("cuda",)),
            ("training", tables.training_table, ("cuda",)),
        )
        for device in devices
    },
}


def with_tables(text: str, results: Path) -> str:
    """A page with what stands between its markers written anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


class Section(NamedTuple):
    """Of bench/results/README.md.

    Args:
        picture: the stem of one in plots.PICTURES that shows the same.
    """

    title: str
    texts: list[str]
    picture: str | None = None


def sections(results: Path, device: str) -> Iterator[Section]:
    """Those for which there are figures."""
    rows = rows_of(results, f"step-{device}")
    good = measured(rows)
    for optimizer in dict.fromkeys(row["optimizer"] for row in good):
        for dtype in dict.fromkeys(row["dtype"] for row in good):
            plain = pick(good, optimizer=optimizer, dtype=dtype, situation="plain")
            if plain:
                yield Section(
                    f"{optimizer}, {dtype}: ms a step (times as fast as {plain[0]['reference']})",
                    [tables.contenders_table(plain)],
                )
    plain = pick(good, optimizer="adamw", dtype="float32", situation="plain")
    pair = [row for row in plain if row["contender"] in (OURS, FUSED)]
    if pair:
        limits = tables.limits_table(pair)
        yield Section("adamw against the ceiling", [limits], picture="rivals")
    others = [row for row in good if row["situation"] != "plain"]
    if others:
        yield Section("adamw in other situations", [tables.situations_table(others)])
    yield from further_comparisons(results, device)
    if device == "cuda" and good:
        adamw = pick(good, optimizer="adamw", dtype="float32")
        yield Section("Host and device", [tables.host_table(adamw)])
    if plain:
        yield Section("Memory", [tables.memory_table(plain)])
    if rows:
        yield Section("Not run", [tables.skipped_list(rows)])
    sweep = rows_of(results, f"scaling-{device}")
    if sweep:
        costs = "\n".join(f"- {scaling.describe(sweep, name)}" for name in (OURS, FUSED))
        yield Section("As the work grows", [costs], picture="scaling")
    share = rows_of(results, f"share-{device}")
    if share:
        model = "MiniLM on BBC News" if device == "cpu" else "small models"
        texts = [f"{measured_on(share)}.", tables.share_table(share)]
        yield Section(f"Share of fine-tuning {model}", texts)
    tuned = rows_of(results, f"tune-{device}")
    if tuned:
        texts = [f"{measured_on(tuned)}; in bold what is as good as the best.", best_table(tuned)]
        yield Section("Variants of the kernels", texts)
    profile = rows_of(results, f"profile-{device}")
    if profile:
        known = "; ".join(
            dict.fromkeys("{machine}, fastopt at {commit}".format_map(r) for r in profile)
        )
        yield Section("Kernels by ncu", [f"{known}.", tables.profile_table(profile)])


def further_comparisons(results: Path, device: str) -> Iterator[Section]:
    """Of the CSVs that are measured by themselves: each says when and on what."""
    around = measured(rows_of(results, f"around-{device}"))
    if around:
        yield Section(
            "adamw and what is done around a step, and beside it",
            [f"{measured_on(around)}.", tables.situations_table(around)],
        )
    narrow = measured(rows_of(results, f"bytes-{device}"))
    for dtype in dict.fromkeys(row["dtype"] for row in narrow):
        texts = []
        for machine in dict.fromkeys(row["machine"] for row in narrow):  # with and without AVX-512
            own = pick(narrow, dtype=dtype, machine=machine)
            texts += [f"{measured_on(own)}.", tables.contenders_table(own)]
        texts.append(tables.memory_table(own))
        yield Section(f"adamw in fewer bytes, {dtype} parameters", texts)
    sharded = measured(rows_of(results, f"sharded-{device}"))
    if sharded:
        texts = [f"{measured_on(sharded)}.", tables.situations_table(sharded)]
        yield Section("adamw on DTensors, and on gradients in bfloat16", texts)
    if rows_of(results, f"offload-{device}"):
        yield Section("adamw on an offloaded model", [tables.offload_table(results, device)])
    further = rows_of(results, f"optimizers-{device}")
    if further:
        ran = measured(further)
        texts = [f"{measured_on(ran)}.", tables.optimizers_table(ran), tables.lacking_list(further)]
        yield Section("Every other optimizer, float32", texts)


def page(results: Path, pictures: bool) -> str:
    """bench/results/README.md."""
    parts = [
        "# Results in full",
        "Generated by `make tables` from the CSVs beside it, which `make bench` and "
        "`make gpu` write. What each column means stands in `bench/step.py`. A shared machine is "
        "not equally fast from one comparison to the next: compare ratios, which are to the "
        "reference in the same rounds, rather than milliseconds.",
    ]
    for device in DEVICES:
        good = measured(rows_of(results, f"step-{device}"))
        found = list(sections(results, device))
        parts.append(f"## {DEVICES[device]}")
        if good or not found:
            parts.append(f"{measured_on(good) if good else NOT_YET.capitalize()}.")
        for section in found:
            parts += [f"### {section.title}", *section.texts]
            if section.picture and pictures:
                parts.append(f"![{section.title}]({section.picture}-{device}.png)")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="DIR", default=RESULTS)
    results = parser.parse_args(argv).results.resolve()
    committed = results == RESULTS
    (results / "README.md").write_text(page(results, pictures=committed))
    if committed:
        for file in PAGES:
            file.write_text(with_tables(file.read_text(), results))
        for picture, (draw, source) in plots.PICTURES.items():
            for device in DEVICES:
                plots.save(draw, results / f"{source}-{device}.csv", picture)


if __name__ == "__main__":
    main()
