"""bench/step.py: the rows it writes, by the command the README gives; what it skips, and flags."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import step
from throughput import rivals
from throughput.rows import COLUMNS, regressions

BRIEF = ["--seconds", "0.2"]
PAIR = ["--contender", "fastopt", "torch fused"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, step.__file__, *BRIEF, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


def test_rows_of_one_workload(tmp_path):
    file = tmp_path / "rows.csv"
    done = run("--workload", "mlp", "--optimizer", "adamw", *PAIR, "--csv", str(file))
    assert done.returncode == 0, done.stderr
    rows = rows_of(file)
    assert [row["contender"] for row in rows] == ["fastopt", "torch fused"]
    for row in rows:
        assert list(row) == COLUMNS
        assert (row["tensors"], row["elements"]) == ("200", "105600")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["host_ms"]) <= float(row["median_ms"])
        assert float(row["state_bytes_per_param"]) == 8
        assert row["median_ms"] in done.stdout
    assert float(rows[1]["ratio"]) == 1


@pytest.mark.slow
def test_share_of_the_ceiling_where_memory_bounds_the_step(tmp_path):
    file = tmp_path / "rows.csv"
    done = run(
        *("--workload", "300x65536", "--optimizer", "sgd-momentum", *PAIR, "--csv", str(file))
    )
    assert done.returncode == 0, done.stderr
    for row in rows_of(file):
        # It moves 20 bytes a parameter: GB/s, given to a tenth, and milliseconds must say the same.
        speed = 20 * 300 * 65536 / float(row["median_ms"]) / 1e6
        assert abs(float(row["gb_per_s"]) - speed) < 0.051
        assert float(row["ceiling_share"]) > 0


@pytest.mark.slow
def test_appended_rows_follow_those_that_are_there(tmp_path):
    file = tmp_path / "rows.csv"
    for name in ("adamw", "sgd"):
        arguments = ["--workload", "one-tiny", "--optimizer", name, "--contender", "fastopt"]
        done = run(*arguments, "--csv", str(file), "--append")
        assert done.returncode == 0, done.stderr
    assert [row["optimizer"] for row in rows_of(file)] == ["adamw", "sgd"]


def test_unknown_workload_is_refused_with_the_names():
    done = run("--workload", "nonsense")
    assert done.returncode == 2
    assert "lora-bert" in done.stderr


def falls_back(params, name, **options):
    """Stepped by torch, with a warning: its gradients are sparse."""
    optimizer = rivals.fastopt(params, name, **options)

    def make_sparse(*_):
        for param in params:
            param.grad = param.grad.to_sparse()

    optimizer.register_step_pre_hook(make_sparse)
    return optimizer


def test_a_step_that_torch_makes_is_not_timed_as_ours(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    monkeypatch.setitem(rivals.CONTENDERS, "fastopt", rivals.Contender(falls_back, "fastopt"))
    arguments = ["--workload", "one-tiny", "--optimizer", "sgd", *PAIR, "--csv", str(file)]
    assert step.main([*BRIEF, *arguments]) == 1
    skipped = {row["contender"]: row["skipped"] for row in rows_of(file)}
    assert "steps through torch.optim" in skipped["fastopt"]
    assert not skipped["torch fused"]


def row_with_ratios(p20: str, median: str, p80: str) -> dict[str, str]:
    key = dict.fromkeys(COLUMNS, "") | {"workload": "mlp", "contender": "fastopt"}
    return key | {"ratio_p20": p20, "ratio": median, "ratio_p80": p80}


def test_only_what_is_slower_by_more_than_both_spreads_is_flagged():
    old = [row_with_ratios("1.9", "2.0", "2.1")]
    assert regressions([row_with_ratios("1.7", "1.85", "1.95")], old) == []
    assert regressions([row_with_ratios("2.5", "2.6", "2.7")], old) == []
    (line,) = regressions([row_with_ratios("1.6", "1.7", "1.8")], old)
    assert "mlp" in line


@pytest.mark.slow
def test_a_regression_is_an_error(tmp_path):
    file, faster = tmp_path / "rows.csv", tmp_path / "faster.csv"
    chosen = ["--workload", "one-tiny", "--optimizer", "adamw", *PAIR]
    assert run(*chosen, "--csv", str(file)).returncode == 0
    rows = rows_of(file)
    for row in rows:
        row["ratio_p20"] = "1000"
    with faster.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    done = run(*chosen, "--compare", str(faster))
    assert done.returncode == 1
    assert "slower: one-tiny adamw" in done.stdout
