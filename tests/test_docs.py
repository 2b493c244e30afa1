"""The pages: every example runs, from top to bottom of its page, and prints what stands below; or
says why it does not run."""

import ast
import re
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.testing.compare import compare_images

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

from finetuning.tasks.fetch import FetchError  # noqa: E402

PAGES = sorted(
    page for place in ("", "bench/", "csrc/", "docs/") for page in ROOT.glob(f"{place}*.md")
)
LEARN, IN_CHINESE = ROOT / "docs" / "gradient-descent.md", ROOT / "docs" / "gradient-descent.zh.md"
EXAMPLE = re.compile(
    r"^(?P<why_not><!-- not run: .+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(\n\n```text\n(?P<printed>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def examples(page, language=None):
    """Those in one language; each as a match, and the line before it."""
    text = page.read_text()
    for found in EXAMPLE.finditer(text):
        if language in (None, found["language"]):
            yield found, text.count("\n", 0, found.start("code"))


def marked(page):
    marks = [pytest.mark.network, pytest.mark.slow] if page == LEARN else []
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


def in_order(page):
    return [(found, line) for found, line in examples(page, "python") if not found["why_not"]]


@pytest.mark.parametrize(
    "page", [marked(page) for page in PAGES if in_order(page) and page != IN_CHINESE]
)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    scope = {"__name__": page.name, "model": model, "batches": batches, "evaluate": lambda _: None}
    for found, line in in_order(page):
        capsys.readouterr()
        try:
            exec(compile("\n" * line + found["code"], page, "exec"), scope)
        except FetchError as error:
            pytest.skip(str(error))
        if found["printed"] is not None:
            printed = capsys.readouterr().out
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", found["printed"])
            numbers = [float(number) for number in NUMBER.findall(found["printed"])]
            assert list(map(float, NUMBER.findall(printed))) == pytest.approx(numbers, rel=0.1)
    for drawn in tmp_path.glob("*.png"):
        # In the tolerance is the text, which matplotlib's versions place otherwise.
        differs = compare_images(page.with_name(drawn.name), drawn, tol=10)
        assert differs is None, f"{differs}\ncopy {drawn} if it should be so"


def test_what_does_not_run_says_why():
    silent = [
        f"{page.relative_to(ROOT)}:{line}"
        for page in PAGES
        for found, line in examples(page)
        if found["language"] not in ("python", "text", "cpp") and not found["why_not"]
    ]
    assert silent == []


def test_examples_in_chinese_are_those_in_english():
    """But for their comments: so they need not run again."""
    assert parts(IN_CHINESE) == parts(LEARN)


def parts(page):
    return [
        (ast.dump(ast.parse(found["code"])), found["printed"])
        for found, _ in examples(page, "python")
    ]
