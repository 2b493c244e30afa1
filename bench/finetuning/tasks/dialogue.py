"""Dialogue: SmolLM2-135M learns to answer customers, and a program that talks with them.

Data: the English part of the PyPI package chatterbot-corpus (BSD-3): ten questions of technical
support, and a thousand of trivia, feelings, computers and small talk.
Not run here: real customer service, or instruction sets such as Alpaca or Dolly. None ships in a
package; bring pairs with --dataset.

    python bench/finetune.py dialogue
    python bench/finetune.py dialogue --chat

The chat looks for the known question nearest to yours. If it is near enough you get its stored
answer, else one that the trained model of OUT generates; it says which.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter

import yaml

from .causal import Pair, Replies
from .fetch import Package
from .options import number

CHATTERBOT = Package(
    requirement="chatterbot-corpus==1.3.3",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    size=345_706,
    inside="chatterbot_corpus/data/english",
    folder="chatterbot-english",
)


class Dialogue(Replies):
    columns = ("question", "answer")
    steps = 30
    instruction = "You are a helpful support assistant."
    trivially = "always the commonest reply"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--chat", action="store_true", help="answer at the terminal with OUT's model"
        )
        parser.add_argument(
            "--near",
            type=number(float, -1),
            default=0.8,
            help="chat: cosine of two questions from which the stored answer serves; %(default)s",
        )

    @staticmethod
    def program(options: argparse.Namespace) -> int | None:
        if not options.chat:
            return None
        from . import chat

        return chat.run(options, Dialogue)

    @classmethod
    def own_pairs(cls, options: argparse.Namespace) -> tuple[str, list[Pair]]:
        pairs: dict[str, str] = {}
        for path in sorted(CHATTERBOT.fetch(options.cache).glob("*.yml")):
            conversations = yaml.safe_load(path.read_text("utf-8"))["conversations"]
            for turns in conversations:
                if isinstance(turns, str):  # a question of trivia that swallowed its answer
                    continue
                for question, answer in itertools.pairwise(map(str, turns)):
                    if question.strip() and answer.strip():  # some have nothing to say
                        pairs.setdefault(question, answer)
        return f"English conversations ({CHATTERBOT.name})", list(pairs.items())

    def trivial(self, prompt: str) -> str:
        return Counter(reply for _, reply in self.train_pairs).most_common(1)[0][0]


TASK = Dialogue
