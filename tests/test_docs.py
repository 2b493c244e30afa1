"""The pages: every example runs, from top to bottom of its page, or says why it does not."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/*.md")])
EXAMPLE = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = {"cpp", "text"}  # code that is quoted, and what programs print


def examples(page):
    """Of each one whether it says why it does not run, its language, its code, its first line."""
    text = page.read_text()
    for found in EXAMPLE.finditer(text):
        why_not, language, code = found.groups()
        if language not in SHOWN:
            yield why_not, language, code, text.count("\n", 0, found.start(3))


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def python_of(page):
    return [
        (code, line)
        for why_not, language, code, line in examples(page)
        if language == "python" and not why_not
    ]


WITH_PYTHON = [page for page in PAGES if python_of(page)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=names(WITH_PYTHON))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    scope = {"__name__": page.name, "model": model, "batches": batches, "evaluate": lambda _: None}
    for code, line in python_of(page):
        exec(compile("\n" * line + code, page, "exec"), scope)


def test_what_does_not_run_says_why():
    silent = [
        f"{page.relative_to(ROOT)}:{line}"
        for page in PAGES
        for why_not, language, _, line in examples(page)
        if language != "python" and not why_not
    ]
    assert silent == []
