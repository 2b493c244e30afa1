"""One training from scratch: its data, model and formats, and the figures it leaves."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from finetuning.tasks import split, topics
from throughput import rivals
from throughput.measure import Row
from throughput.memory import state_bytes

Betas = tuple[float, float]


@dataclass(frozen=True)
class Format:
    """How a model in training is kept.

    Args:
        rival: whose AdamW it is, of rivals.CONTENDERS.
        dtype: of the parameters, and so of their gradients.
        options: beyond torch's.
    """

    rival: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.rival == rivals.OURS


REFERENCE = "torch, float32"
WIDE, NARROW = torch.float32, torch.bfloat16
FORMATS = {
    REFERENCE: Format(rivals.FUSED, WIDE),
    "fastopt, float32": Format(rivals.OURS, WIDE),
    "fastopt, bfloat16 states": Format(rivals.OURS, WIDE, {"states": "bfloat16"}),
    "fastopt, 8-bit states": Format(rivals.OURS, WIDE, {"states": "8bit"}),
    "bitsandbytes, 8-bit states": Format("bitsandbytes 8-bit", WIDE),
    "torchao, 8-bit states": Format("torchao 8-bit", WIDE),
    "fastopt, split": Format(rivals.OURS, NARROW, {"weights": "split"}),
    "fastopt, split, bfloat16 states": Format(
        rivals.OURS, NARROW, {"weights": "split", "states": "bfloat16"}
    ),
    "fastopt, split, 8-bit states": Format(
        rivals.OURS, NARROW, {"weights": "split", "states": "8bit"}
    ),
    "fastopt, stochastic, 8-bit states": Format(
        rivals.OURS, NARROW, {"weights": "stochastic", "states": "8bit"}
    ),
    "torch, bfloat16": Format(rivals.FUSED, NARROW),
    "optimi, Kahan": Format("torch-optimi", NARROW, {"kahan_sum": True}),
    "FlashOptim": Format("FlashOptim", NARROW),
}

SIZE = {"n_embd": 160, "n_layer": 2, "n_head": 4}
VOCABULARY = 4096  # tokens
CONTEXT = 32  # tokens
BATCH = 4  # windows of CONTEXT tokens
HELD_OUT = 200  # articles, of which so many windows are judged:
WINDOWS = 1024
# Near float32's best, lest a format gain or lose by the mere length of its steps: of 2.5e-4, 5e-4,
# 7e-4 and 1e-3 the best on the validation part with beta2 = .999, 0.015 above the best with .95.
LR = 7e-4
WEIGHT_DECAY, MAX_NORM = 0.1, 1.0
WARM_UP = 0.05  # of the steps


@dataclass(frozen=True)
class Data:
    """Tokens of all articles to train on, and the windows (one a row) to judge by."""

    train: Tensor
    held_out: Tensor


def load(cache: Path) -> Data:
    texts = sorted({text for text, _ in topics.articles(cache)})
    random.Random(split.SEED).shuffle(texts)
    train, held_out = split.divide(texts, split.share_of(len(texts), HELD_OUT), validate=False)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=VOCABULARY, show_progress=False)

    def tokens(articles: list[str]) -> Tensor:
        return torch.tensor([i for each in tokenizer.encode_batch(articles) for i in each.ids])

    judged = tokens(held_out)
    windows = judged[: len(judged) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return Data(tokens(train), windows[:WINDOWS])


def new_model(seed: int) -> nn.Module:
    """Without dropout, whose noise would hide what is asked for."""
    torch.manual_seed(seed)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"))  # GPT-2's own are of its vocabulary
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, **SIZE, **dropout, **ends)
    return GPT2LMHeadModel(config).bfloat16()


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    widened = {name: param.float() for name, param in model.named_parameters()}
    logits = functional_call(model, widened, windows).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Data) -> float:
    parts = data.held_out.split(64)
    total = sum(loss_of(model, windows).item() * len(windows) for windows in parts)
    return total / len(data.held_out)


def schedule(done: int, steps: int) -> float:
    """What the learning rate is multiplied by: up along a line, then down along a cosine to 0."""
    return min((done + 1) / max(1, WARM_UP * steps), (1 + math.cos(math.pi * done / steps)) / 2)


def train(
    kept: Format, betas: Betas, seed: int, steps: int, data: Data, advance: Callable[[], Any]
) -> Row:
    """The figures of one run; `advance` is called after each step."""
    model = new_model(seed).to(kept.dtype)
    params = list(model.parameters())
    optimizer = rivals.CONTENDERS[kept.rival].make(
        params, "AdamW", lr=LR, betas=betas, eps=1e-8, weight_decay=WEIGHT_DECAY, **kept.options
    )
    rate = LambdaLR(optimizer, lambda done: schedule(done, steps))
    order = torch.Generator().manual_seed(seed)
    diverged = None
    start = time.perf_counter()
    for count in range(1, steps + 1):
        first = torch.randint(len(data.train) - CONTEXT, (BATCH, 1), generator=order)
        optimizer.zero_grad()
        loss = loss_of(model, data.train[first + torch.arange(CONTEXT)])
        if not math.isfinite(loss.item()):
            diverged = count
            break
        loss.backward()
        clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        rate.step()
        advance()
    seconds = time.perf_counter() - start
    reached = held_out_loss(model, data)
    if diverged is None and not math.isfinite(reached):
        diverged = steps
    elements = sum(param.numel() for param in params)
    # An optimizer may take the gradients away: they are as large as the parameters.
    stored = 2 * sum(param.nbytes for param in params) + state_bytes([optimizer])
    return {
        "held_out_loss": "" if diverged else f"{reached:.6f}",
        "diverged": str(diverged or ""),
        "kept_bytes_per_param": f"{stored / elements:.2f}",
        "elements": str(elements),
        "seconds": f"{seconds:.1f}",
    }
