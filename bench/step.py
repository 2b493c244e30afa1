"""How fast is one optimizer step, beside torch's own and beside the memory's limit?

Both step in turn, round after round, in one process, so that what disturbs one disturbs the other.
Times are medians over the rounds, ratios medians of each round's ratio. The ceiling is the time to
stream the same arrays without arithmetic, in turn with the others where memory is what bounds them.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fastopt
from ceiling import Ceiling
from workloads import WORKLOADS, Shapes

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adam": ("Adam", {}),
    "sgd-momentum": ("SGD", {"momentum": 0.9}),
    "sgd": ("SGD", {}),
}
CONTENDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fastopt": (fastopt, {}),
    "torch fused": (torch.optim, {"fused": True}),
}
COLUMNS = [
    *("workload", "optimizer", "contender", "situation", "dtype", "device"),
    *("median_ms", "p20_ms", "p80_ms", "host_ms"),
    *("gb_per_s", "ceiling_share", "ratio_to_torch_fused"),
]

# Bytes a step must move to be bound by memory, not by the caches. Streaming the arrays of a smaller
# one beside it would only push them out.
CACHES = 256e6


class Contender:
    """One optimizer with parameters and gradients of its own, and the times of its steps."""

    def __init__(self, name: str, optimizer: str, shapes: Shapes, device: str) -> None:
        module, flags = CONTENDERS[name]
        cls, options = OPTIMIZERS[optimizer]
        params = [nn.Parameter(torch.randn(s, device=device)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        self.optimizer = getattr(module, cls)(params, **options, **flags)
        self.device = device
        self.host: list[float] = []  # seconds until step() has returned
        self.total: list[float] = []  # until the device has finished, too

    def step(self) -> None:
        start = time.perf_counter()
        self.optimizer.step()
        self.host.append(time.perf_counter() - start)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.total.append(time.perf_counter() - start)


def measure(workload: str, optimizer: str, device: str, seconds: float) -> list[dict[str, str]]:
    """One row of COLUMNS for each contender."""
    shapes = WORKLOADS[workload]()
    contenders = {name: Contender(name, optimizer, shapes, device) for name in CONTENDERS}
    for contender in contenders.values():
        for _ in range(3):
            contender.step()
        contender.host.clear()
        contender.total.clear()
    states = [k for k in next(iter(contender.optimizer.state.values()), {}) if k != "step"]
    ceiling = Ceiling(shapes, len(states))
    bounded = device == "cpu" and ceiling.bytes_moved > CACHES
    limits = []

    end = time.perf_counter() + seconds
    while len(contender.total) < 7 or time.perf_counter() < end:
        for contender in contenders.values():
            contender.step()
        if bounded:
            limits.append(ceiling.seconds())

    fused = contenders["torch fused"].total
    rows = []
    for name, contender in contenders.items():
        total = contender.total
        _, p20, *_, p80, _ = statistics.quantiles(total, n=10)
        shares = [limit / t for limit, t in zip(limits, total, strict=False)]
        ratios = [f / t for f, t in zip(fused, total, strict=True)]
        values = {
            "workload": workload,
            "optimizer": optimizer,
            "contender": name,
            "situation": "plain",
            "dtype": "float32",
            "device": device,
            "median_ms": f"{statistics.median(total) * 1e3:.4f}",
            "p20_ms": f"{p20 * 1e3:.4f}",
            "p80_ms": f"{p80 * 1e3:.4f}",
            "host_ms": f"{statistics.median(contender.host) * 1e3:.4f}",
            "gb_per_s": f"{ceiling.bytes_moved / statistics.median(total) / 1e9:.1f}",
            "ceiling_share": f"{statistics.median(shares):.2f}" if bounded else "",
            "ratio_to_torch_fused": f"{statistics.median(ratios):.2f}",
        }
        rows.append(values)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a second a row, not four")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append", metavar="NAME")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", metavar="NAME")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args(argv)

    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    pairs = [
        (workload, optimizer)
        for optimizer in args.optimizer or ("adamw", "sgd-momentum")
        for workload in args.workload or WORKLOADS
    ]
    for workload, optimizer in tqdm(pairs, unit="row"):
        rows += measure(workload, optimizer, args.device, seconds=0.5 if args.quick else 4)
    print(table(rows))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
