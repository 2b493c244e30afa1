"""Run bench/finetune.py on every task, and put what came of it on one page.

    make finetune-all
    make finetune-all ARGS="ner-zh images-sgd"

Runs are named as in `RUNS` and leave what they write in runs/NAME. A page of all runs that have
finished so far, with their pictures, is written to bench/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, ROOT

from .report import batch

SCRIPT = ROOT / "bench" / "finetune.py"
PAGE = RESULTS / "finetune.md"
OUT = Path("runs")
# The network's gradients are long: at Trainer's norm of 1, SGD would hardly move. At a rate of 0.01
# it learns more, but amplifies a last bit until torch's own foreach and fused steps part by 0.2.
SGD = ("--lr", "0.003", "--max-grad-norm", "10")
RUNS = {
    "topics": ["topics"],
    "topics-lora": ["topics", "--tuning", "lora", "--lr", "1e-3", "--steps", "40"],
    "sentiment": ["sentiment"],
    "sentiment-editorials": [
        *("sentiment", "--domain", "editorials", "--continue-from", str(OUT / "sentiment")),
        *("--replay", "0.1", "--steps", "60"),
    ],
    "sentiment-zh": ["sentiment", "--language", "zh"],
    "ner": ["ner"],
    "ner-zh": ["ner", "--language", "zh"],
    "images": ["images"],
    "images-sgd": ["images", "--optimizer", "fastopt.SGD:momentum=0.9", *SGD],
    "images-resnet": ["images", "--network", "resnet", "--data", "digits"],
    "recommend": ["recommend"],
    "translation": ["translation"],
    "translation-es": ["translation", "--pair", "en-es", "--steps", "24"],
    "dialogue": ["dialogue"],
}
# What is then done with the models of two runs: the program, and the made-up lines it reads.
PROGRAMS = {
    "sentiment-editorials": (["sentiment", "--monitor", "-"], "headlines.jsonl"),
    "dialogue": (["dialogue", "--chat"], "questions.txt"),
}
EXAMPLES = Path(__file__).parent / "tasks" / "examples"

PAGE_INTRODUCTION = """\
# Fine-tuning, stock optimizer against ours

Made by `make finetune-all`. In every row both optimizers start from the same weights with the same
seed. Loss and metric are those of `fastopt`'s run on examples that took no part in choosing rates
or steps, the metric beside what the trivial answer scores; the loss difference is the largest
between the two runs at any step. Where it is not zero it begins in the last elements of a tensor,
which torch rounds in another way, and grows as far as the model lets it.

| run | trained | steps | held-out loss | metric | trivial | loss difference | \
optimizer, ms: torch | fastopt | share of the step |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    options = parser.parse_args()
    unknown = set(options.names) - RUNS.keys()
    if unknown:
        parser.error(f"no run is called {', '.join(sorted(unknown))}")

    began, failed = time.perf_counter(), []
    for name in options.names or RUNS:
        print(f"== {name}", flush=True)
        if not run(name):
            failed.append(name)
        write_page()
    print(f"written: {PAGE}, after {(time.perf_counter() - began) / 60:.0f} minutes")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def run(name: str) -> bool:
    """Train, then use the model; whether all went well."""
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)  # of a run that fails, nothing older is shown
    command = [sys.executable, str(SCRIPT)]
    if subprocess.run([*command, *RUNS[name], "--out", out], check=False).returncode != 0:
        return False
    if name in PROGRAMS:
        arguments, example = PROGRAMS[name]
        with (EXAMPLES / example).open("rb") as given, transcript(name).open("wb") as said:
            use = [*command, *arguments, "--out", out]
            return subprocess.run(use, stdin=given, stdout=said, check=False).returncode == 0
    return True


def transcript(name: str) -> Path:
    return OUT / name / "transcript.txt"


def write_page() -> None:
    finished = {}
    for name, arguments in RUNS.items():
        out = OUT / name
        if not (out / "report.json").is_file():
            continue
        report = json.loads((out / "report.json").read_text())
        outputs = [(arguments, (out / "table.txt").read_text("utf-8"))]
        if transcript(name).is_file():
            program, example = PROGRAMS[name]
            shown = [*program, "--out", str(out), "<", f"bench/finetuning/tasks/examples/{example}"]
            outputs.append((shown, transcript(name).read_text("utf-8")))
        finished[name] = (report, outputs)
        shutil.copy(out / "losses.png", RESULTS / f"finetune-{name}.png")
    PAGE.write_text(page(finished), encoding="utf-8")


def page(finished: dict[str, tuple[dict[str, Any], list[tuple[list[str], str]]]]) -> str:
    """Markdown of finished runs by name: the report of each, and what its commands printed.

    A command is given as its arguments to bench/finetune.py; the first is the training.
    """
    rows, sections = [], []
    for name, (report, outputs) in finished.items():
        first, second = report["runs"]
        start, end = (second["metrics"][when] for when in ("start", "end"))
        size, headline = report["parameters"], report["headline"]
        times = [run["optimizer_step_ms"]["median"] for run in (first, second)]
        rows.append(
            f"| [{name}](#{name}) "
            f"| {size['trained'] / 1e6:.3g} of {size['total'] / 1e6:.1f} M, "
            f"{size['trained_tensors']} tensors "
            f"| {len(second['losses'])} of {batch(report)} "
            f"| {start['loss']:.3f} to {end['loss']:.3f} "
            f"| {headline} {end[headline]:.3f} | {end['baseline'][headline]:.3f} "
            f"| {report['parity']['max_loss_diff']:.1e} "
            f"| {times[0]:.2f} | {times[1]:.2f} "
            f"| {times[1] / second['train_step_ms']['median']:.1%} |"
        )
        sections.append(f"\n## {name}\n\n![losses](finetune-{name}.png)\n")
        sections += [
            f"\n```\n$ python bench/finetune.py {' '.join(arguments)}\n{text}```\n"
            for arguments, text in outputs
        ]
    return PAGE_INTRODUCTION + "\n".join(rows) + "\n" + "".join(sections)


if __name__ == "__main__":
    sys.exit(main())
