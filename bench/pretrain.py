"""Does training reach the same held-out loss where states and weights are kept in fewer bits?

A small GPT-2 learns BBC News (finetuning/tasks/topics.py) from scratch, once for each contender,
betas and seed. With one seed all start from the same weights and see the same batches.

    python bench/pretrain.py                  78 runs, an hour on one thread
    python bench/pretrain.py --continue       the rest of them, and what was skipped
    python bench/pretrain.py --contender "torch, float32" "fastopt, split" --seeds 0

DIR receives formats.md, formats.png and formats.csv, a row for each run. Columns of the CSV:
diverged, the step whose loss was not finite, where training ended; kept_bytes_per_param, parameter,
gradient and states; skipped, the reason where a contender could not run.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import machine
from finetuning.tasks import TaskError
from finetuning.tasks.fetch import default_cache
from finetuning.tasks.options import number
from pretraining.page import differences, page
from pretraining.training import FORMATS, Betas, Data, load, train
from throughput import plots, rivals
from throughput.measure import Row, reason, refuse_fallbacks
from throughput.rows import measured, read

KEY = ["contender", "betas", "seed", "steps"]
COLUMNS = [
    *KEY,
    *("held_out_loss", "diverged", "kept_bytes_per_param", "elements", "seconds"),
    *("skipped", "version", "machine", "torch", "commit"),
]


def run_all(args: argparse.Namespace, data: Data, results: Path) -> list[Row]:
    """The rows that were there, if they are to stay, and those of every run that is yet missing.

    They are written as they come: what ends the program loses none of them.
    """
    rows = measured(read(results)) if args.resume and results.exists() else []
    done = {tuple(row[column] for column in KEY) for row in rows}
    runs = [
        (name, betas, seed)
        for seed, betas, name in itertools.product(args.seeds, args.betas, args.contender)
        if key(name, betas, seed, args.steps) not in done
    ]
    facts = machine.facts("cpu")
    results.parent.mkdir(parents=True, exist_ok=True)
    with (
        results.open("w", newline="") as sink,
        tqdm(total=len(runs) * args.steps, unit="step") as bar,
    ):
        writer = csv.DictWriter(sink, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        sink.flush()
        for count, (name, betas, seed) in enumerate(runs, start=1):
            bar.set_description(f"{name}; {written(betas)}; seed {seed}")
            kept = FORMATS[name]
            try:
                figures = train(kept, betas, seed, args.steps, data, bar.update)
            except Exception as error:  # a rival's own: whatever it is, the others go on
                figures = {"skipped": reason(error)}
            named = dict(zip(KEY, key(name, betas, seed, args.steps), strict=True))
            version = {"version": rivals.CONTENDERS[kept.rival].version()}
            rows.append(dict.fromkeys(COLUMNS, "") | named | figures | version | facts)
            writer.writerow(rows[-1])
            sink.flush()
            bar.update(count * args.steps - bar.n)
    return rows


def key(name: str, betas: Betas, seed: int, steps: int) -> tuple[str, ...]:
    return name, written(betas), str(seed), str(steps)


def written(betas: Betas) -> str:
    return f"{betas[0]:g},{betas[1]:g}"


def parse_betas(text: str) -> Betas:
    parse = number(float, 0)
    first, second = (parse(part) for part in text.split(","))
    return first, second


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--contender",
        choices=list(FORMATS),
        default=list(FORMATS),
        nargs="+",
        metavar="NAME",
        help="default: all of them",
    )
    parser.add_argument(
        "--betas",
        type=parse_betas,
        default=[(0.9, 0.999), (0.9, 0.95)],
        nargs="+",
        metavar="B1,B2",
        help="default: 0.9,0.999 and 0.9,0.95",
    )
    parser.add_argument(
        "--seeds", type=number(int, 0), default=[0, 1, 2], nargs="+", metavar="N", help="0 1 2"
    )
    parser.add_argument("--steps", type=number(int, 1), default=2000, help="%(default)s")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="%(default)s")
    parser.add_argument(
        "--continue",
        dest="resume",
        action="store_true",
        help="keep the rows of DIR's formats.csv, and run what it lacks or has skipped",
    )
    parser.add_argument("--results", type=Path, metavar="DIR", default=machine.RESULTS)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of the data")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_options(argv)
    torch.set_num_threads(args.threads)
    refuse_fallbacks()
    try:
        data = load(args.cache)
    except TaskError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return error.exit_code
    results = args.results / "formats.csv"
    rows = run_all(args, data, results)
    text = page(rows)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    plots.save(differences, results, "formats")
    print(text)
    return int(any(row["skipped"] and FORMATS[row["contender"]].is_ours for row in rows))


if __name__ == "__main__":
    sys.exit(main())
