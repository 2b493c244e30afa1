"""Lists of parameter shapes to step on, by name; models' own come from their configs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Shapes = list[tuple[int, ...]]
Model = Callable[[], nn.Module]


def on_meta(build: Model) -> Model:
    """The model without memory for its weights, built once."""

    @functools.cache
    def model() -> nn.Module:
        with torch.device("meta"):
            return build()

    return model


@on_meta
def bert_base() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


@on_meta
def minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertModel(config)


@on_meta
def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


@on_meta
def qwen_half_b() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


@on_meta
def gpt2_xl() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))


@on_meta
def llama_1b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@on_meta
def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig())


@on_meta
def mlp() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(100)))


def full(model: Model) -> Shapes:
    return [tuple(p.shape) for p in model().parameters()]


def lora(model: Model, inside: str, rank: int) -> Shapes:
    """A and B of every linear layer in the modules called ``inside``, as peft adds them."""
    linears = [
        module
        for name, module in model().named_modules()
        if isinstance(module, nn.Linear) and inside in name.split(".")
    ]
    return [s for m in linears for s in ((rank, m.in_features), (m.out_features, rank))]


@dataclass(frozen=True)
class Workload:
    title: str
    shapes: Callable[[], Shapes]


WORKLOADS = {
    "one-tiny": Workload("one of 16 (optimizer in backward)", lambda: [(16,)]),
    "1000x16": Workload("1000 x 16", lambda: [(16,)] * 1000),
    "mlp": Workload("small MLP", lambda: full(mlp)),
    "lora-bert": Workload("LoRA r=8 on BERT-base", lambda: lora(bert_base, "encoder", rank=8)),
    "lora64-bert": Workload("LoRA r=64 on BERT-base", lambda: lora(bert_base, "encoder", rank=64)),
    "lora-llama-7b": Workload(
        "LoRA r=8 on Llama-7B's attention", lambda: lora(llama_7b, "self_attn", rank=8)
    ),
    "lora64-llama-7b": Workload(
        "LoRA r=64 on Llama-7B's attention", lambda: lora(llama_7b, "self_attn", rank=64)
    ),
    "300x4096": Workload("300 x 4096", lambda: [(4096,)] * 300),
    "300x65536": Workload("300 x 65,536", lambda: [(65536,)] * 300),
    "minilm": Workload("MiniLM-L6", lambda: full(minilm)),
    "resnet50": Workload("ResNet-50", lambda: full(resnet50)),
    "8x4M": Workload("8 x 4 M", lambda: [(1 << 22,)] * 8),
    "one-big": Workload("one of 34 M", lambda: [(1 << 25,)]),
    "bert-base": Workload("BERT-base", lambda: full(bert_base)),
    "qwen-0.5b": Workload("Qwen2.5-0.5B", lambda: full(qwen_half_b)),
    "llama-1b": Workload("Llama-3.2-1B", lambda: full(llama_1b)),
    "gpt2-xl": Workload("GPT-2 XL", lambda: full(gpt2_xl)),
}


def elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))
