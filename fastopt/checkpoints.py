"""What is done to states as they are saved and loaded, beside what torch does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt import _C
from fastopt.tensors import decoded, formats, is_packed, is_wider, recast


@contextmanager
def saving(optimizer: Optimizer) -> Iterator[None]:
    """Has ``state_dict`` meanwhile give step counts on the CPU and 8-bit states as bfloat16."""
    # Before the users' hooks: they see what is saved and may make anything of it.
    handles = [
        optimizer.register_state_dict_post_hook(hook, prepend=True)
        for hook in (_counts_to_cpu, _decode_states)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def loading(optimizer: Any) -> Iterator[None]:
    """Has ``load_state_dict`` meanwhile keep states as the optimizer is to keep them."""
    loaded: dict[str, Any] = {}
    counts = _C.counts[optimizer._rule]

    def note(_: Optimizer, final: dict[str, Any]) -> dict[str, Any] | None:
        loaded.update(final)
        if not optimizer._keeping:
            return None
        # torch would bring all to the parameters' device and dtype before we narrow the first.
        state = {
            i: {key: v for key, v in kept.items() if not _like_param(key, v, counts)}
            if isinstance(kept, dict)
            else kept
            for i, kept in final["state"].items()
        }
        return {**final, "state": state}

    def restore(_: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        for i, p in zip(ids, params, strict=True):
            _restore(optimizer, p, loaded["state"].get(i, {}), counts)

    # torch runs users' hooks before and after; the dict to look at is the one they left.
    handles = (
        optimizer.register_load_state_dict_pre_hook(note),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _restore(optimizer: Any, p: Tensor, kept: dict[str, Any], counts: list[str]) -> None:
    """Make of what was loaded for a parameter what torch's own conversions would lose."""
    own = {key: v for key, v in kept.items() if _like_param(key, v, counts)}
    if optimizer._keeping and own:
        names = formats(optimizer, p, list(own))
        for (key, value), name in zip(own.items(), names, strict=True):
            optimizer.state[p][key] = recast(value, p, name)
    for key, value in kept.items():
        if isinstance(value, Tensor) and (
            key in counts[1:]  # of the step count torch itself keeps the dtype
            or (not optimizer._keeping and is_wider(value.dtype, p.dtype))
        ):
            optimizer.state[p][key] = value.to(p.device)


def _like_param(key: str, value: Any, counts: list[str]) -> bool:
    """Whether something kept of a parameter is a tensor of its shape."""
    return isinstance(value, Tensor) and key not in (*counts, "step")


def _decode_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    states = state_dict["state"]
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    for own, saved in groups:
        for p, i in zip(own["params"], saved["params"], strict=True):
            packed = {key: v for key, v in states.get(i, {}).items() if is_packed(v)}
            if packed:
                names = formats(optimizer, p, list(states[i]))
                of_key = dict(zip(states[i], names, strict=True))
                states[i] = states[i] | {
                    key: decoded(value, p, of_key[key]) for key, value in packed.items()
                }


def _counts_to_cpu(_: Optimizer, state_dict: dict[str, Any]) -> None:
    states = state_dict["state"]
    away: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for group in state_dict["param_groups"]:
        if group.get("fused") or group.get("capturable"):
            continue
        for i in group["params"]:
            step = states.get(i, {}).get("step")
            if isinstance(step, Tensor) and not step.is_cpu:
                away.setdefault((step.device, step.dtype), []).append(i)
    for places in away.values():
        steps = [states[i]["step"] for i in places]
        values = torch.stack([step.view(()) for step in steps]).cpu()  # one wait a device
        for i, step, value in zip(places, steps, values.unbind(), strict=True):
            states[i] = {**states[i], "step": value.view(step.shape)}
