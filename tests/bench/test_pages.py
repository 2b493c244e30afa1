"""The tables and pictures in the repository are those of the CSVs beside them."""

import csv

import pytest
from PIL import Image

from machine import RESULTS
from pretraining.page import page as formats_page
from throughput import pages, plots, profile, scaling, share, tables
from throughput.measure import OPTIMIZERS, Setting
from throughput.rows import COLUMNS, Results, read

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


@pytest.mark.parametrize("name", [name for name in pages.TABLES if name.endswith("-cuda")])
def test_what_nobody_measured_is_said_not_to_be(name, tmp_path):
    assert pages.TABLES[name](tmp_path) == "GPU: not measured yet."


def test_page_says_what_nobody_measured(tmp_path):
    assert page_sections(pages.page(tmp_path, pictures=False)) == ["CPU", "GPU"]


def page_sections(page: str) -> list[str]:
    return [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]


# Made-up figures of a GPU, of which each stands on a page but once.
ON_A_GPU = {"machine": "a GPU", "torch": "9.9", "commit": "abc1234", "skipped": ""}


def write(file, rows: list[dict[str, str]], columns) -> None:
    with file.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def steps_on_a_gpu(folder, name: str, workload: str, ours: str) -> None:
    """Torch fused at 8.00 ms and ours."""
    figures = {"device_ms": ours, "host_ms": "0.0100", "ratio": "4.00", "rounds": "7"}
    figures |= {"tensors": "200", "elements": "110000000", "gb_per_s": "4000.0"}
    figures |= {"ceiling_gb_per_s": "4200.0", "ceiling_share": "0.95", "peak_share": "0.81"}
    figures |= {"state_bytes_per_param": "8.00", "step_peak_mb": "0.0", "reference": "torch fused"}
    known = {"situation": "plain", "dtype": "float32", "optimizer": "adamw", "device": "cuda"}
    rows = [
        {
            **ON_A_GPU,
            **figures,
            **known,
            "workload": workload,
            "contender": who,
            "median_ms": ms,
        }
        for who, ms in (("fastopt", ours), ("torch fused", "8.0000"))
    ]
    write(folder / f"{name}-cuda.csv", rows, COLUMNS)


def trained_on_a_gpu(folder) -> None:
    figures = {"whole_ms": "31.7", "clip_ms": "0.3", "optimizer_ms": "0.45", "host_ms": "0.62"}
    figures |= {"tokens_per_s": "129000", "peak_mb": "2100.5", "loss": "1.25", "loss_diff": "0"}
    figures |= {"tensors": "272", "elements": "134000000", "optimizer_share": "0.0142"}
    known = {**ON_A_GPU, "model": "SmolLM2-135M", "dtype": "bfloat16", "tuning": "full"}
    rows = [
        {**known, **figures, "contender": "fastopt"},
        {**known, "contender": "torchao 8-bit", "skipped": "ImportError: no torchao"},
    ]
    write(folder / "share-cuda.csv", rows, share.COLUMNS)


def test_a_gpus_tables_are_those_of_its_figures(tmp_path):
    for name, workload, ours in (
        ("step", "bert-base", "2.1100"),
        ("bytes", "bert-base", "2.2200"),
        ("sharded", "1000x16", "2.3300"),
        ("offload", "minilm", "2.4400"),
    ):
        steps_on_a_gpu(tmp_path, name, workload, ours)
    trained_on_a_gpu(tmp_path)
    made = {name: table(tmp_path) for name, table in pages.TABLES.items() if name.endswith("cuda")}
    assert made["short-cuda"].splitlines()[2] == "| BERT-base | 8.00 | 2.11 | 4.00x |"
    assert "| BERT-base | 200 tensors, 110 M | 8.00 | 2.11 | 4.00x | 95% |" in made["step-cuda"]
    assert "AdamW, float32 parameters:\n\n" in made["bytes-cuda"]
    assert "| BERT-base | 2.22 (4.00x) | 8.00 (4.00x) |" in made["bytes-cuda"]
    assert "| plain | 1000 x 16 | 2.33 (4.00x) | 8.00 (4.00x) |" in made["sharded-cuda"]
    assert (
        "| SmolLM2-135M, bfloat16, full, 272 tensors, 134 M | fastopt | 31.7 | 0.300 | 0.450 "
        "| 0.620 | 1.4% | 129000 | 2100.5 | 1.25 | 0 |"
    ) in made["training-cuda"]
    assert "- torchao 8-bit, SmolLM2-135M, bfloat16, full: ImportError" in made["training-cuda"]
    assert "| fastopt | 8.00 | 2.44 (4.00x) |" in made["offload-cuda"]
    assert all(text.endswith("a GPU, torch 9.9, fastopt at abc1234.") for text in made.values())


def test_page_has_every_figure_of_a_gpu(tmp_path):
    times = {"step": "2.11", "around": "2.22", "bytes": "2.33", "sharded": "2.44"}
    times |= {"optimizers": "2.55", "scaling": "2.66"}
    for name, ours in times.items():
        steps_on_a_gpu(tmp_path, name, "lora-bert", ours)
    sweep = [
        {**ON_A_GPU, "contender": name, "tensors": n, "elements": str(16 * int(n)), "median_ms": ms}
        for name in ("fastopt", "torch fused")
        for n, ms in (("1", "2"), ("10", "11"))
    ]
    write(tmp_path / "scaling-cuda.csv", sweep, COLUMNS)
    trained_on_a_gpu(tmp_path)
    tuned = read(tmp_path / "step-cuda.csv")
    tuned = [{**row, "variant": "512 threads", "ratio_p20": "3.90"} for row in tuned]
    write(tmp_path / "tune-cuda.csv", tuned, ["variant", *COLUMNS])
    kernel = {"case": "AdamW", "kernel": "update<Adam>", "of_peak": "88.2", "waits": "wait 1.5"}
    write(tmp_path / "profile-cuda.csv", [{**kernel, **ON_A_GPU}], [*profile.COLUMNS, *ON_A_GPU])
    page = pages.page(tmp_path, pictures=False)
    for name, ours in times.items():
        assert (ours in page) == (name != "scaling"), name
    assert "| LoRA r=8 on BERT-base | fastopt | 4000.0 | 4200.0 | 95% | 81% |" in page
    assert "| LoRA r=8 on BERT-base | fastopt | plain | 2.11 | 0.0100 | 2.11 |" in page
    assert "| 512 threads | **4.00x, 2.11 ms** |" in page
    assert "| AdamW | update<Adam> |  |  | 88.2 |  |  | wait 1.5 |" in page
    assert "- fastopt: 1000.0 µs and 1000000 ns a tensor" in page
    assert "Share of fine-tuning small models" in page


@pytest.mark.parametrize("name", ["around", "bytes", "sharded"])
def test_parts_that_were_measured_alone_are_on_the_page(name, tmp_path):
    steps_on_a_gpu(tmp_path, name, "lora-bert", "2.7700")
    assert "2.77 (4.00x)" in pages.page(tmp_path, pictures=False)


def test_fit_finds_fixed_and_growing_cost():
    line = scaling.fit([1, 10, 100, 10_000], [5.5, 10, 55, 5005])
    assert line == pytest.approx((5, 0.5))
