"""Fine-tune one pretrained model twice, each time with another optimizer, and compare.

Both runs start from the same weights and go through the same Hugging Face `Trainer` with the same
seed: same batches in the same order, same dropout. What differs is the optimizer, and if you say
so the precision. The default, `topics`, trains MiniLM-L6 (22.7 M parameters) on BBC News: 70 steps
of 16 texts for each optimizer, 2 to 4 minutes on two cores.

    python bench/finetune.py
    python bench/finetune.py --model FOLDER_OR_NAME --dataset texts.csv --steps 200
    python bench/finetune.py --optimizer fastopt.SGD:momentum=0.9 --lr 0.05
    python bench/finetune.py --precision bf16-true --against-precision fp32 \\
        --optimizer 'fastopt.AdamW:states="8bit",weights="split"'
    torchrun --nproc-per-node=2 bench/finetune.py TASK --shard fsdp2
    python bench/finetune.py TASK --help

OUT receives report.json, table.txt, losses.png, the trained model/, and checkpoints/, from which
--resume continues.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

# cuBLAS reads this when CUDA starts; without it matrix products differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from transformers.utils.logging import disable_progress_bar

from finetuning import learning_rate, report
from finetuning.comparison import compare
from finetuning.options import parse_options
from finetuning.setup import Setup
from finetuning.tasks import TaskError, find


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv, __doc__)
    disable_progress_bar()  # of single files read and written; those of the training stay
    try:
        status = find(options.task).program(options)
        if status is not None:
            return status
        setup = Setup(options)
        if options.find_lr:
            find_rate(setup)
        else:
            write_comparison(setup)
    except TaskError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write_comparison(setup: Setup) -> None:
    found = compare(setup)
    if setup.processes.is_main_process:
        (setup.out / "report.json").write_text(json.dumps(found, indent=2) + "\n")
        report.picture(found, setup.out / "losses.png")
        text = report.table(found, setup.task)
        (setup.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text)
        print(f"written: {setup.out / 'report.json'}, {setup.out / 'losses.png'}")


def find_rate(setup: Setup) -> None:
    """A range test, which leaves what training has left in OUT as it is."""
    losses = learning_rate.range_test(setup)
    if setup.processes.is_main_process:
        setup.out.mkdir(parents=True, exist_ok=True)
        (setup.out / "lr.json").write_text(json.dumps(losses, indent=2) + "\n")
        learning_rate.picture(losses, setup.out / "lr.png")
        rate = learning_rate.suggested(losses)
        print(f"suggested: --lr {rate:.1e}" if rate else "no rate let the loss fall: more --steps")
        print(f"written: {setup.out / 'lr.json'}, {setup.out / 'lr.png'}")


if __name__ == "__main__":
    sys.exit(main())
