"""The tables and pictures in the repository are those of the CSVs beside them."""

import pytest
from PIL import Image

from machine import RESULTS
from pretraining.page import page as formats_page
from throughput import pages, plots, scaling, tables
from throughput.measure import OPTIMIZERS, Setting
from throughput.rows import Results, read

AGAIN = "run `make tables`"


def test_pages_have_the_tables_of_the_committed_figures():
    texts = [page.read_text() for page in pages.PAGES]
    assert all(f"<!-- table: {name} -->" in "".join(texts) for name in pages.TABLES)
    assert [pages.with_tables(text, RESULTS) for text in texts] == texts, AGAIN


def test_results_page_is_that_of_the_committed_figures():
    page = (RESULTS / "README.md").read_text()
    assert page == pages.page(RESULTS, pictures=True), AGAIN


def test_formats_page_is_that_of_the_committed_figures():
    rows = read(RESULTS / "formats.csv")
    assert formats_page(rows) == (RESULTS / "formats.md").read_text()


def test_pictures_show_the_committed_figures():
    for picture, (_, source) in plots.PICTURES.items():
        for device in tables.DEVICES:
            file = RESULTS / f"{source}-{device}.csv"
            if file.exists():
                shown = Image.open(RESULTS / f"{picture}-{device}.png").text["Source"]
                assert shown == plots.digest(file), AGAIN


@pytest.fixture
def figures(tmp_path):
    """A folder with one row for each device: ours, 2.00 ms, half as fast as torch fused."""
    for device in tables.DEVICES:
        results = Results(tmp_path / f"step-{device}.csv", "cpu")
        setting = Setting([(4, 4)], "adamw", "plain", "float32", device)
        figures = {"median_ms": "2.0000", "ratio": "0.50"}
        results.add("one-tiny", setting, {"contender": "fastopt", **figures})
        results.add("one-tiny", setting, {"contender": "apex", "skipped": "ImportError: no apex"})
    return tmp_path


def test_a_changed_figure_changes_a_page(figures):
    marked = "before\n<!-- table: step-cpu -->\nold\n<!-- end -->\nafter\n"
    text = pages.with_tables(marked, figures)
    assert text.startswith("before\n<!-- table: step-cpu -->\n| AdamW")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| 2.00 | 0.50x |" in text
    assert pages.with_tables(text, figures) == text


def test_where_we_lose_and_who_did_not_run_is_on_the_page(figures):
    page = pages.page(figures, pictures=False)
    assert "2.00 (0.50x)" in page
    assert "- apex: ImportError: no apex" in page


def test_ours_is_compared_with_the_fastest_of_torchs_own(figures):
    results = Results(figures / "optimizers-cpu.csv", "cpu")
    setting = Setting([(4, 4)], "asgd", "plain", "float32", "cpu")
    for name, ratio in (("fastopt", "6.00"), ("torch foreach", "1.00"), ("torch loop", "3.00")):
        results.add("one-tiny", setting, {"contender": name, "median_ms": "2.0", "ratio": ratio})
    for optimizer in ("asgd", "rprop"):
        reason = f"no {OPTIMIZERS[optimizer][0]}"
        lacking = Setting([(4, 4)], optimizer, "plain", "float32", "cpu")
        results.add("one-tiny", lacking, {"contender": "bitsandbytes", "skipped": reason})
    page = pages.page(figures, pictures=False)
    assert "| torch foreach | 2.00 | 2.00 | 6.00x | 2.00x (torch loop) | 3.00x |" in page
    assert "- bitsandbytes: no ... (ASGD, Rprop)" in page


def test_what_nobody_measured_is_said_not_to_be(tmp_path):
    assert "not measured yet" in tables.step_table(tmp_path, "cuda")
    assert page_sections(pages.page(tmp_path, pictures=False)) == ["CPU", "GPU"]


def page_sections(page: str) -> list[str]:
    return [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]


def test_fit_finds_fixed_and_growing_cost():
    line = scaling.fit([1, 10, 100, 10_000], [5.5, 10, 55, 5005])
    assert line == pytest.approx((5, 0.5))
