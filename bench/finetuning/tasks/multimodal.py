"""Images and texts in one space: EfficientNet-Lite0 and MiniLM-L6 learn Fashion-MNIST's classes.

Each image of a class is paired with one of several descriptions of the class; both towers, and a
linear map from each into a space of their own, learn to bring the pair together and to keep it
apart from the rest of the batch: CLIP's symmetric cross entropy with a learned temperature (Radford
et al., 2021), in which all pairs of one class are right (UniCL, Yang et al., 2022). Judged on
images and descriptions that took no part in training: which images does a description find, which
description an image. Of two classes training has seen neither images nor texts: zero-shot.

Data: Fashion-MNIST, and descriptions written for this task in tasks/descriptions.csv.
Not run here: Flickr30k, COCO, CLIP's own weights. None ships in a package; bring a folder that has
a folder of image files for each class with --dataset, descriptions of the classes with
--descriptions, another text encoder with --model.

    python bench/finetune.py multimodal
    python bench/finetune.py multimodal --unseen bag dress
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, confusion_matrix
from torch import nn
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel, Trainer

from . import InputError, Task, load
from .classification import Example, first_of_each_class, split
from .files import read_rows
from .images import (
    NETWORKS,
    Picture,
    add_network,
    folders_or_fashion,
    network_input,
    pixels_of,
    tower,
)
from .models import MINILM, mean_over_tokens
from .options import add_few_shot
from .split import SEED

DESCRIPTIONS = Path(__file__).with_name("descriptions.csv")
UNSEEN = ("coat", "ankle boot")
WIDTH = 128  # of the common space
# CLIP's: the scale of cosines begins with the inverse of a temperature of 0.07 and stays below 100.
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100
MAX_PIECES = 32
AT_ONCE = 128  # images judged
FIRST = 10  # images that a description finds, and
NEAREST = 5  # descriptions of an image, among which a right one is looked for
MEASURES = {
    "mean_average_precision": "held-out text finds images: mean avg. precision",
    "precision_at_10": "  right among its first 10",
    "recall_at_1": "held-out image: nearest text is right",
    "recall_at_5": "  one of the nearest 5 is right",
}


class TwoTowers(PreTrainedModel):
    """Logits of pairs: a row for each image, a column for each text."""

    base_model_prefix = "body"

    def __init__(self, image: nn.Module, image_width: int, text: PreTrainedModel) -> None:
        super().__init__(PretrainedConfig())
        self.body = nn.ModuleDict({"image": image, "text": text})
        self.head = Joint(image_width, text.config.hidden_size)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.body["image"](pixel_values.to(self.dtype))

    def text_features(self, **tokens: torch.Tensor) -> torch.Tensor:
        states = self.body["text"](**tokens).last_hidden_state
        return mean_over_tokens(states, tokens["attention_mask"])

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, **tokens: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        logits = self.head(self.image_features(pixel_values), self.text_features(**tokens)).float()
        same = (labels[:, None] == labels).float()
        wanted = same / same.sum(1, keepdim=True)
        by_image, by_text = (nn.functional.cross_entropy(x, wanted) for x in (logits, logits.T))
        return {"loss": (by_image + by_text) / 2, "logits": logits}


class Joint(nn.Module):
    """Cosines of images and texts in one space, over a temperature; all of it is learned."""

    def __init__(self, image_width: int, text_width: int) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, WIDTH, bias=False)
        self.text = nn.Linear(text_width, WIDTH, bias=False)
        # With a dimension: FSDP2 shards no scalar.
        self.log_scale = nn.Parameter(torch.tensor([math.log(FIRST_SCALE)]))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.normalize(self.image(images), dim=-1)
        columns = nn.functional.normalize(self.text(texts), dim=-1)
        return self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp() * rows @ columns.T


class Multimodal(Task):
    """Pairs of a picture and a description of its class."""

    headline = "mean_average_precision"
    columns = ("image", "label")
    continuable = False
    steps, batch_size, lr, head_lr = 100, 32, 3e-4, 3e-3

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add_network(parser)
        add_few_shot(parser, "images of each class")
        parser.add_argument(
            "--descriptions",
            default=str(DESCRIPTIONS),
            metavar="FILE",
            help="CSV, TSV, JSON or JSONL with columns label and text; default: of Fashion-MNIST",
        )
        parser.add_argument(
            "--unseen",
            nargs="+",
            metavar="LABEL",
            help="classes kept out of training; default: of Fashion-MNIST "
            f"{' and '.join(UNSEEN)}, else none",
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.dataset, pictures = folders_or_fashion(options)
        self.labels = sorted({label for _, label in pictures})
        self.unseen = unseen_classes(options, self.labels)
        train, judged = split(pictures, options.validate)
        train = [(picture, label) for picture, label in train if label not in self.unseen]
        if options.few_shot is not None:
            train = first_of_each_class(train, options.few_shot)
        texts = split(descriptions(options.descriptions, self.labels), options.validate)

        self.model = f"{NETWORKS[options.network]} and {options.model or MINILM.name}"
        self._weights = options.model or str(MINILM.fetch(options.cache))
        self.processor = load(AutoTokenizer, self._weights)
        self.texts, self.judged_texts = [*texts[0], *texts[1]], texts[1]
        self.tokens = self.processor(
            [text for text, _ in self.texts],
            truncation=True,
            max_length=MAX_PIECES,
            padding=True,
            return_tensors="pt",
        )
        self.train = self._pairs(train, texts[0])
        self.judged = self._pairs(judged, texts[1])
        unseen = {self.labels.index(label) for label in self.unseen}
        self.held_out = [pair for pair in self.judged if pair["label"] not in unseen]

    def _pairs(
        self, pictures: list[tuple[Picture, str]], texts: list[Example]
    ) -> list[dict[str, Any]]:
        """Each picture with one of the texts of its class, these in turn.

        In random order: a batch of a single class has nothing to be told apart.
        """
        turns = {
            label: itertools.cycle([self.texts.index(text) for text in texts if text[1] == label])
            for label in self.labels
        }
        pairs = [
            {
                "pixels": pixels_of(picture),
                "text": next(turns[label]),
                "label": self.labels.index(label),
            }
            for picture, label in pictures
        ]
        random.Random(SEED).shuffle(pairs)
        return pairs

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [example["text"] for example in examples]
        return {
            "pixel_values": network_input([example["pixels"] for example in examples]),
            "labels": torch.tensor([example["label"] for example in examples]),
            **{name: column[texts] for name, column in self.tokens.items()},
        }

    def load_model(self) -> PreTrainedModel:
        image, width = tower(self._options.network, self._options.cache)
        text = load(AutoModel, self._weights, dtype=torch.float32, add_pooling_layer=False)
        return TwoTowers(image, width, text)

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        loss = trainer.evaluate(self.held_out)["eval_loss"]
        images = np.array([pair["label"] for pair in self.judged])
        return {"loss": loss, **self.metrics(self._similarities(trainer.model), images)}

    @torch.no_grad()
    def _similarities(self, model: nn.Module) -> np.ndarray:
        """A row for each held-out image, a column for each held-out description."""
        model.eval()
        device = next(model.parameters()).device
        first = len(self.texts) - len(self.judged_texts)
        tokens = {name: column[first:].to(device) for name, column in self.tokens.items()}
        texts = model.text_features(**tokens)
        rows = []
        for at in range(0, len(self.judged), AT_ONCE):
            pixels = [pair["pixels"] for pair in self.judged[at : at + AT_ONCE]]
            images = model.image_features(network_input(pixels).to(device))
            rows.append(model.head(images, texts))
        return torch.cat(rows).float().cpu().numpy()

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Of similarities, a row for each image and a column for each held-out description."""
        texts = np.array([self.labels.index(label) for _, label in self.judged_texts])
        unseen = [self.labels.index(label) for label in self.unseen]
        right = labels[:, None] == texts
        new_image, new_text = np.isin(labels, unseen), np.isin(texts, unseen)
        seen = np.ix_(~new_image, ~new_text)
        figures = {
            **found_images(predictions[seen], right[seen]),
            **found_texts(predictions[seen], right[seen]),
            "baseline": {"by": "chance", **by_chance(right[seen], right[seen])},
            "confusion": confusion_matrix(
                labels, texts[predictions.argmax(1)], labels=range(len(self.labels))
            ).tolist(),
        }
        if unseen:
            among_new = np.ix_(new_image, new_text)
            only = found_texts(predictions[among_new], right[among_new])["recall_at_1"]
            figures["unseen"] = {
                **found_images(predictions[:, new_text], right[:, new_text]),
                **found_texts(predictions[new_image], right[new_image]),
                "accuracy_among_unseen": only,
                "baseline": {
                    **by_chance(right[:, new_text], right[new_image]),
                    "accuracy_among_unseen": float(right[among_new].mean()),
                },
            }
        return figures

    def rows(self, start: dict[str, Any], end: dict[str, Any]) -> list[tuple[str, str]]:
        rows = figure_rows(start, end, MEASURES)
        if self.unseen:
            rows.append((f"never seen in training: {', '.join(self.unseen)}", ""))
            more = {"accuracy_among_unseen": "an image's class among these only"}
            rows += figure_rows(start["unseen"], end["unseen"], MEASURES | more)
        heads = " ".join(f"{label:>5.5}" for label in self.labels)
        rows.append(("image of (* unseen), nearest to a text of", heads))
        return rows + [
            (
                f"  {label}{'*' if label in self.unseen else ''} ({sum(counts)})",
                " ".join(f"{count:5d}" for count in counts),
            )
            for label, counts in zip(self.labels, end["confusion"], strict=True)
        ]


def figure_rows(
    start: dict[str, Any], end: dict[str, Any], measures: dict[str, str]
) -> list[tuple[str, str]]:
    rows = []
    for key, name in measures.items():
        rows += [
            (name, f"{start[key]:.3f} to {end[key]:.3f}"),
            ("  trivial baseline: chance", f"{end['baseline'][key]:.3f}"),
        ]
    return rows


def found_images(similarities: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """How well each text, a column, ranks the images; the mean over texts."""
    best = np.argsort(-similarities, axis=0)[:FIRST]
    of_texts = zip(right.T, similarities.T, strict=True)
    return {
        "mean_average_precision": float(np.mean([average_precision_score(*x) for x in of_texts])),
        "precision_at_10": float(np.take_along_axis(right, best, axis=0).mean()),
    }


def found_texts(similarities: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """For how many images, a row each, a right text is the nearest or among the nearest."""
    best = np.argsort(-similarities, axis=1)[:, :NEAREST]
    hits = np.take_along_axis(right, best, axis=1)
    return {
        "recall_at_1": float(hits[:, 0].mean()),
        "recall_at_5": float(hits.any(axis=1).mean()),
    }


def by_chance(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """What `found_images` and `found_texts` give for a random order, in the mean."""
    count, relevant = len(images), images.sum(axis=0)
    harmonic = (1 / np.arange(1, count + 1)).sum()
    # Bestgen (2015), Exact Expected Average Precision of the Random Baseline.
    precision = (harmonic + (count - harmonic) * (relevant - 1) / max(1, count - 1)) / count
    total, wrong = texts.shape[1], (~texts).sum(axis=1).tolist()
    near = min(NEAREST, total)
    misses = [math.comb(n, near) / math.comb(total, near) for n in wrong]
    return {
        "mean_average_precision": float(precision.mean()),
        "precision_at_10": float(images.mean()),
        "recall_at_1": float(texts.mean()),
        "recall_at_5": float(1 - np.mean(misses)),
    }


def descriptions(source: str, labels: list[str]) -> list[Example]:
    """Those of the classes that there are images of, two or more of each."""
    texts = [(text, label) for label, text in read_rows(source, ("label", "text"))]
    missing = set(labels) - {label for _, label in texts}
    if missing:
        raise InputError(f"--descriptions {source}: no text of class {min(missing)!r}; add some")
    return [(text, label) for text, label in texts if label in labels]


def unseen_classes(options: argparse.Namespace, labels: list[str]) -> list[str]:
    own = UNSEEN if options.dataset is None else ()
    chosen = options.unseen or own
    unknown = set(chosen) - set(labels)
    if unknown:
        raise InputError(f"--unseen {min(unknown)!r}: the classes are {', '.join(labels)}")
    if len(labels) - len(set(chosen)) < 2:
        raise InputError("--unseen leaves less than two classes to learn; leave some out of it")
    return sorted(set(chosen))


TASK = Multimodal
