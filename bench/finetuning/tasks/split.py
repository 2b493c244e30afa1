"""Which examples a model learns from, and which it is judged on.

Three parts that never change: to train on, to validate on, to test on. Every default of a task was
chosen by what it did on the validation part (--validate), and the figures reported are those of
the test part, for which training sees all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from . import InputError

SHARE = 0.2  # of the examples to test on, and as many to validate on
AT_MOST = 1000  # of each: the rest is worth more in training than in the third digit
# Not --seed: all seeds are judged on the same examples and can be compared.
SEED = 0

Example = TypeVar("Example")


def divide(
    examples: Sequence[Example], share: float, validate: bool, name: str = "the dataset"
) -> tuple[list[Example], list[Example]]:
    """What to train on and what to hold out of examples already in random order.

    Args:
        share: of the examples, to hold out.
        validate: hold out the validation part, and leave the test part out altogether.
        name: whose examples they are, for the error if they are too few.
    """
    least = 3 if validate else 2
    if len(examples) < least:
        raise InputError(
            f"{name} has {len(examples)} different example{'s' * (len(examples) != 1)}; it takes "
            f"{least} to hold some out"
        )
    count = max(1, round(len(examples) * share))
    rest, test = list(examples[:-count]), list(examples[-count:])
    return (rest[count:], rest[:count]) if validate else (rest, test)


def share_of(total: int, at_most: int = AT_MOST) -> float:
    return min(SHARE, at_most / total)
