"""Which variant of the CUDA kernels is best, and where?

Each variant is a build, or a run, under other settings of the environment. Each measures the same
comparisons against torch's fused step, beside which it steps in the same rounds: variants are
compared by how many times as fast as that they are. The table beside the CSV says which is best at
each, and which are so within the spread of the rounds.

    cd bench && python -m throughput.tune --device cuda --csv tune-cuda.csv
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import machine

from .measure import Row
from .rivals import FUSED, OURS
from .rows import COLUMNS, read
from .tables import markdown, measured_on, time
from .workloads import WORKLOADS

BUILDS = machine.ROOT / "build" / "tune"


@dataclass(frozen=True)
class Variant:
    """Settings of the environment.

    Args:
        build: under which the core is built; none for the core that is in use.
        run: under which it is measured.
    """

    build: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)


def built_with(**choices: int) -> Variant:
    """Only what is measured here, which takes a fraction of the time to build."""
    chosen = ";".join(["RULES=adam+sgd", *(f"{name}={value}" for name, value in choices.items())])
    return Variant(build={"FASTOPT_CUDA_TUNE": chosen})


def run_with(names: str) -> Variant:
    return Variant(run={"FASTOPT_CUDA_VARIANT": names})


# What csrc/cuda/tuning.h has to choose from.
AS_IS = "as it is"
VARIANTS = {
    AS_IS: Variant(),
    "overlap": run_with("overlap"),
    "few": run_with("few"),
    "overlap, few": run_with("overlap,few"),
    "32 bytes": built_with(BYTES=32),
    "128 bytes": built_with(BYTES=128),
    "192 bytes": built_with(BYTES=192),
    "128 threads": built_with(THREADS=128),
    "512 threads": built_with(THREADS=512),
    "128 bytes, 512 threads": built_with(BYTES=128, THREADS=512),
}

# Options of step.py: what each build measures, in which memory is the limit; and each run, in which
# launches are.
MEMORY = [
    ["--optimizer", "adamw", "sgd-momentum", "sgd", "--workload", "8x4M", "bert-base", "llama-1b"],
    [
        *("--optimizer", "adamw", "--dtype", "bfloat16", "--workload", "bert-base", "--contender"),
        *(OURS, FUSED, "fastopt split", "fastopt split, 8-bit states"),
    ],
    [
        *("--optimizer", "adamw", "--workload", "bert-base", "--contender"),
        *(OURS, FUSED, "fastopt bfloat16 states", "fastopt 8-bit states"),
    ],
]
LAUNCHES = [
    ["--optimizer", "adamw", "--workload", "1000x16", "lora-bert", "one-tiny"],
    ["--optimizer", "adamw", "--situation", "graph", "clip", "--workload", "1000x16", "lora-bert"],
]
SITUATION = ["optimizer", "dtype", "situation", "workload", "contender"]
RUN_ALL = "import json, step, sys; sys.exit(max(map(step.main, json.load(sys.stdin))))"


def build(name: str, variant: Variant, cores: int) -> Path:
    """Where the core lies that is built so; in a folder of its own, beside others that build."""
    import pybind11

    target = BUILDS / name.replace(", ", "-").replace(" ", "-")
    objects = target / "objects"
    common = ("FASTOPT_CUDA", "FASTOPT_CUDA_ARCHITECTURES")
    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_INSTALL_PREFIX": target / "fastopt",
        **{option: os.environ[option] for option in common if option in os.environ},
        **variant.build,
    }
    shutil.copytree(
        machine.ROOT / "fastopt",
        target / "fastopt",
        ignore=shutil.ignore_patterns("*.so"),
        dirs_exist_ok=True,
    )
    defines = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        ["cmake", "-S", machine.ROOT, "-B", objects, "-G", "Ninja", *defines],
        ["cmake", "--build", objects, "--target", "install", "--parallel", str(cores)],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} did not build:\n{done.stdout[-2000:]}")
    return target


def measure(variant: Variant, built: Path | None, args: argparse.Namespace) -> list[Row]:
    """The rows of every comparison that ended, from a process of its own."""
    folder = Path(tempfile.mkdtemp())
    sink = folder / "rows.csv"
    common = ["--device", args.device, "--seconds", str(args.seconds), "--csv", str(sink)]
    asked = [[*options, *common, "--append"] for options in comparisons(variant, args)]
    environment = os.environ | variant.run
    if built is not None:
        others = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{built}{os.pathsep}{others}" if others else str(built)
    subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(asked),
        text=True,
        cwd=machine.ROOT / "bench",
        env=environment,
    )
    return read(sink) if sink.exists() else []


def comparisons(variant: Variant, args: argparse.Namespace) -> list[list[str]]:
    """On a CPU, which is for dry runs, without graphs; and the workloads that are asked for."""
    found = []
    for options in [*([] if variant.run else MEMORY), *([] if variant.build else LAUNCHES)]:
        own = list(options)
        if args.device == "cpu" and "graph" in own:
            own.remove("graph")
        if "--contender" not in own:
            own += ["--contender", OURS, FUSED]
        if args.workload:
            own += ["--workload", *args.workload]  # the last counts
        found.append(own)
    return found


def best_table(rows: list[Row]) -> str:
    """Each comparison's ratios by variant, the best of them in bold, and those that come as near to
    it as its rounds lie apart."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    good = [row for row in rows if row["ratio"] and row["contender"] != row["reference"]]
    lines = []
    for key in dict.fromkeys(tuple(row[column] for column in SITUATION) for row in good):
        own = {r["variant"]: r for r in good if tuple(r[column] for column in SITUATION) == key}
        best = max(own.values(), key=lambda row: float(row["ratio"]))
        cells = []
        for name in names:
            row = own.get(name)
            text = "" if row is None else f"{row['ratio']}x, {time(row)} ms"
            as_good = row is not None and float(row["ratio"]) >= float(best["ratio_p20"])
            cells.append(f"**{text}**" if as_good else text)
        optimizer, dtype, situation, workload, contender = key
        what = f"{contender}, {optimizer}, {dtype}"
        lines.append([what, situation, WORKLOADS[workload].title, best["variant"], *cells])
    return markdown(["", "situation", "", "best", *names], lines)


def page(rows: list[Row]) -> str:
    return (
        "# Variants of the CUDA kernels\n\n"
        f"{measured_on(rows)}. Times as fast as torch's fused step in the same rounds, and "
        "milliseconds; in bold what is as good as the best, given the spread of its rounds.\n\n"
        f"{best_table(rows)}\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=0.3, help="a comparison; %(default)s")
    parser.add_argument("--workload", nargs="+", help="in place of each comparison's own")
    parser.add_argument("--csv", type=Path, metavar="FILE", required=True)
    args = parser.parse_args(argv)
    chosen = {name: VARIANTS[name] for name in args.variant}
    if args.device == "cpu":  # there is nothing to build
        chosen = {name: variant for name, variant in chosen.items() if not variant.build}
    rows: list[Row] = []
    failed = False
    own = {name: variant for name, variant in chosen.items() if variant.build}
    cores = max(1, len(os.sched_getaffinity(0)) // max(1, len(own)))
    with concurrent.futures.ThreadPoolExecutor(max(1, len(own))) as pool:
        builds = {name: pool.submit(build, name, variant, cores) for name, variant in own.items()}
        concurrent.futures.wait(builds.values())  # it would slow down what is measured
    for name, variant in chosen.items():
        try:
            built = builds[name].result() if name in builds else None
        except (RuntimeError, ImportError, OSError) as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        print(f"== {name}", flush=True)
        found = measure(variant, built, args)
        failed |= not found
        rows += [{"variant": name, **row} for row in found]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["variant", *COLUMNS])
            writer.writeheader()
            writer.writerows(rows)
    if rows:
        args.csv.with_suffix(".md").write_text(page(rows))
        print(best_table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
