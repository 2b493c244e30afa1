"""What a user's own file or data set is read as, and which of it is held out."""

import json
import sys

import pytest

pytest.importorskip("transformers")

from finetuning.tasks import InputError
from finetuning.tasks.classification import split
from finetuning.tasks.files import read_rows
from tiny import WORDS, rows

COLUMNS = ("text", "label")


def test_file_formats_hold_the_same_examples(tmp_path):
    examples = [
        ("rain, or fog", "weather"),
        ("iron \u2013 r\u00e9al", "metal"),
        ("x" * 100_000, "1"),
    ]
    objects = [{"text": text, "label": label} for text, label in examples]
    contents = {
        "a.csv": "\ufefftext,label\n" + "".join(f'"{text}",{label}\n' for text, label in examples),
        "a.tsv": "label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in examples),
        "a.jsonl": "\n".join(json.dumps(row) for row in objects) + "\n\n",
        "a.json": json.dumps(objects),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        assert read_rows(str(path), COLUMNS) == examples, name


def test_data_set_name_needs_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_rows("owner/name", COLUMNS)


RARE = [("rare", "rare"), ("rarer", "rare"), ("rarest", "rare")]


@pytest.mark.parametrize("validate", [False, True])
def test_split_holds_out_a_fifth_of_each_class_and_no_text_twice(validate):
    examples = rows(10) + rows(10)[:7] + RARE
    train, held_out = split(examples, validate)
    assert not {text for text, _ in train} & {text for text, _ in held_out}
    labels = [label for _, label in held_out]
    assert {label: labels.count(label) for label in set(labels)} == dict.fromkeys(WORDS, 2) | {
        "rare": 1
    }
    assert split(examples, validate) == (train, held_out)


def test_validation_sees_nothing_of_the_test_part():
    examples = rows(10) + RARE
    rest, test = split(examples, False)
    train, validation = split(examples, True)
    assert not set(test) & {*train, *validation}
    assert sorted(rest) == sorted([*train, *validation])
    with pytest.raises(InputError, match=r"class 'rare' has 2 .* it takes 3"):
        split(rows(10) + RARE[:2], True)
