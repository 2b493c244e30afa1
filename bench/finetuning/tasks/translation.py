"""Translation: English interface strings into Chinese, or verses into Spanish, with SmolLM2-135M.

English-Chinese: LibreOffice's strings (MPL-2.0) in the Debian package libreoffice-l10n-zh-cn.
English-Spanish: the King James Bible and the Reina-Valera of 1909 (public domain) in the Debian
packages sword-text-kjv and sword-text-sparv, verse by verse.
Not run here: WMT, IWSLT, Tatoeba, and no encoder-decoder such as T5, BART or Marian. None ships
in a package; bring pairs of sentences with --dataset. A model of 135 M parameters that has hardly
seen Chinese learns the form of a translation in so few steps, not the language.

    python bench/finetune.py translation --pair en-es
"""

from __future__ import annotations

import argparse
import gettext
from pathlib import Path

from .causal import Pair, Replies
from .fetch import DebianPackage

LIBREOFFICE = DebianPackage(
    package="libreoffice-l10n-zh-cn",
    inside="usr/lib/libreoffice/program/resource/zh_CN/LC_MESSAGES",
    folder="libreoffice-zh",
)
KING_JAMES = DebianPackage(
    package="sword-text-kjv", inside="usr/share/sword", folder="sword-king-james"
)
REINA_VALERA = DebianPackage(
    package="sword-text-sparv", inside="usr/share/sword", folder="sword-reina-valera"
)

WORDS = range(4, 21)  # of an English interface string: no single words, no paragraphs
MARKUP = set("<~\n\\{")
LONGEST_VERSE = 120  # characters
LANGUAGES = {"en-zh": "Chinese", "en-es": "Spanish"}


class Translation(Replies):
    columns = ("source", "target")
    steps = 30
    trivially = "leaving it in English"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--pair", choices=tuple(LANGUAGES), default="en-zh", help="languages; %(default)s"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self.instruction = f"Translate into {LANGUAGES[options.pair]}."
        if options.pair == "en-zh":
            self.bleu_tokenizer = "zh"
        super().__init__(options)

    @classmethod
    def own_pairs(cls, options: argparse.Namespace) -> tuple[str, list[Pair]]:
        cache = options.cache
        if options.pair == "en-zh":
            pairs = interface_strings(LIBREOFFICE.fetch(cache))
            return f"interface strings ({LIBREOFFICE.name})", pairs
        pairs = verses(KING_JAMES.fetch(cache), REINA_VALERA.fetch(cache))
        return f"verses ({KING_JAMES.name}, {REINA_VALERA.name})", pairs

    def trivial(self, prompt: str) -> str:
        return prompt


def interface_strings(folder: Path) -> list[Pair]:
    pairs = []
    for path in sorted(folder.glob("*.mo")):
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog
        for key, target in catalog.items():
            # Plural forms have the number as a second part, contexts come before a \x04.
            source = (key if isinstance(key, str) else key[0]).rpartition("\x04")[2]
            plain = not MARKUP & set(source + target)
            if plain and len(source.split()) in WORDS and not target.isascii():
                pairs.append((source, target))
    return pairs


def verses(english: Path, spanish: Path) -> list[Pair]:
    from pysword.modules import SwordModules

    def opened(folder: Path, name: str):
        modules = SwordModules(str(folder))
        modules.parse_modules()
        return modules.get_bible_from_module(name)

    kjv = opened(english, "engKJV2006eb")
    rv = opened(spanish, "spaRV1909eb")
    pairs = []
    for books in kjv.get_structure().get_books().values():
        for book in books:
            for chapter, count in enumerate(book.chapter_lengths, start=1):
                for verse in range(1, count + 1):
                    place = {"books": [book.name], "chapters": [chapter], "verses": [verse]}
                    pair = tuple(bible.get(**place, clean=True).strip() for bible in (kjv, rv))
                    if all(pair) and len(pair[0]) <= LONGEST_VERSE:
                        pairs.append(pair)
    return pairs


TASK = Translation
