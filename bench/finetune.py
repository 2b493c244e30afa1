"""Fine-tune one pretrained model twice, each time with another optimizer, and compare.

Both runs start from the same weights and go through the same Hugging Face `Trainer` with the same
seed: same batches in the same order, same dropout. What differs is the optimizer. The default,
`topics`, trains MiniLM-L6 (22.7 M parameters) on BBC News: 70 steps of 16 texts for each
optimizer, 2 to 4 minutes on two cores.

    python bench/finetune.py
    python bench/finetune.py --model FOLDER_OR_NAME --dataset texts.csv --steps 200
    python bench/finetune.py --optimizer fastopt.SGD:momentum=0.9 --lr 0.05
    python bench/finetune.py TASK --help

OUT receives report.json, table.txt, losses.png, the trained model/, and checkpoints/, from which
--resume continues.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# cuBLAS reads this when CUDA starts; without it matrix products differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from transformers.utils.logging import disable_progress_bar

from finetuning.comparison import Comparison
from finetuning.report import picture, range_picture, suggested_rate, table
from finetuning.tasks import TASKS, TaskError, find
from finetuning.tasks.fetch import default_cache
from finetuning.tasks.options import number
from finetuning.tuning import METHODS


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # A task's own options are known only once the task is, which comes first.
    words = list(sys.argv[1:] if argv is None else argv)
    task = words[0] if words and words[0] in TASKS else TASKS[0]
    own = "default: the task's own"
    parser.add_argument("task", nargs="?", choices=TASKS, default=task)
    parser.add_argument("--model", help=f"folder or hub name of a Hugging Face model; {own}")
    task_class = find(task)
    columns = " and ".join(task_class.columns)
    parser.add_argument(
        "--dataset",
        help=f"CSV, TSV, JSON or JSONL file, or hub name, with columns {columns}; {own}",
    )
    task_class.add_options(parser.add_argument_group(f"only for {task}"))
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="DIR",
        help="start from the model that an earlier run left in DIR, and report what it forgets",
    )
    parser.add_argument(
        "--replay",
        type=number(float, 0),
        default=0.0,
        metavar="SHARE",
        help="mix in examples of DIR's data, so many times those of the new; %(default)s",
    )
    parser.add_argument("--optimizer", default="fastopt.AdamW", help="CLASS[:KEY=VALUE,...]")
    parser.add_argument(
        "--against",
        help="CLASS[:KEY=VALUE,...]; default: torch.optim's class of the same name, fused=True, "
        "as Trainer uses it",
    )
    parser.add_argument("--tuning", choices=METHODS, default=METHODS[0], help="%(default)s")
    parser.add_argument("--steps", type=number(int, 1), help=own)
    parser.add_argument("--batch-size", type=number(int, 1), help=own)
    parser.add_argument("--lr", type=number(float, 0), help=own)
    parser.add_argument(
        "--head-lr", type=number(float, 0), help=f"of the new head, where it has its own; {own}"
    )
    parser.add_argument("--weight-decay", type=number(float, 0), default=0.01, help="%(default)s")
    parser.add_argument(
        "--gradient-accumulation-steps",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="batches a step; %(default)s",
    )
    parser.add_argument(
        "--max-grad-norm",
        type=number(float, 0),
        default=1.0,
        metavar="NORM",
        help="clip gradients to it, 0 for never; %(default)s",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="%(default)s"
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="hold out the validation part, not the test part: choose rates and steps by it",
    )
    parser.add_argument(
        "--early-stop",
        type=number(int, 1),
        metavar="N",
        help="stop once the mean loss of N steps is hardly below that of the N before",
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="of dropout, data order and new weights"
    )
    parser.add_argument("--out", type=Path, help="folder to write to; default: runs/TASK")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="of models and data; %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="continue from OUT's checkpoints")
    parser.add_argument(
        "--report-to",
        choices=("tensorboard", "wandb", "none"),
        default="none",
        help="where Trainer sends losses as it goes; %(default)s",
    )
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="raise the learning rate step by step, draw the losses, suggest one, train no further",
    )
    options = parser.parse_args(argv)
    if options.task != task:
        parser.error(f"give the task first: {options.task}")
    options.out = options.out or Path("runs", options.task)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    disable_progress_bar()  # of single files read and written; those of the training stay
    try:
        status = find(options.task).program(options)
        if status is not None:
            return status
        comparison = Comparison(options)
        run = find_rate if options.find_lr else compare
        return run(comparison)
    except TaskError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return error.exit_code


def compare(comparison: Comparison) -> int:
    report = comparison.run()
    if comparison.processes.is_main_process:
        (comparison.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        picture(report, comparison.out / "losses.png")
        text = table(report, comparison.task)
        (comparison.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text)
        print(f"written: {comparison.out / 'report.json'}, {comparison.out / 'losses.png'}")
    return 0


def find_rate(comparison: Comparison) -> int:
    test = comparison.range_test()
    if comparison.processes.is_main_process:
        comparison.out.mkdir(parents=True, exist_ok=True)
        (comparison.out / "lr.json").write_text(json.dumps(test, indent=2) + "\n")
        range_picture(test, comparison.out / "lr.png")
        rate = suggested_rate(test)
        print(f"suggested: --lr {rate:.1e}" if rate else "no rate let the loss fall: more --steps")
        print(f"written: {comparison.out / 'lr.json'}, {comparison.out / 'lr.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
