"""A chat at the terminal: stored answers to known questions, generated ones to others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from . import load
from .causal import Pair, chat_tokenizer, one_line, replies
from .models import MINILM, mean_over_tokens
from .trained import trained_model

if TYPE_CHECKING:
    from .causal import Replies

BATCH = 64
MAX_TOKENS = 64


class Known:
    """Questions with their answers, found by meaning."""

    def __init__(self, pairs: list[Pair], encoder: str) -> None:
        self.pairs = pairs
        self.tokenizer = load(AutoTokenizer, encoder)
        self.encoder = load(AutoModel, encoder, dtype=torch.float32).eval()
        self.questions = self._vectors([question for question, _ in pairs])

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> torch.Tensor:
        parts = []
        for begin in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                texts[begin : begin + BATCH],
                truncation=True,
                max_length=MAX_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            states = self.encoder(**tokens).last_hidden_state
            parts.append(mean_over_tokens(states, tokens["attention_mask"]))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def nearest(self, question: str) -> tuple[float, Pair]:
        """The cosine with the known question nearest to this one, and its pair."""
        cosines = self.questions @ self._vectors([question])[0]
        best = int(cosines.argmax())
        return cosines[best].item(), self.pairs[best]


def answers(lines: Iterable[str], known: Known, generate, near: float) -> Iterator[str]:
    """For each question where the answer comes from, and the answer."""
    for line in lines:
        question = line.strip()
        if not question:
            continue
        if not sys.stdin.isatty():  # a transcript shows the questions, too
            yield f"> {question}"
        cosine, (nearest, stored) = known.nearest(question)
        found = f"{cosine:.2f} near {one_line(nearest)!r}"
        if cosine >= near:
            yield f"[stored, {found}]\n{stored}"
        else:
            yield f"[generated, only {found}]\n{one_line(generate(question))}"


def run(options: argparse.Namespace, task: type[Replies]) -> int:
    folder = trained_model(options)
    tokenizer = chat_tokenizer(folder)
    model = load(AutoModelForCausalLM, folder, dtype=torch.float32)
    _, pairs = task.named_pairs(options)
    known = Known(pairs, str(MINILM.fetch(options.cache)))

    def generate(question: str) -> str:
        return replies(model, tokenizer, task.instruction, [question])[0]

    sys.stdin.reconfigure(errors="replace")  # a terminal may send anything
    for answer in answers(sys.stdin, known, generate, options.near):
        print(answer, flush=True)
    return 0
