"""Run bench/finetune.py on every task, and put what came of it on one page.

    python bench/finetune_all.py
    python bench/finetune_all.py ner-zh images-sgd

Runs are named as in `RUNS`; a page of all runs that have finished so far, with their pictures, is
written to bench/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from report import page

SCRIPT = Path(__file__).with_name("finetune.py")
RESULTS = Path(__file__).with_name("results")
PAGE = RESULTS / "finetune.md"
RUNS = {
    "topics": ["topics"],
    "topics-lora": ["topics", "--tuning", "lora", "--lr", "1e-3", "--steps", "40"],
    "sentiment": ["sentiment"],
    "sentiment-zh": ["sentiment", "--language", "zh"],
    "ner": ["ner"],
    "ner-zh": ["ner", "--language", "zh"],
    "images": ["images"],
    "images-sgd": ["images", "--optimizer", "fastopt.SGD:momentum=0.9", "--lr", "0.05"],
    "images-resnet": ["images", "--network", "resnet", "--data", "digits"],
    "recommend": ["recommend"],
    "translation": ["translation"],
    "translation-es": ["translation", "--pair", "en-es", "--steps", "30"],
    "dialogue": ["dialogue"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder; %(default)s")
    options = parser.parse_args()
    unknown = set(options.names) - RUNS.keys()
    if unknown:
        parser.error(f"no run is called {', '.join(sorted(unknown))}")

    failed = []
    for name in options.names or RUNS:
        out = options.runs / name
        shutil.rmtree(out, ignore_errors=True)  # of a run that fails, nothing older is shown
        print(f"== {name}", flush=True)
        command = [sys.executable, str(SCRIPT), *RUNS[name], "--out", str(out)]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        write_page(options.runs)
    print(f"written: {PAGE}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def write_page(runs: Path) -> None:
    finished = {}
    for name, arguments in RUNS.items():
        out = runs / name
        if (out / "report.json").is_file():
            report = json.loads((out / "report.json").read_text())
            finished[name] = (arguments, report, (out / "table.txt").read_text("utf-8"))
            shutil.copy(out / "losses.png", RESULTS / f"finetune-{name}.png")
    PAGE.write_text(page(finished), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
