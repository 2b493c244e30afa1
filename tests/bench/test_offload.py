"""bench/offload.py: who steps on an offloaded model, and why others cannot."""

import pytest

import offload
import step
from throughput import tables
from throughput.measure import Setting
from throughput.rivals import CONTENDERS, FUSED, OURS
from throughput.rows import Results, measured, read
from throughput.workloads import WORKLOADS, elements


@pytest.mark.usefixtures("_no_process_group_stays")
def test_every_contender_has_a_figure_or_a_reason(tmp_path):
    file = tmp_path / "rows.csv"
    quick = [name for name in offload.CONTENDERS if not CONTENDERS[name].compiles]
    own = ["--workload", "one-tiny", "--seconds", "0.05", "--csv", str(file)]
    assert step.main(offload.step_options([*own, "--contender", *quick])) == 0
    rows = read(file)
    assert {row["contender"] for row in rows} == set(quick)
    assert {row["situation"] for row in rows} == {"offloaded"}
    ran = {row["contender"] for row in measured(rows)}
    assert ran == {OURS, FUSED, "fastopt bfloat16 states", "fastopt 8-bit states"}


def test_sizes_are_those_of_the_models():
    options = step.parse_options(offload.step_options(["--size", "110M", "25M"]))
    assert options.workload == ["bert-base", "minilm"]
    assert options.contender == list(offload.CONTENDERS)
    for size, workload in offload.SIZES.items():
        millions = elements(WORKLOADS[workload].shapes()) / 1e6
        assert millions == pytest.approx(float(size.removesuffix("M")), rel=0.1)


def test_table_has_times_states_and_reasons(tmp_path):
    results = Results(tmp_path / "offload-cpu.csv", "cpu")
    setting = Setting([(1 << 10, 1 << 10)], "adamw", "offloaded", "float32", "cpu")
    for name, ratio in ((FUSED, "1.00"), (OURS, "1.25")):
        figures = {"median_ms": "20.0", "ratio": ratio, "state_bytes_per_param": "8.00"}
        results.add("minilm", setting, {"contender": name, **figures})
    results.add("minilm", setting, {"contender": "torchao offload", "skipped": "only CUDA"})
    table = tables.offload_table(tmp_path, "cpu")
    assert "| fastopt | 8.00 | 20.0 (1.25x) |" in table
    assert "- torchao offload: only CUDA" in table
