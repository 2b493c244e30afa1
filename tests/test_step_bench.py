"""bench/step.py: the rows it writes, by the command the README gives."""

import csv
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "step.py"

COLUMNS = [
    *("workload", "optimizer", "contender", "situation", "dtype", "device"),
    *("median_ms", "p20_ms", "p80_ms", "host_ms"),
    *("gb_per_s", "ceiling_share", "ratio_to_torch_fused"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_rows_of_one_workload(tmp_path):
    file = tmp_path / "rows.csv"
    done = run("--workload", "mlp", "--optimizer", "adamw", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(file.open()))
    assert [row["contender"] for row in rows] == ["fastopt", "torch fused"]
    for row in rows:
        assert list(row) == COLUMNS
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["host_ms"]) <= float(row["median_ms"])
        assert row["median_ms"] in done.stdout
    assert float(rows[1]["ratio_to_torch_fused"]) == 1


def test_share_of_the_ceiling_where_memory_bounds_the_step(tmp_path):
    file = tmp_path / "rows.csv"
    done = run("--workload", "300x65536", "--optimizer", "sgd-momentum", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    for row in csv.DictReader(file.open()):
        # It moves 20 bytes a parameter: GB/s and milliseconds must say the same.
        moved = float(row["gb_per_s"]) * float(row["median_ms"]) * 1e6
        assert abs(moved / (20 * 300 * 65536) - 1) < 0.01
        assert float(row["ceiling_share"]) > 0


def test_unknown_workload_is_refused_with_the_names():
    done = run("--workload", "nonsense")
    assert done.returncode == 2
    assert "lora-bert" in done.stderr
