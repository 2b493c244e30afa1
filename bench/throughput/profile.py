"""What bounds each kernel of a step, by NVIDIA's profiler ncu?

Each case steps once under ncu, which replays every kernel of that step for its counters, and then
streams the same tensors as throughput/ceiling.cu does. The CSV has a row for each kernel: duration,
bytes of the GPU's memory read and written, the share of its peak, registers, the share of warps
that are resident, and for what a warp waits most, in cycles between two of its instructions. All
that ncu said stands in a file beside it, whose name has -raw-.

    cd bench && python -m throughput.profile --csv profile-cuda.csv
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import machine

from . import ceiling
from .measure import Row, Setting
from .rivals import OURS
from .workloads import WORKLOADS

# Settings of a step: optimizer, contender, situation, dtype, workload.
CASES: dict[str, tuple[str, str, str, str, str]] = {
    "AdamW": ("adamw", OURS, "plain", "float32", "bert-base"),
    "SGD": ("sgd", OURS, "plain", "float32", "bert-base"),
    "SGD, momentum": ("sgd-momentum", OURS, "plain", "float32", "bert-base"),
    "AdamW, bfloat16": ("adamw", OURS, "plain", "bfloat16", "bert-base"),
    "AdamW, 8-bit states": ("adamw", "fastopt 8-bit states", "plain", "float32", "bert-base"),
    "AdamW, split, 8-bit states": (
        *("adamw", "fastopt split, 8-bit states", "plain", "bfloat16", "bert-base"),
    ),
    "AdamW, clipping": ("adamw", OURS, "clip", "float32", "bert-base"),
    "AdamW, average": ("adamw", OURS, "average", "float32", "bert-base"),
    "AdamW, 288 small": ("adamw", OURS, "plain", "float32", "lora-bert"),
    "AdamW, Triton": ("adamw", "fastopt triton", "plain", "float32", "bert-base"),
}
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "read_mb": "dram__bytes_read.sum",
    "written_mb": "dram__bytes_write.sum",
    "of_peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "resident_warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
COLUMNS = ["case", "kernel", "grid", "block", *METRICS, "gb_per_s", "waits", "machine", "commit"]
# To what METRICS are given in; ncu chooses units by size.
UNITS = {"microseconds": 1e6, "read_mb": 1e-6, "written_mb": 1e-6}
PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9}


def step_once(case: str, workload: str | None) -> None:
    """What ncu runs: it looks only between start and stop."""
    optimizer, contender, situation, dtype, own = CASES[case]
    setting = Setting(WORKLOADS[workload or own].shapes(), optimizer, situation, dtype, "cuda")
    clock = setting.clock(contender)
    clock.warm_up()
    stream = ceiling.DeviceStream(clock.situation)
    stream.rate()
    clock.situation.before()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    clock.situation.turn()
    stream.launch()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def under_ncu(ncu: str, case: str, workload: str | None, limit: float) -> str:
    """ncu's table, or nothing where it failed: why is printed."""
    said = Path(tempfile.mkdtemp()) / "ncu.csv"
    command = [
        ncu,
        "--csv",
        "--page",
        "raw",
        "--log-file",
        str(said),
        "--profile-from-start",
        "off",
    ]
    command += ["--clock-control", "none", "--metrics", ",".join(METRICS.values())]
    command += [word for name in SECTIONS for word in ("--section", name)]
    command += [sys.executable, "-m", "throughput.profile", "--step", case]
    command += ["--workload", workload] if workload else []
    try:
        done = subprocess.run(
            command, cwd=machine.ROOT / "bench", capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"{case}: ended after {limit:.0f} s", file=sys.stderr)
        return ""
    text = said.read_text() if said.exists() else ""
    if done.returncode:
        last = "\n".join((text + done.stdout + done.stderr).splitlines()[-8:])
        print(f"{case}: ncu failed with exit code {done.returncode}\n{last}", file=sys.stderr)
        return ""
    return text


def rows_of(text: str) -> list[Row]:
    """Of each kernel, what COLUMNS name of ncu's table; what it does not have stays blank."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    units, *kernels = csv.DictReader(lines[first:])
    return [row_of(kernel, units) for kernel in kernels]


def row_of(kernel: Row, units: Row) -> Row:
    row = {
        "kernel": short(kernel["Kernel Name"]),
        "grid": kernel.get("Grid Size", ""),
        "block": kernel.get("Block Size", ""),
    }
    found = {}
    for column, metric in METRICS.items():
        if kernel.get(metric):
            value = number(kernel[metric])
            if column in UNITS:
                value *= UNITS[column] * scale(units[metric])
            found[column] = value
            row[column] = f"{value:.2f}" if column in UNITS else f"{value:g}"
    if {"microseconds", "read_mb", "written_mb"} <= found.keys():
        moved = found["read_mb"] + found["written_mb"]
        row["gb_per_s"] = f"{1e3 * moved / found['microseconds']:.0f}"
    waits = {
        match[1]: number(value)
        for name, value in kernel.items()
        if value and (match := STALL.fullmatch(name))
    }
    most = sorted(waits, key=waits.__getitem__, reverse=True)[:3]
    row["waits"] = ", ".join(f"{name} {waits[name]:.1f}" for name in most)
    return row


def number(text: str) -> float:
    return float(text.replace(",", ""))


def scale(unit: str) -> float:
    """Of bytes or seconds: Mbyte, us, usecond."""
    match = re.fullmatch(r"([numKMG]?)(s|second|byte|B)s?", unit)
    if match is None:
        raise ValueError(f"ncu gives a metric in {unit!r}, of which no scale is known here")
    return PREFIXES.get(match[1], 1.0)


def short(kernel: str) -> str:
    """Without return type, namespaces and arguments."""
    name = re.sub(r"\((?:\w+::)+\w+\)(?=\d)", "", kernel.removeprefix("void "))  # casts
    name = re.sub(r"(\(anonymous namespace\)|<unnamed>)::", "", name)
    name = re.sub(r"\b\w+::(?=\w)", "", name)
    return re.sub(r"\(.*", "", name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME"
    )
    parser.add_argument("--step", choices=list(CASES), metavar="NAME", help="what ncu runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workload", help="in place of each case's own")
    parser.add_argument("--limit", type=float, default=60, help="seconds a case; %(default)s")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.step:
        step_once(args.step, args.workload)
        return 0
    ncu = machine.cuda_tool("ncu")
    if args.device == "cpu":
        print("no profile: ncu is for a GPU's kernels")
        return 0
    if ncu is None:
        print("no profile: ncu is neither on PATH nor beside nvcc")
        return 0
    rows: list[Row] = []
    texts: list[str] = []
    facts = {"machine": machine.device_name("cuda"), "commit": machine.commit()}
    for case in args.case:
        text = under_ncu(ncu, case, args.workload, args.limit)
        texts.append(f"# {case}\n{text}")
        own = [{"case": case, **row, **facts} for row in rows_of(text)]
        for row in own:
            print(
                ", ".join(f"{column} {row[column]}" for column in COLUMNS[:-2] if row.get(column))
            )
        rows += own
        if args.csv:
            raw = args.csv.with_name(args.csv.name.replace("-", "-raw-", 1))
            raw.write_text("\n".join(texts))
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="")
                writer.writeheader()
                writer.writerows(rows)
    return 0 if {row["case"] for row in rows} == set(args.case) else 1


if __name__ == "__main__":
    sys.exit(main())
