"""Run bench/finetune.py on every task, and put what came of it on one page.

    make finetune-all
    make finetune-all ARGS="ner-zh images-sgd"

Runs are named as in `RUNS` and leave what they write in runs/NAME; figures, tables and pictures of
those that finished are kept in bench/results/finetune. The page made of these,
bench/results/finetune.md, has every run that was ever kept there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, ROOT

from .page import page, summary

SCRIPT = ROOT / "bench" / "finetune.py"
PAGE, KEPT = RESULTS / "finetune.md", RESULTS / "finetune"
OUT = Path("runs")
# The network's gradients are long: at Trainer's norm of 1, SGD would hardly move. At a rate of 0.01
# it learns more, but amplifies a last bit until torch's own foreach and fused steps part by 0.2.
SGD = ("--lr", "0.003", "--max-grad-norm", "10")
# The sensible choice for a model in bfloat16, beside torch's AdamW in float32.
NARROW = (
    *("--precision", "bf16-true", "--optimizer", 'fastopt.AdamW:states="8bit",weights="split"'),
    *("--against-precision", "fp32"),
)
FLOAT32 = {
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
    "multimodal": ["multimodal"],
    "recommend": ["recommend"],
    "translation": ["translation"],
    "translation-es": ["translation", "--pair", "en-es", "--steps", "24"],
    "dialogue": ["dialogue"],
}
# Where a processor has no instructions for bfloat16, transformers take ten times as long and more.
RUNS = FLOAT32 | {
    f"{name}-8bit-seed-{seed}": [*FLOAT32[name], *NARROW, "--seed", str(seed)]
    for name in ("topics", "ner", "dialogue", "images-resnet")
    for seed in range(3)
}
# What is then done with the models of two runs: the program, and the made-up lines it reads.
PROGRAMS = {
    "sentiment-editorials": (["sentiment", "--monitor", "-"], "headlines.jsonl"),
    "dialogue": (["dialogue", "--chat"], "questions.txt"),
}
EXAMPLES = Path(__file__).parent / "tasks" / "examples"


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
        if run(name):
            keep(name)
            PAGE.write_text(page(kept()), encoding="utf-8")
        else:
            failed.append(name)
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


def keep(name: str) -> None:
    """Leave of a finished run what the page is made of."""
    out = OUT / name
    shown = [(shlex.join(RUNS[name]), out / "table.txt")]
    if name in PROGRAMS:
        program, example = PROGRAMS[name]
        command = f"{shlex.join(program)} --out {out} < {(EXAMPLES / example).relative_to(ROOT)}"
        shown.append((command, transcript(name)))
    run = {
        "figures": summary(json.loads((out / "report.json").read_text())),
        "shown": [(command, file.read_text("utf-8").splitlines()) for command, file in shown],
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    text = json.dumps(run, indent=1, ensure_ascii=False)
    (KEPT / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    shutil.copy(out / "losses.png", KEPT / f"{name}.png")


def kept() -> dict[str, dict[str, Any]]:
    files = {name: KEPT / f"{name}.json" for name in RUNS}
    return {
        name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()
    }


if __name__ == "__main__":
    sys.exit(main())
