"""The user's own data: rows of a CSV, TSV, JSON or JSONL file, or of a data set of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import InputError


def read_rows(source: str, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a file, or of a data set that the `datasets` library knows by name."""
    path = Path(source)
    if path.suffix in _READERS:
        rows = read_text(path, lambda file: list(_READERS[path.suffix](file)))
    elif path.is_file():
        raise InputError(f"--dataset {source}: expected a file ending in {', '.join(_READERS)}")
    else:
        rows = _read_hub(source)

    examples = []
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            found = ", ".join(str(column) for column in row)
            raise InputError(
                f"--dataset {source}: row {number} has no column {missing[0]!r}; "
                f"it needs {' and '.join(columns)}, found {found}"
            )
        example = tuple(str(row[column]).strip() for column in columns)
        if not all(example):
            empty = columns[example.index("")]
            raise InputError(f"--dataset {source}: row {number} has an empty {empty}")
        examples.append(example)
    if not examples:
        raise InputError(f"--dataset {source} has no rows")
    return examples


def read_text(path: Path, parse: Callable[[Any], Any]) -> Any:
    """What `parse` makes of the open UTF-8 file, with one clear error for whatever is wrong."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return parse(file)
    except OSError as error:
        raise InputError(f"--dataset {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--dataset {path} is not UTF-8: {error.reason}; convert it") from error
    except (csv.Error, json.JSONDecodeError, Malformed) as error:
        raise InputError(f"--dataset {path} is malformed: {error}") from error


class Malformed(ValueError):
    """A file that can be read but not understood."""


def _read_json(file: Any) -> Iterator[dict[str, Any]]:
    rows = json.load(file)
    if not isinstance(rows, list):
        raise Malformed("expected a list of objects")
    yield from _objects(rows)


def _read_jsonl(file: Any) -> Iterator[dict[str, Any]]:
    yield from _objects(json.loads(line) for line in file if line.strip())


def _objects(rows: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise Malformed(f"expected objects with the columns as keys, found {row!r:.40}")
        yield row


_READERS = {
    ".csv": csv.DictReader,
    ".tsv": lambda file: csv.DictReader(file, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


def _read_hub(name: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset  # wanted by this one option only
    except ImportError as error:
        raise InputError(
            f"--dataset {name} is no file; to look it up on the hub: pip install datasets"
        ) from error
    try:
        table = load_dataset(name, split="train")
    except Exception as error:  # the library documents no common base of what it raises
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--dataset {name} cannot be loaded: {reason}") from error
    names = getattr(table.features.get("label"), "names", None)
    return [row | {"label": names[row["label"]]} if names else row for row in table]
