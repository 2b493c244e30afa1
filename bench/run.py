"""Measure everything on one machine, part after part: what `make bench` and `make gpu` run.

Each part is made of programs with time limits; their output shows as it comes. One that fails or
runs out of time does not stop the others. Results go to bench/results, or flat to --out:

    MACHINE-DATE.json      what the machine is, and each program's outcome and seconds
    step-DEVICE.csv        step.py: every comparison of AdamW and SGD
    around-DEVICE.csv      step.py: clipping, skipping, averaging
    bytes-DEVICE.csv       step.py: states and weights in fewer bytes
    optimizers-DEVICE.csv  step.py: some comparisons of every other optimizer
    sharded-DEVICE.csv     step.py: DTensors, gradients in bfloat16
    offload-DEVICE.csv     offload.py: models that lie in the host's memory
    scaling-DEVICE.csv     throughput/scaling.py: time over the number and the size of tensors
    share-DEVICE.csv       throughput/share.py: the optimizer's share of fine-tuning
    run.log                with --out: all output
    README.md              throughput/pages.py: all of it in tables; without --out, pictures, too

and on a GPU, with its parts in the order of their worth:

    check                  builds; python -m fastopt; pytest -m gpu; compute-sanitizer
    bench                  step-, bytes-, around-, sharded-, optimizers- and scaling-cuda.csv
    tune                   tune-cuda.csv, .md: throughput/tune.py, which variant is best where
    finetune               share-cuda.csv; with --cache finetune-TASK-cuda.json, .png: finetune.py
    profile                profile-cuda.csv, profile-raw-cuda.csv: throughput/profile.py, by ncu

    python bench/run.py bench
    python bench/run.py gpu --part check bench --out DIR --cache DIR
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import itertools
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
from throughput.rivals import AUTHORS, CONTENDERS, FOREACH, FUSED, INSIDE, OURS

BENCH = machine.ROOT / "bench"
BUILD = machine.ROOT / "build" / "gpu"  # `make gpu` has it in PYTHONPATH


@dataclass(frozen=True)
class Program:
    """One program.

    Args:
        limit: seconds after which it is ended.
        keeps: files it leaves elsewhere, and where they belong.
        appends: a file to which several programs append; the first is to find none.
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

# Of whole training steps; what cannot run somewhere says so in its row.
IN_TRAINING = [
    *(FUSED, OURS, f"{OURS}{INSIDE}", f"fastopt 8-bit states{INSIDE}"),
    *(f"fastopt split, 8-bit states{INSIDE}", "bitsandbytes 8-bit", "FlashOptim", "torchao 8-bit"),
]

# By default options; Adam and SGD have parts of their own.
OTHERS = [name for name in OPTIMIZERS if name.isalpha() and name not in ("adam", "adamw", "sgd")]


def bench_parts(args: argparse.Namespace) -> Iterator[Program]:
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
    yield scaling(args)
    tuning = ["--device", args.device, *cached(args), "--csv", args.to / f"share-{args.device}.csv"]
    yield Program("share of fine-tuning", python("-m", "throughput.share", *tuning), 150)


def check(args: argparse.Namespace) -> Iterator[Program]:
    """Does it build, and is what only a GPU can show as it is to be?"""
    # Only these files: others may need what such a machine lacks.
    marked = [f for f in machine.ROOT.glob("tests/test_*.py") if "mark.gpu" in f.read_text()]
    # Triton compiles a kernel for most cases: several processes share that, where they can.
    count = min(8, len(os.sched_getaffinity(0)))
    workers = ["-n", count] if importlib.util.find_spec("xdist") else []
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *sorted(marked)]
    once = [] if workers else ["--once"]
    yield Program("report", python("-m", "fastopt"), 60)
    yield Program(
        "tests of CUDA", python(*tests, *workers, "-k", "not triton and not sanitizer"), 150
    )
    yield Program("tests of Triton", python(*tests, *workers, *once, "-k", "triton"), 150)
    yield Program("compute-sanitizer", python(*tests, "-k", "sanitizer"), 120)


def gpu_bench(args: argparse.Namespace) -> Iterator[Program]:
    """How fast is a step? LoRA's tensors and 110 M parameters first, then formats, then what is
    around a step."""
    pair = ["--contender", OURS, FUSED]
    graph = [] if args.device == "cpu" else ["graph"]
    yield step(
        *(args, "LoRA and 110 M", 60, "--optimizer", "adamw", "sgd-momentum"),
        *(*pair, "fastopt triton"),
        workloads=["1000x16", "lora-bert", "lora-llama-7b", "bert-base", "llama-1b"],
    )
    yield step(
        *(args, "fewer bytes", 75, "--optimizer", "adamw", "--dtype", "float32", "bfloat16"),
        *("--contender", OURS, FUSED, *IN_FEWER_BYTES, "bitsandbytes 8-bit", "FlashOptim"),
        csv="bytes",
        workloads=["lora-bert", "bert-base", "llama-1b"],
    )
    yield step(
        *(args, "around a step", 60, "--optimizer", "adamw", *pair, "--situation", *AROUND),
        csv="around",
        workloads=["1000x16", "lora-bert", "bert-base"],
    )
    yield step(
        *(args, "situations", 60, "--optimizer", "adamw", *pair, "fastopt triton"),
        *("--situation", *graph, "scaler", "fresh", "first", "backward"),
        workloads=["1000x16", "lora-bert", "bert-base"],
    )
    yield step(
        *(args, "DTensors", 60, "--optimizer", "adamw", "--contender", OURS, FUSED, FOREACH),
        *("--situation", "sharded", "bfloat16 gradients"),
        csv="sharded",
        workloads=["1000x16", "300x4096"],
    )
    sizes = ["25M"] if args.dry_run else ["25M", "110M"]
    yield offload(args, 60, "--size", *sizes, "--patience", "20")
    yield step(args, "every rival", 120, "--optimizer", "adamw")
    yield step(
        *(args, "every other optimizer", 60, "--optimizer", *OTHERS),
        *("--contender", OURS, FUSED, FOREACH, "torch loop", AUTHORS),
        csv="optimizers",
        workloads=["1000x16", "lora-bert", "8x4M"],
    )
    yield scaling(args)


def tune(args: argparse.Namespace) -> Iterator[Program]:
    """Which variant of the kernels is best where?"""
    sink = args.to / f"tune-{args.device}.csv"
    timing = ["--device", args.device, "--seconds", args.seconds, "--csv", sink]
    chosen = ["--workload", *args.workload] if args.workload else []
    yield Program("variants", python("-m", "throughput.tune", *timing, *chosen), 440)


def finetuning(args: argparse.Namespace) -> Iterator[Program]:
    """What does it do to training steps? And, where there are model and data, to losses?"""
    sink = args.to / f"share-{args.device}.csv"
    common = ["--device", args.device, *cached(args), "--csv", sink]
    weights = [] if args.cache else ["--random"]
    jobs = ["--job", "topics full", "topics lora", "dialogue full"]
    whole = ["-m", "throughput.share", *common, *weights, *jobs, "--contender", *IN_TRAINING]
    dry = ["--tiny", "--steps", "4"] if args.dry_run else []
    yield Program("training steps", python(*whole, *dry), 240)
    if args.cache:
        yield finetune(args, "topics")
        yield finetune(args, "topics", "--tuning", "lora", "--lr", "1e-3", "--steps", "40")


def profile(args: argparse.Namespace) -> Iterator[Program]:
    """What bounds each kernel?"""
    sink = args.to / f"profile-{args.device}.csv"
    chosen = ["--workload", args.workload[0]] if args.workload else []
    options = ["--device", args.device, "--csv", sink, *chosen]
    yield Program("ncu", python("-m", "throughput.profile", *options), 440)


# In the order of their worth.
GPU_PARTS = {
    "check": check,
    "bench": gpu_bench,
    "tune": tune,
    "finetune": finetuning,
    "profile": profile,
}


def build(args: argparse.Namespace) -> Program:
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    command = python("-m", "pip", "install", *offline, "--target", BUILD, "--upgrade", machine.ROOT)
    return Program("build", command, 240)


def gpu_parts(args: argparse.Namespace) -> Iterator[list[Program]]:
    """For a machine with a GPU and no network."""
    for i, name in enumerate(args.part):
        # The CPU's dry run takes what is installed.
        first = [build(args)] if i == 0 and args.device == "cuda" else []
        yield [*first, *GPU_PARTS[name](args)]


def scaling(args: argparse.Namespace) -> Program:
    sink = args.to / f"scaling-{args.device}.csv"
    timing = ["--device", args.device, "--seconds", args.seconds, "--csv", sink]
    dry = ["--up-to", "1000"] if args.dry_run else []
    return Program("scaling", python("-m", "throughput.scaling", *timing, *dry), 150)


def finetune(args: argparse.Namespace, task: str, *options: str) -> Program:
    left = Path(tempfile.mkdtemp())
    name = "-".join(["finetune", task, *options[1:2], args.device])
    keeps = {
        left / "report.json": args.to / f"{name}.json",
        left / "losses.png": args.to / f"{name}.png",
    }
    command = python(BENCH / "finetune.py", task, *options, "--out", left, *cached(args))
    return Program(name, command, 120, keeps)


def cached(args: argparse.Namespace) -> list[Any]:
    return ["--cache", args.cache] if args.cache else []


def step(
    args: argparse.Namespace,
    name: str,
    limit: float,
    *options: str,
    csv: str = "step",
    workloads: Sequence[str] = (),
) -> Program:
    """A run of step.py, whose rows are appended to those of the others."""
    sink = args.to / f"{csv}-{args.device}.csv"
    chosen = ["--device", args.device, "--seconds", args.seconds, "--csv", sink, "--append"]
    if wanted := args.workload or workloads:
        chosen += ["--workload", *wanted]
    return Program(name, python(BENCH / "step.py", *chosen, *options), limit, appends=sink)


def offload(args: argparse.Namespace, limit: float, *options: str) -> Program:
    sink = args.to / f"offload-{args.device}.csv"
    chosen = ["--device", args.device, "--seconds", args.seconds, "--csv", sink]
    return Program("offloaded", python(BENCH / "offload.py", *chosen, *options), limit)


def tables(args: argparse.Namespace) -> Program:
    return Program("tables", python("-m", "throughput.pages", "--results", args.to), 60)


def python(*arguments: Any) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def run(program: Program, limit: float, log: BinaryIO) -> str:
    """Its outcome: `passed`, or how it ended."""
    process = subprocess.Popen(
        program.command,
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
    programs: Sequence[Program], seconds: float, log: BinaryIO, save: Callable[[list[Any]], None]
) -> list[dict[str, Any]]:
    """Each program's outcome, saved after each: whoever ends this one loses little.

    Args:
        seconds: for all of them; what is left of them when one begins limits it, too.
    """
    end = time.perf_counter() + seconds
    outcomes: list[dict[str, Any]] = []
    for program in programs:
        start = time.perf_counter()
        limit = min(program.limit, end - start)
        print(f"\n== {program.name}: at most {limit:.0f} s", flush=True)
        outcome = run(program, limit, log) if limit > 0 else "not run: no time left"
        for source, target in program.keeps.items():
            if source.exists():
                shutil.move(source, target)
        took = round(time.perf_counter() - start, 1)
        outcomes.append({"name": program.name, "outcome": outcome, "seconds": took})
        print(f"== {program.name}: {outcome}, {took} s", flush=True)
        save(outcomes)
    return outcomes


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to believe the figures, and to repeat them."""
    found = {
        "machine": asked(f"import machine; print(machine.device_name({device!r}))"),
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
    }
    if device == "cuda":
        capability = asked("import torch; print(*torch.cuda.get_device_capability(), sep='.')")
        found |= {"cuda": torch.version.cuda, "driver": driver(), "capability": capability}
    return found


def asked(code: str) -> str:
    """What a process prints that is not this one, which is to hold no memory of a GPU's."""
    command = python("-c", code)
    said = subprocess.run(command, cwd=BENCH, stdout=subprocess.PIPE, text=True, check=True)
    return said.stdout.strip()


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
    parser.add_argument(
        "--part",
        nargs="+",
        choices=list(GPU_PARTS),
        default=list(GPU_PARTS),
        metavar="PART",
        help=f"gpu only: of {', '.join(GPU_PARTS)}; default: all, in this order",
    )
    parser.add_argument("--minutes", type=float, help="for each part; default: bench 20, gpu 7.5")
    parser.add_argument("--seconds", type=float, help="a comparison; default: bench 2, gpu 0.3")
    parser.add_argument("--workload", nargs="+", help="in place of every workload")
    parser.add_argument(
        "--dry-run", action="store_true", help="gpu only: all programs, on next to nothing"
    )
    args = parser.parse_args(argv)
    gpu = args.plan == "gpu"
    args.device = args.device or ("cuda" if gpu else "cpu")
    args.minutes = args.minutes or (7.5 if gpu else 20)
    args.seconds = args.seconds or (0.3 if gpu else 2)
    args.to = (args.out or machine.RESULTS).resolve()
    args.cache = args.cache and args.cache.resolve()
    if args.dry_run:
        args.workload, args.seconds = ["one-tiny"], 0.01
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    args.to.mkdir(parents=True, exist_ok=True)
    known = facts(args.device)
    title = re.sub(r"[^a-z0-9]+", "-", known["machine"].lower())
    # Parts that run by themselves leave what those before them have left.
    chosen = "" if args.part == list(GPU_PARTS) else "".join(f"-{name}" for name in args.part)
    report = args.to / f"{title}-{known['date']}{chosen}.json"

    def save(outcomes: list[dict[str, Any]]) -> None:
        found = {**known, "fastopt": machine.version("fastopt"), "parts": outcomes}
        report.write_text(json.dumps(found, indent=2) + "\n")

    # Code for all GPUs would take five times as long to build.
    if capability := known.get("capability"):
        os.environ.setdefault("FASTOPT_CUDA_ARCHITECTURES", capability.replace(".", ""))
    plan = {"bench": lambda args: [list(bench_parts(args))], "gpu": gpu_parts}[args.plan]
    groups = list(plan(args))
    for program in itertools.chain(*groups):
        if program.appends:
            program.appends.unlink(missing_ok=True)
    # Programs look for ncu and compute-sanitizer there, too.
    if nvcc := machine.cuda_tool("nvcc"):
        os.environ["PATH"] += os.pathsep + str(Path(nvcc).resolve().parent)
    outcomes: list[dict[str, Any]] = []

    def save_with(new: list[Any]) -> None:
        save([*outcomes, *new])

    with (args.to / f"run{chosen}.log" if args.out else Path(os.devnull)).open("wb") as log:
        for programs in groups:
            outcomes.extend(run_all(programs, 60 * args.minutes, log, save_with))
        outcomes.extend(run_all([tables(args)], math.inf, log, save_with))
    print("\n" + "\n".join("{seconds:7.1f} s  {name}: {outcome}".format_map(o) for o in outcomes))
    print(f"written: {report}")
    return 0 if all(o["outcome"] == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
