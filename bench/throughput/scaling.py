"""What a step costs as the work grows: in the number of tensors, and in their size.

    cd bench && python -m throughput.scaling --csv results/scaling-cpu.csv

The CSV has the columns of bench/step.py; a workload is called TENSORSxELEMENTS. Two lines are
fitted to each contender's times: over the number of tensors, all tiny, a time per step and one per
tensor; over the bytes of one tensor, where they exceed the caches, a time per byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .measure import CACHES, Row, Setting, measure
from .rivals import FUSED, OURS
from .rows import Results, measured, table

TINY = 16  # elements: next to no work but the bookkeeping
COUNTS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 20_000]
SIZES = [round(10 ** (half / 2)) for half in range(6, 19)]  # 1e3 to 1e9
BYTES = 28  # that a step of AdamW moves for each float32 parameter


class Line(NamedTuple):
    fixed: float
    each: float


def fit(x: Iterable[float], y: Iterable[float]) -> Line:
    """Least squares of the relative error, so that small values count as much as large ones."""
    xs, ys = np.array(list(x)), np.array(list(y))
    rows = np.stack([1 / ys, xs / ys], axis=1)
    (fixed, each), *_ = np.linalg.lstsq(rows, np.ones_like(ys))
    return Line(float(fixed), float(each))


def over_tensors(rows: Iterable[Row], contender: str) -> list[tuple[int, float]]:
    """Pairs of a number of tiny tensors and milliseconds."""
    return [
        (int(row["tensors"]), float(row["median_ms"]))
        for row in measured(rows)
        if row["contender"] == contender and int(row["elements"]) == TINY * int(row["tensors"])
    ]


def over_elements(rows: Iterable[Row], contender: str) -> list[tuple[int, float]]:
    """Pairs of the elements of one tensor and milliseconds."""
    return [
        (int(row["elements"]), float(row["median_ms"]))
        for row in measured(rows)
        if row["contender"] == contender and row["tensors"] == "1"
    ]


def fits(rows: Iterable[Row], contender: str) -> tuple[Line, Line | None]:
    """Milliseconds over the number of tensors, and over the elements beyond the caches."""
    rows = list(rows)
    large = [(n, ms) for n, ms in over_elements(rows, contender) if n * BYTES >= CACHES]
    tensors = fit(*zip(*over_tensors(rows, contender), strict=True))
    return tensors, fit(*zip(*large, strict=True)) if len(large) > 1 else None


def describe(rows: Iterable[Row], contender: str) -> str:
    tensors, elements = fits(rows, contender)
    text = f"{contender}: {tensors.fixed * 1e3:.1f} µs and {tensors.each * 1e6:.0f} ns a tensor"
    if elements is None:
        return text
    picoseconds = elements.each / BYTES * 1e9
    return f"{text}; {picoseconds:.1f} ps a byte ({1e3 / picoseconds:.0f} GB/s) beyond the caches"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=2, help="of rounds for each point; %(default)s"
    )
    parser.add_argument(
        "--up-to", type=int, default=SIZES[-1], metavar="N", help="elements in all; %(default)s"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    results = Results(args.csv, args.device)
    points = [(count, TINY) for count in COUNTS] + [(1, size) for size in SIZES]
    points = [(count, size) for count, size in points if count * size <= args.up_to]
    for count, size in tqdm(points, unit="point"):
        setting = Setting([(size,)] * count, "adamw", "plain", "float32", args.device)
        for row in measure(setting, [OURS, FUSED], args.seconds, patience=60):
            results.add(f"{count}x{size}", setting, row)
    print(table(results.rows))
    for contender in (OURS, FUSED):
        print(describe(results.rows, contender))
    return 0


if __name__ == "__main__":
    sys.exit(main())
