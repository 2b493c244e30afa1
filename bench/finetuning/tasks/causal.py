"""Replies of a causal language model: what every task shares that answers a text with a text."""

from __future__ import annotations

import argparse
import random
from abc import abstractmethod
from collections import Counter
from typing import Any

import numpy as np
import torch
from sacrebleu import corpus_bleu, corpus_chrf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

from . import InputError, Task, load
from .files import read_rows
from .models import SMOLLM2
from .split import SEED, divide, share_of

Pair = tuple[str, str]  # prompt, reply

IGNORED = -100  # label of what is not reply; torch's cross entropy skips it
MAX_TOKENS = 128  # of prompt and reply; the rest is cut off
MAX_NEW_TOKENS = 40
HELD_OUT_AT_MOST = 100  # pairs: each is judged token by token
SAMPLES = 24  # of them are replied to, and the replies compared
SHOWN = 4


class Replies(Task):
    """A chat model that learns from (prompt, reply) pairs; the loss is on replies only."""

    headline = "token_accuracy"
    prompt_type = "CAUSAL_LM"
    batch_size, lr = 8, 1e-4
    instruction: str  # the system's message to the model
    trivially: str  # what `trivial` does
    bleu_tokenizer = "13a"  # sacrebleu's, for the language of the replies

    @classmethod
    @abstractmethod
    def own_pairs(cls, options: argparse.Namespace) -> tuple[str, list[Pair]]:
        """Name and pairs of the task's own data."""

    @abstractmethod
    def trivial(self, prompt: str) -> str:
        """The reply of someone who has understood nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dataset, pairs = self.named_pairs(options)
        self.train_pairs, self.held_out_pairs = split(pairs, options.validate)
        self.model = options.model or SMOLLM2.name
        self._weights = options.model or str(SMOLLM2.fetch(options.cache))
        config = load(AutoConfig, self._weights)
        if config.dtype not in (None, torch.float32):
            self.model += f" (stored in {config.dtype})"
        self.processor = chat_tokenizer(self._weights)
        self.train = [self._encode(*pair) for pair in self.train_pairs]
        self.held_out = [self._encode(*pair) for pair in self.held_out_pairs]

    @classmethod
    def named_pairs(cls, options: argparse.Namespace) -> tuple[str, list[Pair]]:
        """Name and pairs of what the options ask for."""
        if options.dataset is not None:
            return options.dataset, read_rows(options.dataset, cls.columns)
        return cls.own_pairs(options)

    def _encode(self, prompt: str, reply: str) -> dict[str, list[int]]:
        before = prompt_tokens(self.processor, self.instruction, prompt)
        after = self.processor(reply + self.processor.eos_token, add_special_tokens=False).input_ids
        tokens = (before + after)[:MAX_TOKENS]
        return {"input_ids": tokens, "labels": ([IGNORED] * len(before) + after)[:MAX_TOKENS]}

    def collate(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int) -> torch.Tensor:
            rows = [torch.tensor(example[name]) for example in examples]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        tokens = padded("input_ids", -1)
        return {
            "input_ids": tokens.clamp(min=0),
            "attention_mask": (tokens >= 0).long(),
            "labels": padded("labels", IGNORED),
        }

    def load_model(self) -> PreTrainedModel:
        return load(AutoModelForCausalLM, self._weights, dtype=torch.float32)

    @staticmethod
    def compact(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        figures = super().evaluate(trainer)
        pairs = self.held_out_pairs[:SAMPLES]
        prompts, wanted = zip(*pairs, strict=True)
        given = replies(trainer.model, self.processor, self.instruction, prompts)
        return {
            **figures,
            **self._likeness(given, wanted),
            "baseline": {
                **figures["baseline"],
                "reply": self.trivially,
                **self._likeness([self.trivial(prompt) for prompt in prompts], wanted),
            },
            "samples": [
                {"prompt": prompt, "wanted": right, "given": reply}
                for (prompt, right), reply in zip(pairs, given, strict=True)
            ],
        }

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        known = labels[:, 1:] != IGNORED
        wanted = labels[:, 1:][known]
        chosen = predictions[:, -labels.shape[1] : -1][known]  # each foretells the next token
        counts = Counter(token for each in self.train for token in reply_tokens(each))
        commonest, _ = counts.most_common(1)[0]
        smoothed = np.ones(len(self.processor))
        for token, count in counts.items():
            smoothed[token] += count
        return {
            "token_accuracy": float((chosen == wanted).mean()),
            "baseline": {
                "always": self.processor.decode([commonest]),
                "token_accuracy": float((wanted == commonest).mean()),
                # Of one who knows only how often each token comes in replies.
                "unigram_loss": float(-np.log(smoothed[wanted] / smoothed.sum()).mean()),
            },
        }

    def _likeness(self, given: list[str], wanted: tuple[str, ...]) -> dict[str, float]:
        return {
            "chrf": corpus_chrf(given, [list(wanted)]).score,
            "bleu": corpus_bleu(given, [list(wanted)], tokenize=self.bleu_tokenizer).score,
        }

    def rows(self, start: dict[str, Any], end: dict[str, Any]) -> list[tuple[str, str]]:
        baseline = end["baseline"]
        rows = [
            ("  trivial baseline: how common a token is", f"{baseline['unigram_loss']:.4f}"),
            (
                "held-out tokens foretold, start to end",
                f"{start['token_accuracy']:.3f} to {end['token_accuracy']:.3f}",
            ),
            (
                f"  trivial baseline: always {baseline['always']}",
                f"{baseline['token_accuracy']:.3f}",
            ),
        ]
        for name, key in (("chrF", "chrf"), ("BLEU", "bleu")):
            rows += [
                (
                    f"{name} of {len(end['samples'])} held-out replies, start to end",
                    f"{start[key]:.1f} to {end[key]:.1f}",
                ),
                (f"  trivial baseline: {baseline['reply']}", f"{baseline[key]:.1f}"),
            ]
        return rows

    def notes(self, start: dict[str, Any], end: dict[str, Any]) -> list[str]:
        lines = []
        samples = list(zip(start["samples"], end["samples"], strict=True))
        for before, after in samples[:SHOWN]:
            lines += [
                f"> {one_line(before['prompt'])}",
                f"  before: {one_line(before['given'])}",
                f"  after:  {one_line(after['given'])}",
                f"  wanted: {one_line(before['wanted'])}",
            ]
        return lines


def reply_tokens(example: dict[str, list[int]]) -> list[int]:
    return [token for token in example["labels"] if token != IGNORED]


def one_line(text: str) -> str:
    return " ".join(text.split())


def split(pairs: list[Pair], validate: bool) -> tuple[list[Pair], list[Pair]]:
    """Divide into train and held-out parts; a prompt is in one of them only."""
    unique = list(dict(pairs).items())
    random.Random(SEED).shuffle(unique)
    return divide(unique, share_of(len(unique), HELD_OUT_AT_MOST), validate)


def chat_tokenizer(name: str) -> Any:
    tokenizer = load(AutoTokenizer, name)
    if tokenizer.chat_template is None:
        raise InputError(f"--model {name} has no chat template: it is no chat model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_tokens(tokenizer: Any, instruction: str, prompt: str) -> list[int]:
    """The conversation up to where the reply begins; a prompt too long for a reply is cut off."""
    room = MAX_TOKENS // 2
    cut = tokenizer.decode(tokenizer(prompt, add_special_tokens=False).input_ids[:room])
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": cut}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def replies(model: nn.Module, tokenizer: Any, instruction: str, prompts: Any) -> list[str]:
    """The likeliest reply to each prompt."""
    model.eval()
    batch = tokenizer.pad(
        {"input_ids": [prompt_tokens(tokenizer, instruction, prompt) for prompt in prompts]},
        padding_side="left",
        return_tensors="pt",
    ).to(next(model.parameters()).device)
    output = model.generate(
        **batch,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)
