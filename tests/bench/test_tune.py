"""bench/throughput/tune.py: every variant steps on the same, and the table says which is best."""

import csv
import sys
from types import SimpleNamespace

import pytest

from throughput import tune
from throughput.measure import Setting
from throughput.rows import Results

ROUNDS = {"median_ms": "2.0000", "ratio_p80": "9.00"}


def made_up(tmp_path, variant: str, ratio: str, low: str) -> list[dict[str, str]]:
    results = Results(tmp_path / f"{variant}.csv", "cpu")
    setting = Setting([(16,)], "adamw", "plain", "float32", "cpu")
    for name in ("fastopt", "torch fused"):
        results.add(
            "one-tiny", setting, {"contender": name, "ratio": ratio, "ratio_p20": low} | ROUNDS
        )
    return [{"variant": variant, **row} for row in results.rows]


def test_best_and_what_comes_as_near_as_its_rounds_lie_apart(tmp_path):
    rows = [
        *made_up(tmp_path, "a", "1.20", "1.15"),
        *made_up(tmp_path, "b", "1.30", "1.18"),
        *made_up(tmp_path, "c", "1.10", "1.00"),
    ]
    head, _, line = tune.best_table(rows).splitlines()
    assert head == "|  | situation |  | best | a | b | c |"
    assert line.endswith(
        "| plain | one of 16 (optimizer in backward) | b | **1.20x, 2.00 ms** | **1.30x, 2.00 ms** "
        "| 1.10x, 2.00 ms |"
    )


@pytest.mark.slow
def test_each_run_is_measured_under_its_settings(tmp_path, monkeypatch):
    variants = {
        tune.AS_IS: tune.Variant(),
        "one thread": tune.Variant(run={"OMP_NUM_THREADS": "1"}),
    }
    monkeypatch.setattr(tune, "VARIANTS", variants)
    monkeypatch.setattr(tune, "MEMORY", [])
    monkeypatch.setattr(tune, "LAUNCHES", tune.LAUNCHES[-1:])
    sink = tmp_path / "tune-cpu.csv"
    options = ["--device", "cpu", "--seconds", "0.01", "--workload", "one-tiny"]
    assert tune.main([*options, "--csv", str(sink)]) == 0
    with sink.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], row["contender"], row["situation"]) for row in rows} == {
        (variant, contender, "clip")
        for variant in (tune.AS_IS, "one thread")
        for contender in ("fastopt", "torch fused")
    }
    threads = {row["variant"]: row["machine"].split(", ")[-1] for row in rows}
    assert threads["one thread"] == "1 threads"
    assert "| one of 16 (optimizer in backward) |" in sink.with_suffix(".md").read_text()


def made(variant, built, args):
    """A row, in place of a measurement: the core that it would have been of."""
    if built is None and variant.build:
        raise AssertionError("it has not been built")
    row = dict.fromkeys(tune.COLUMNS, "") | {"machine": str(built), "ratio": ""}
    return [row]


def test_a_build_that_fails_loses_none_of_the_others(tmp_path, monkeypatch, capsys):
    variants = {
        tune.AS_IS: tune.Variant(),
        "good": tune.built_with(BYTES=32),
        "bad": tune.built_with(THREADS=7),
    }

    def build(name, variant, cores):
        if name == "bad":
            raise RuntimeError(f"{name} did not build: {variant.build}")
        return tmp_path / name

    monkeypatch.setattr(tune, "VARIANTS", variants)
    monkeypatch.setattr(tune, "build", build)
    monkeypatch.setattr(tune, "measure", made)
    sink = tmp_path / "tune-cuda.csv"
    assert tune.main(["--csv", str(sink)]) == 1
    assert "bad did not build: {'FASTOPT_CUDA_TUNE': 'RULES=adam+sgd;THREADS=7'}" in (
        capsys.readouterr().err
    )
    with sink.open(newline="") as file:
        measured = {row["variant"]: row["machine"] for row in csv.DictReader(file)}
    assert measured == {tune.AS_IS: "None", "good": str(tmp_path / "good")}


def test_a_variant_is_built_for_itself(monkeypatch, tmp_path):
    asked = []

    class Done:
        returncode, stdout = 0, ""

    def run(command, **kwargs):
        asked.append([str(word) for word in command])
        return Done()

    monkeypatch.setattr(tune.subprocess, "run", run)
    monkeypatch.setattr(tune, "BUILDS", tmp_path)
    found = SimpleNamespace(get_cmake_dir=lambda: "there")  # a build's, not a test's
    monkeypatch.setitem(sys.modules, "pybind11", found)
    monkeypatch.setenv("FASTOPT_CUDA_ARCHITECTURES", "90")
    target = tune.build("128 bytes, 512 threads", tune.VARIANTS["128 bytes, 512 threads"], 2)
    configure, compile = asked
    assert target == tmp_path / "128-bytes-512-threads"
    assert f"-DCMAKE_INSTALL_PREFIX={target / 'fastopt'}" in configure
    assert "-DFASTOPT_CUDA_TUNE=RULES=adam+sgd;BYTES=128;THREADS=512" in configure
    assert "-DFASTOPT_CUDA_ARCHITECTURES=90" in configure
    assert compile[-2:] == ["--parallel", "2"]
    assert (target / "fastopt" / "optimizer.py").exists()
    assert not list(target.glob("fastopt/*.so"))
