"""A row for each figure measured: its columns, its CSV, the table that is printed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import machine

from .measure import Row, Setting
from .rivals import CONTENDERS, OURS
from .workloads import elements

KEY = ["workload", "optimizer", "contender", "situation", "dtype", "device", "reference"]
COLUMNS = [
    *KEY,
    *("tensors", "elements", "rounds"),
    *("median_ms", "p20_ms", "p80_ms", "host_ms", "device_ms"),
    *("gb_per_s", "ceiling_gb_per_s", "ceiling_share", "peak_share"),
    *("state_bytes_per_param", "step_peak_mb"),
    *("ratio", "ratio_p20", "ratio_p80"),
    *("skipped", "version", "machine", "torch", "commit"),
]
SHOWN = [
    *("workload", "optimizer", "contender", "situation", "dtype"),
    *("median_ms", "p20_ms", "p80_ms", "host_ms", "device_ms", "gb_per_s", "ceiling_share"),
    *("state_bytes_per_param", "step_peak_mb", "reference", "ratio", "ratio_p20", "ratio_p80"),
]


class Results:
    """Rows, written to a CSV as they come: what ends the program loses none of them."""

    def __init__(self, file: Path | None, device: str, append: bool = False) -> None:
        self.rows: list[Row] = []
        self.facts = {"device": device, **machine.facts(device)}
        self.sink = file.open("a" if append else "w", newline="") if file else None
        if self.sink and not self.sink.tell():
            csv.DictWriter(self.sink, COLUMNS).writeheader()

    def add(self, workload: str, setting: Setting, row: Row) -> None:
        described = {
            "workload": workload,
            "tensors": str(len(setting.shapes)),
            "elements": str(elements(setting.shapes)),
            "optimizer": setting.optimizer,
            "situation": setting.situation,
            "dtype": setting.dtype,
            "reference": setting.reference,
            "version": CONTENDERS[row["contender"]].version(),
        }
        full = dict.fromkeys(COLUMNS, "") | self.facts | described | row
        self.rows.append(full)
        if self.sink:
            csv.DictWriter(self.sink, COLUMNS).writerow(full)
            self.sink.flush()


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row["skipped"]]


def table(rows: Sequence[Row]) -> str:
    lines = [SHOWN, *([row[column] for column in SHOWN] for row in measured(rows))]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    aligned = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    why_not = {f"skipped {row['contender']}: {row['skipped']}" for row in rows if row["skipped"]}
    return "\n".join([*aligned, *sorted(why_not)])


def regressions(rows: Iterable[Row], old: Iterable[Row]) -> list[str]:
    """Where ours is slower than it was, to the same reference, by more than both spreads."""
    before = {tuple(row[column] for column in KEY): row for row in measured(old)}
    found = []
    for row in measured(rows):
        was = before.get(tuple(row[column] for column in KEY))
        if row["contender"] != OURS or was is None or not was["ratio_p20"]:
            continue
        if float(row["ratio_p80"]) < float(was["ratio_p20"]):
            found.append(
                "{workload} {optimizer} {situation} {dtype}: ".format_map(row)
                + "{ratio}x {reference}, was ".format_map(row)
                + "{ratio}x ({ratio_p20} to {ratio_p80})".format_map(was)
            )
    return found


def read(file: Path) -> list[Row]:
    with file.open(newline="") as source:
        return list(csv.DictReader(source))
