"""How fast is the step of an offloaded model, whose parameters, gradients and states lie in the
host's memory?

Contenders step on what FSDP2's CPUOffloadPolicy leaves to a CPU, DTensors in float32, of three
models of 23, 109 and 494 million parameters. With --device cuda the gradients come from a GPU and
the parameters go back to it: torchao's CPUOffloadOptimizer, which needs a GPU, then has a row, too.
DeepSpeed compiles its kernel at its first step, for a minute or so.

    python bench/offload.py
    python bench/offload.py --size 25M --seconds 10
    python bench/offload.py --device cuda --csv offload.csv

Other options, and the columns of the CSV, are those of bench/step.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import step
from throughput.rivals import FUSED, OURS

SIZES = {"25M": "minilm", "110M": "bert-base", "500M": "qwen-0.5b"}
CONTENDERS = (
    *(OURS, FUSED, "fastopt bfloat16 states", "fastopt 8-bit states"),
    *("DeepSpeed CPUAdam", "torchao offload", "torchao offload, fastopt"),
)


def step_options(argv: Sequence[str] | None = None) -> list[str]:
    """What bench/step.py is told; what it is told twice counts as told last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default=list(SIZES), nargs="+", help="all of them")
    args, further = parser.parse_known_args(argv)
    workloads = [SIZES[size] for size in args.size]
    return [
        *("--situation", "offloaded", "--optimizer", "adamw", "--patience", "240"),
        *("--contender", *CONTENDERS, "--workload", *workloads, *further),
    ]


if __name__ == "__main__":
    sys.exit(step.main(step_options()))
