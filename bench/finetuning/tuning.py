"""How much of a model is trained: all of it, its head, or a small addition to it.

LoRA, AdaLoRA and prompt tuning are peft's. peft has no bottleneck adapter for encoders, so that
one is here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import TrainerCallback

from .tasks import InputError

METHODS = ("full", "head", "lora", "adalora", "adapter", "prompt")

RANK = 8
ADAPTER_WIDTH = 32
VIRTUAL_TOKENS = 20
# Where a transformer block hands its result back to the residual stream, in the names of
# BERT, Llama and GPT-2.
BRANCH_ENDS = ("output.dense", "o_proj", "down_proj", "c_proj")
ALLOCATOR_FILE = "rank_allocator.pt"


def tuned(model: nn.Module, method: str, steps: int, prompt_type: str | None) -> nn.Module:
    """`model` with what `method` adds to it, and only what it trains requiring gradients.

    Args:
        steps: of the training, which AdaLoRA divides into phases.
        prompt_type: peft's name of the kind of model, where a prompt can be put before its input.
    """
    if method == "full":
        return model
    head = head_modules(model)
    if method == "head" and not head:
        raise InputError("--tuning head: the model's head is its embedding, it has none of its own")
    if method in ("lora", "adalora"):
        return _low_rank(model, method, head, steps)
    if method == "prompt":
        return _prompt(model, prompt_type)
    model.requires_grad_(False)
    if method == "adapter":
        _insert_adapters(model)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    return model


def head_modules(model: nn.Module) -> list[str]:
    """Names of the model's parts outside its pretrained body that have weights of their own."""
    body = getattr(model, model.base_model_prefix)
    shared = {id(parameter) for parameter in body.parameters()}
    return [
        name
        for name, part in model.named_children()
        if part is not body and any(id(parameter) not in shared for parameter in part.parameters())
    ]


def _low_rank(model: nn.Module, method: str, head: list[str], steps: int) -> nn.Module:
    import peft

    body = model.base_model_prefix
    layers = {name: part for name, part in model.named_modules() if name.startswith(f"{body}.")}
    # What is a matrix times a vector: a convolutional network has it at every pixel.
    targets = [
        name
        for name, part in layers.items()
        if isinstance(part, nn.Linear)
        or (isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1))
    ]
    common: dict[str, Any] = {"target_modules": targets, "modules_to_save": head or None}
    if method == "lora":
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **common)
    else:
        config = peft.AdaLoraConfig(
            init_r=RANK + RANK // 2,
            target_r=RANK,
            lora_alpha=2 * RANK,
            total_step=steps,
            # A tenth of the steps to warm up and to finish.
            tinit=steps // 10,
            tfinal=steps // 10,
            **common,
        )
    return peft.get_peft_model(model, config)


def _prompt(model: nn.Module, prompt_type: str | None) -> nn.Module:
    import peft

    if prompt_type is None:
        raise InputError(
            "--tuning prompt: a prompt can be put only before a model that reads one text; choose "
            "another of " + ", ".join(METHODS[:-1])
        )
    config = peft.PromptTuningConfig(task_type=prompt_type, num_virtual_tokens=VIRTUAL_TOKENS)
    return peft.get_peft_model(model, config)


class Bottleneck(nn.Module):
    """A layer whose output gets a correction through a narrow waist (Houlsby et al., 2019)."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(size, ADAPTER_WIDTH)
        self.up = nn.Linear(ADAPTER_WIDTH, size)
        nn.init.zeros_(self.up.weight)  # training starts from the pretrained function
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.layer(hidden)
        return output + self.up(nn.functional.gelu(self.down(output)))


def _insert_adapters(model: nn.Module) -> None:
    ends = [name for name, _ in model.named_modules() if name.endswith(BRANCH_ENDS)]
    if not ends:
        raise InputError("--tuning adapter: the model has no transformer blocks to put them in")
    for name in ends:
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        size = getattr(layer, "out_features", None) or layer.nf  # of transformers' Conv1D
        adapted = Bottleneck(layer, size)
        setattr(model.get_submodule(parent), last, adapted)


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def to_bfloat16(model: nn.Module) -> nn.Module:
    """`model` itself, made what `from_pretrained(dtype=torch.bfloat16)` would have made of it.

    What checkpoints do not hold, such as a Llama's rotary frequencies, stays float32, as there.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16()
    if is_peft(model):  # which would widen what Trainer has it load of a checkpoint
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)
    return model


def restore(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights that Trainer saved of a model like `model`."""
    if is_peft(model):
        import peft

        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(checkpoint)))
        return
    file = checkpoint / "model.safetensors"
    missing, unknown = load_model(model, file, strict=False)
    # A sharded run writes what is tied under each of its names; safetensors knows but one.
    wrong = {*missing, *(set(unknown) - model.state_dict().keys())}
    if wrong:
        raise RuntimeError(f"{file} is of another model, by its {', '.join(sorted(wrong))}")


def merged(model: nn.Module) -> nn.Module | None:
    """The trained model without additions, the same function; None where these are a part of it."""
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload()
    if is_peft(model) or any(isinstance(part, Bottleneck) for part in model.modules()):
        return None
    return model


class AllocateRanks(TrainerCallback):
    """Lets AdaLoRA move rank between layers after each step, and keeps its state in checkpoints."""

    def __init__(self, model: nn.Module, checkpoint: Path | None) -> None:
        self.adalora = model.base_model
        self.config = model.peft_config[model.active_adapter]
        # peft would leave the pruned ranks out of a checkpoint if it found them in its config:
        # the optimizer's state would no longer fit.
        self.ranks: dict[str, list[bool]] | None = None
        if checkpoint is not None:
            self.ranks, averages = torch.load(checkpoint / ALLOCATOR_FILE)
            vars(self.adalora.rankallocator).update(averages)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.config.rank_pattern = self.ranks
        self.adalora.update_and_allocate(state.global_step + 1)
        self.ranks, self.config.rank_pattern = self.config.rank_pattern, None

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        allocator = self.adalora.rankallocator
        averages = {
            name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")
        }
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save((self.ranks, averages), checkpoint / ALLOCATOR_FILE)
