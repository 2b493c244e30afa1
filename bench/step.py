"""How fast is one optimizer step, beside everything else and beside the memory's limit?

The contenders step in turn, round after round, in one process, so that what disturbs one disturbs
the others. Times are medians over the rounds; a ratio is the median of each round's ratio. Where
memory is what bounds a step, the ceiling is measured in the same rounds: on a CPU as many threads
stream the same arrays with next to no arithmetic; on a GPU each contender's own tensors are read
and written as they are, in the launch shape of our update.

    python bench/step.py
    python bench/step.py --workload lora-bert --contender "torch compile"
    python bench/step.py --situation clip fresh --csv new.csv --compare old.csv

Columns of the CSV: median, p20 and p80 until the device has finished; host, until step() has
returned; device, what a GPU is busy for; GB/s, the bytes that such a step moves at least (all read,
all but the gradient written) over its time; ceiling_share and peak_share, of what streaming reaches
and of what a GPU's memory could by its clock and bus, where the driver tells them; step_peak_mb,
memory in use during a step beyond parameters, gradients and states; ratio, how many times as fast
as the reference; skipped, the reason where a contender could not run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from throughput.measure import DTYPES, OPTIMIZERS, TOO_LARGE, Setting, measure, refuse_fallbacks
from throughput.rivals import CONTENDERS, OURS
from throughput.rows import Results, read, regressions, table
from throughput.situations import SITUATIONS
from throughput.workloads import WORKLOADS


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [name for name, c in CONTENDERS.items() if not (c.compiles or c.offloads)]

    def choice(flag: str, choices: Iterable[str], default: Sequence[str], text: str) -> None:
        parser.add_argument(
            flag,
            choices=list(choices),
            default=default,
            nargs="+",
            metavar="NAME",
            help=f"default: {text}",
        )

    choice("--workload", WORKLOADS, list(WORKLOADS), "all of them")
    choice(
        *("--contender", CONTENDERS, usual),
        "all that neither compile at the first step nor offload",
    )
    choice("--optimizer", OPTIMIZERS, ["adamw", "sgd-momentum"], "adamw and sgd-momentum")
    choice("--situation", SITUATIONS, ["plain"], "plain")
    choice("--dtype", DTYPES, ["float32"], "float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=4, help="of rounds for each comparison; %(default)s"
    )
    parser.add_argument(
        "--patience", type=float, default=100, help="seconds of warm-up at most; %(default)s"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="exit code 1 if ours is slower than in it"
    )
    args = parser.parse_args(argv)
    if "graph" in args.situation and args.device == "cpu":
        parser.error("--situation graph needs --device cuda")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    refuse_fallbacks()
    old = read(args.compare) if args.compare else []
    results = Results(args.csv, args.device, args.append)
    print("{machine}, torch {torch}, commit {commit}".format_map(results.facts))
    comparisons = itertools.product(args.optimizer, args.situation, args.dtype, args.workload)
    with tqdm(list(comparisons), unit="comparison") as bar:
        for optimizer, situation, dtype, workload in bar:
            bar.set_description(f"{workload} {optimizer} {situation}")
            setting = Setting(
                WORKLOADS[workload].shapes(), optimizer, situation, dtype, args.device
            )
            for row in measure(setting, args.contender, args.seconds, args.patience):
                results.add(workload, setting, row)
    print(table(results.rows))
    slower = regressions(results.rows, old)
    for line in slower:
        print(f"slower: {line}")
    failed = [
        row
        for row in results.rows
        if row["contender"] == OURS and row["skipped"] and not row["skipped"].startswith(TOO_LARGE)
    ]
    return 1 if slower or failed else 0


if __name__ == "__main__":
    sys.exit(main())
