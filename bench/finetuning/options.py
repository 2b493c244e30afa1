"""The command line of bench/finetune.py; what only one task understands, its module adds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .contenders import PRECISIONS
from .sharding import WAYS
from .tasks import TASKS, Task, find
from .tasks.fetch import default_cache
from .tasks.options import number
from .tuning import METHODS

OWN = "default: the task's own"
NARROW = 'fastopt.AdamW:states="8bit",weights="split"'


def parse_options(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # A task's own options are known only once the task is, which comes first.
    words = list(sys.argv[1:] if argv is None else argv)
    task = words[0] if words and words[0] in TASKS else TASKS[0]
    parser.add_argument("task", nargs="?", choices=TASKS, default=task)
    add_model_and_data(parser.add_argument_group("model and data"), find(task))
    find(task).add_options(parser.add_argument_group(f"only for {task}"))
    add_optimizers(parser.add_argument_group("optimizers"))
    add_training(parser.add_argument_group("training"))
    add_files(parser.add_argument_group("files"))
    options = parser.parse_args(argv)
    if options.task != task:
        parser.error(f"give the task first: {options.task}")
    options.out = options.out or Path("runs", options.task)
    return options


def add_model_and_data(group: argparse._ArgumentGroup, task: type[Task]) -> None:
    columns = " and ".join(task.columns)
    group.add_argument("--model", help=f"folder or hub name of a Hugging Face model; {OWN}")
    group.add_argument(
        "--dataset",
        help=f"CSV, TSV, JSON or JSONL file, or hub name, with columns {columns}; {OWN}",
    )
    group.add_argument(
        "--validate",
        action="store_true",
        help="hold out the validation part, not the test part: choose rates and steps by it",
    )
    group.add_argument(
        "--continue-from",
        type=Path,
        metavar="DIR",
        help="start from the model that an earlier run left in DIR, and report what it forgets",
    )
    group.add_argument(
        "--replay",
        type=number(float, 0),
        default=0.0,
        metavar="SHARE",
        help="mix in examples of DIR's data, so many times those of the new; %(default)s",
    )


def add_optimizers(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--optimizer", default="fastopt.AdamW", help="CLASS[:KEY=VALUE,...]")
    group.add_argument(
        "--against",
        help="CLASS[:KEY=VALUE,...]; default: torch.optim's class of the same name, fused=True, "
        "as Trainer uses it",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="bf16 and fp16 compute in 16 bits and keep parameters in float32; bf16-true keeps "
        "parameters and gradients in bfloat16, too, which loses small updates but with a weights= "
        f"such as --optimizer '{NARROW}'; %(default)s",
    )
    group.add_argument(
        "--against-precision", choices=PRECISIONS, help="of --against; default: the same"
    )
    group.add_argument("--lr", type=number(float, 0), help=OWN)
    group.add_argument(
        "--head-lr", type=number(float, 0), help=f"of the new head, where it has its own; {OWN}"
    )
    group.add_argument("--weight-decay", type=number(float, 0), default=0.01, help="%(default)s")
    group.add_argument(
        "--max-grad-norm",
        type=number(float, 0),
        default=1.0,
        metavar="NORM",
        help="clip gradients to it, 0 for never; %(default)s",
    )
    group.add_argument(
        "--find-lr",
        action="store_true",
        help="raise the learning rate step by step, draw the losses, suggest one, train no further",
    )


def add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tuning", choices=METHODS, default=METHODS[0], help="%(default)s")
    group.add_argument("--steps", type=number(int, 1), help=OWN)
    group.add_argument("--batch-size", type=number(int, 1), help=OWN)
    group.add_argument(
        "--gradient-accumulation-steps",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="batches a step; %(default)s",
    )
    group.add_argument(
        "--shard",
        choices=WAYS,
        default=WAYS[0],
        help="how torchrun's processes share the model; %(default)s",
    )
    group.add_argument(
        "--early-stop",
        type=number(int, 1),
        metavar="N",
        help="stop once the mean loss of N steps is hardly below that of the N before",
    )
    group.add_argument(
        "--seed", type=number(int, 0), default=0, help="of dropout, data order and new weights"
    )


def add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=Path, help="folder to write to; default: runs/TASK")
    group.add_argument(
        "--cache", type=Path, default=default_cache(), help="of models and data; %(default)s"
    )
    group.add_argument("--resume", action="store_true", help="continue from OUT's checkpoints")
    group.add_argument(
        "--report-to",
        choices=("tensorboard", "wandb", "none"),
        default="none",
        help="where Trainer sends losses as it goes; %(default)s",
    )
