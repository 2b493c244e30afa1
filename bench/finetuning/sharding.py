"""--shard: how torchrun's processes share one model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from .tasks import InputError

WAYS = ("ddp", "fsdp2", "fsdp2-offload")


def require_processes(way: str, processes: int) -> None:
    """Raise InputError where there is one process, which has nobody to share with."""
    if way != "ddp" and processes == 1:
        raise InputError(f"--shard {way} is for several: torchrun --nproc-per-node=2 {sys.argv[0]}")


def arguments(way: str) -> dict[str, Any]:
    """What TrainingArguments are told."""
    if way == "ddp":
        return {}
    config = {
        "version": 2,
        "auto_wrap_policy": "NO_WRAP",  # by layers, Accelerate would shard BERT's embeddings twice
        "cpu_offload": way == "fsdp2-offload",
        "state_dict_type": "FULL_STATE_DICT",  # a checkpoint's model as it is without
    }
    return {"fsdp": True, "fsdp_config": config}


@contextmanager
def sharing(way: str, make: Callable[[], Trainer]) -> Iterator[Trainer]:
    """The Trainer that `make` makes of such arguments, as long as it trains.

    Accelerate shards over the processes of any accelerator. Over those of CPUs it makes FSDP a DDP,
    without a word, though nothing that it then does is in their way: so it is told otherwise.
    """
    if way == "ddp":
        yield make()
        return
    if torch.accelerator.is_available():
        yield answering(make())
        return
    state = PartialState._shared_state
    before = state["distributed_type"]
    try:
        state["distributed_type"] = DistributedType.MULTI_XPU  # of those that it shards over
        trainer = answering(make())
        state["distributed_type"] = DistributedType.FSDP
        plugin = trainer.accelerator.state.fsdp_plugin
        if way == "fsdp2-offload":
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # for which there is no device
        yield trainer
    finally:
        state["distributed_type"] = before


def answering(trainer: Trainer) -> Trainer:
    """`trainer`, whose model says that it has no embeddings where transformers has it raise:
    Accelerate asks all that it shards."""
    try:
        getattr(trainer.model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        trainer.model.get_input_embeddings = lambda: None
    return trainer
