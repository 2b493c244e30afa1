"""Measure everything on one machine, part after part: what `make bench` and `make gpu` run.

Each part is a program of its own with a time limit; its output shows as it comes. A part that fails
or runs out of time does not stop the others. Results go to bench/results, or flat to --out:

    MACHINE-DATE.json      what the machine is, and each part's outcome and seconds
    step-DEVICE.csv        step.py: every comparison of AdamW and SGD
    optimizers-DEVICE.csv  bench only: step.py: some comparisons of every other optimizer
    sharded-DEVICE.csv     step.py: DTensors, gradients in bfloat16
    offload-DEVICE.csv     offload.py: models that lie in the host's memory
    scaling-DEVICE.csv     throughput/scaling.py: time over the number and the size of tensors
    share-DEVICE.csv       throughput/share.py: the optimizer's share of fine-tuning
    finetune-topics-DEVICE.json, .png   gpu only: finetune.py
    run.log                with --out: all output
    README.md              throughput/pages.py: all of it in tables; without --out, pictures, too

    python bench/run.py bench
    python bench/run.py gpu --out DIR --cache DIR
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

import machine
from throughput.measure import OPTIMIZERS
from throughput.rivals import AUTHORS, CONTENDERS, FOREACH, FUSED, OURS

BENCH = machine.ROOT / "bench"
BUILD = machine.ROOT / "build" / "gpu"  # `make gpu` has it in PYTHONPATH


@dataclass(frozen=True)
class Part:
    """One program.

    Args:
        limit: seconds after which it is ended.
        keeps: files it leaves elsewhere, and where they belong.
        appends: a file to which several parts append; the first is to find none.
    """

    name: str
    command: list[str]
    limit: float
    keeps: dict[Path, Path] = field(default_factory=dict)
    appends: Path | None = None


# Situations about what is done around a step, and beside it.
AROUND = ("clip", "torch's clip", "our clip", "clip alone", "skip", "average", "busy")

# Ours with states or weights in formats of ours.
IN_FEWER_BYTES = [name for name in CONTENDERS if re.match(f"{OURS} .*(states|split)", name)]

# By default options; Adam and SGD have parts of their own.
OTHERS = [name for name in OPTIMIZERS if name.isalpha() and name not in ("adam", "adamw", "sgd")]


def bench_parts(args: argparse.Namespace) -> Iterator[Part]:
    """For a CPU: 20 minutes on two cores, 3 more where DeepSpeed is yet to build its kernels."""
    few = ["--contender", "fastopt", "torch fused", "torch foreach"]
    yield step(args, "every workload", 300, "--optimizer", "adamw")
    yield step(args, "every workload, SGD", 130, "--optimizer", "sgd-momentum", *few)
    yield step(
        *(args, "situations", 150, "--optimizer", "adamw", *few),
        *("--situation", "scaler", "fresh", "first", "backward"),
        *("--workload", "1000x16", "lora-bert", "minilm"),
    )
    yield step(
        *(args, "around a step", 150, "--optimizer", "adamw", "--contender", OURS, FUSED),
        *("--situation", *AROUND, "--workload", "1000x16", "lora-bert", "minilm"),
        csv="around",
    )
    yield step(
        *(args, "fewer bytes", 150, "--optimizer", "adamw", "--dtype", "float32", "bfloat16"),
        *("--contender", OURS, FUSED, *IN_FEWER_BYTES),
        *("--workload", "1000x16", "lora-bert", "8x4M", "bert-base"),
        csv="bytes",
    )
    yield step(
        *(args, "DTensors", 120, "--optimizer", "adamw", "--situation", "sharded"),
        *("--contender", OURS, FUSED, FOREACH, "--workload", "1000x16", "300x4096"),
        csv="sharded",
    )
    yield step(
        *(args, "bfloat16 gradients", 90, "--optimizer", "adamw"),
        *("--situation", "bfloat16 gradients", "--contender", OURS, FUSED),
        *("--workload", "1000x16", "minilm", "bert-base"),
        csv="sharded",
    )
    yield offload(args, 500)
    yield step(
        *(args, "rivals that compile", 600, "--optimizer", "adamw", "--patience", "240"),
        *("--contender", *(name for name, rival in CONTENDERS.items() if rival.compiles)),
        *("--workload", "lora-bert", "8x4M"),
    )
    yield step(
        *(args, "every other optimizer", 300, "--optimizer", *OTHERS),
        *("--contender", OURS, FUSED, FOREACH, "torch loop", AUTHORS),
        *("torch-optimi", "bitsandbytes"),
        *("--workload", "1000x16", "lora-bert", "8x4M"),
        csv="optimizers",
    )
    yield from further_parts(args)


def gpu_parts(args: argparse.Namespace) -> Iterator[Part]:
    """For a machine with a GPU and no network."""
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    build = python("-m", "pip", "install", *offline, "--target", BUILD, "--upgrade", machine.ROOT)
    # Only these files: others may need what such a machine lacks.
    marked = [f for f in machine.ROOT.glob("tests/test_*.py") if "mark.gpu" in f.read_text()]
    # Triton compiles a kernel for most cases: several processes share that, where they can.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    quiet = ["-q", "-p", "no:cacheprovider", *workers]
    tests = python("-m", "pytest", *quiet, "-m", "gpu", *sorted(marked))
    pair = ["--contender", "fastopt", "torch fused"]
    graph = [] if args.device == "cpu" else ["graph"]
    yield Part("build", build, 170)
    yield Part("report", python("-m", "fastopt"), 60)
    yield Part("tests", tests, 150)
    yield step(args, "every workload", 120, "--optimizer", "adamw")
    yield step(
        *(args, "situations", 90, "--optimizer", "adamw", *pair, "fastopt triton"),
        *("--situation", "scaler", "fresh", "first", "backward", *graph),
        *("--workload", "1000x16", "lora-bert", "lora-llama-7b", "bert-base"),
    )
    yield step(
        *(args, "around a step", 60, "--optimizer", "adamw", *pair, "--situation", *AROUND),
        *("--workload", "1000x16", "lora-bert", "bert-base"),
        csv="around",
    )
    yield step(
        *(args, "DTensors", 60, "--optimizer", "adamw", "--contender", OURS, FUSED, FOREACH),
        *("--situation", "sharded", "bfloat16 gradients", "--workload", "1000x16", "300x4096"),
        csv="sharded",
    )
    yield offload(args, 60, "--size", "25M", "110M", "--patience", "20")
    yield step(args, "every workload, SGD", 60, "--optimizer", "sgd-momentum", *pair)
    yield step(args, "bfloat16", 60, "--optimizer", "adamw", "--dtype", "bfloat16", *pair)
    yield finetune(args)
    yield from further_parts(args)


def further_parts(args: argparse.Namespace) -> Iterator[Part]:
    """What both end with."""
    scaling, share = (args.to / f"{name}-{args.device}.csv" for name in ("scaling", "share"))
    timing = ["--device", args.device, "--seconds", args.seconds]
    yield Part("scaling", python("-m", "throughput.scaling", *timing, "--csv", scaling), 150)
    tuning = ["--device", args.device, *cached(args), "--csv", share]
    yield Part("share of fine-tuning", python("-m", "throughput.share", *tuning), 150)


def finetune(args: argparse.Namespace) -> Part:
    left = Path(tempfile.mkdtemp())
    keeps = {
        left / "report.json": args.to / f"finetune-topics-{args.device}.json",
        left / "losses.png": args.to / f"finetune-topics-{args.device}.png",
    }
    command = python(BENCH / "finetune.py", "--out", left, *cached(args), *args.finetune)
    return Part("fine-tuning", command, 120, keeps)


def cached(args: argparse.Namespace) -> list[Any]:
    return ["--cache", args.cache] if args.cache else []


def step(
    args: argparse.Namespace, name: str, limit: float, *options: str, csv: str = "step"
) -> Part:
    """A run of step.py, whose rows are appended to those of the others."""
    sink = args.to / f"{csv}-{args.device}.csv"
    chosen = ["--device", args.device, "--seconds", args.seconds, "--csv", sink, "--append"]
    if "--workload" not in options and args.workload:
        chosen += ["--workload", *args.workload]
    return Part(name, python(BENCH / "step.py", *chosen, *options), limit, appends=sink)


def offload(args: argparse.Namespace, limit: float, *options: str) -> Part:
    sink = args.to / f"offload-{args.device}.csv"
    chosen = ["--device", args.device, "--seconds", args.seconds, "--csv", sink]
    return Part("offloaded", python(BENCH / "offload.py", *chosen, *options), limit)


def tables_part(args: argparse.Namespace) -> Part:
    return Part("tables", python("-m", "throughput.pages", "--results", args.to), 60)


def python(*arguments: Any) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def run(part: Part, limit: float, log: BinaryIO) -> str:
    """Its outcome: `passed`, or how it ended."""
    process = subprocess.Popen(
        part.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=BENCH,  # where -m finds the rooms; not the root, whose fastopt/ is not the one built
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # so that what it started ends with it
    )
    output = threading.Thread(target=show, args=(process.stdout, log))
    output.start()
    try:
        code = process.wait(timeout=limit)
        outcome = "passed" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"ended after {limit:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output.join()
    return outcome


def show(source: Any, log: BinaryIO) -> None:
    for data in iter(lambda: source.read1(1 << 16), b""):
        for sink in (sys.stdout.buffer, log):
            sink.write(data)
            sink.flush()


def run_all(
    parts: Sequence[Part], seconds: float, log: BinaryIO, save: Callable[[list[Any]], None]
) -> list[dict[str, Any]]:
    """Each part's outcome, saved after each: whoever ends this program loses little.

    Args:
        seconds: for all parts together; what is left of them when a part begins limits it, too.
    """
    end = time.perf_counter() + seconds
    outcomes: list[dict[str, Any]] = []
    for part in parts:
        start = time.perf_counter()
        limit = min(part.limit, end - start)
        print(f"\n== {part.name}: at most {limit:.0f} s", flush=True)
        outcome = run(part, limit, log) if limit > 0 else "not run: no time left"
        for source, target in part.keeps.items():
            if source.exists():
                shutil.move(source, target)
        took = round(time.perf_counter() - start, 1)
        outcomes.append({"name": part.name, "outcome": outcome, "seconds": took})
        print(f"== {part.name}: {outcome}, {took} s", flush=True)
        save(outcomes)
    return outcomes


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to believe the figures, and to repeat them."""
    # Asked by another process: this one is to hold no memory of a GPU's.
    name = python("-c", f"import machine; print(machine.device_name({device!r}))")
    asked = subprocess.run(name, cwd=BENCH, stdout=subprocess.PIPE, text=True, check=True)
    found = {
        "machine": asked.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
    }
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": driver()}
    return found


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout.strip()


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", choices=("bench", "gpu"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for gpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write all there, in no subfolders")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of models and data")
    parser.add_argument("--minutes", type=float, help="for all parts; default: bench 20, gpu 7.5")
    parser.add_argument("--seconds", type=float, help="a comparison; default: bench 2, gpu 0.3")
    parser.add_argument("--workload", nargs="+", help="in place of every workload")
    parser.add_argument("--finetune", nargs=argparse.REMAINDER, default=[], help="its options")
    args = parser.parse_args(argv)
    gpu = args.plan == "gpu"
    args.device = args.device or ("cuda" if gpu else "cpu")
    args.minutes = args.minutes or (7.5 if gpu else 20)
    args.seconds = args.seconds or (0.3 if gpu else 2)
    args.to = (args.out or machine.RESULTS).resolve()
    args.cache = args.cache and args.cache.resolve()
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    args.to.mkdir(parents=True, exist_ok=True)
    known = facts(args.device)
    title = re.sub(r"[^a-z0-9]+", "-", known["machine"].lower())
    report = args.to / f"{title}-{known['date']}.json"

    def save(outcomes: list[dict[str, Any]]) -> None:
        found = {**known, "fastopt": machine.version("fastopt"), "parts": outcomes}
        report.write_text(json.dumps(found, indent=2) + "\n")

    parts = list({"bench": bench_parts, "gpu": gpu_parts}[args.plan](args))
    for part in parts:
        if part.appends:
            part.appends.unlink(missing_ok=True)
    with (args.to / "run.log" if args.out else Path(os.devnull)).open("wb") as log:
        outcomes = run_all(parts, 60 * args.minutes, log, save)
        outcomes += run_all(
            [tables_part(args)], math.inf, log, lambda last: save([*outcomes, *last])
        )
    print("\n" + "\n".join("{seconds:7.1f} s  {name}: {outcome}".format_map(o) for o in outcomes))
    print(f"written: {report}")
    return 0 if all(o["outcome"] == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
