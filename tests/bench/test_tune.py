"""bench/throughput/tune.py: every variant steps on the same, and the table says which is best."""

import csv

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
def test_each_variant_is_measured_under_its_settings(tmp_path, monkeypatch, capfd):
    """One that does not build loses none of the others."""
    variants = {
        tune.AS_IS: tune.Variant(),
        "one thread": tune.Variant(run={"OMP_NUM_THREADS": "1"}),
        "no such build": tune.Variant(build={"CXX": "no-such-compiler"}),
    }

    def build(name, variant):
        raise RuntimeError(f"{name} did not build")

    monkeypatch.setattr(tune, "VARIANTS", variants)
    monkeypatch.setattr(tune, "COMPARISONS", tune.COMPARISONS[-1:])
    monkeypatch.setattr(tune, "build", build)
    sink = tmp_path / "tune-cpu.csv"
    options = ["--device", "cpu", "--seconds", "0.01", "--workload", "one-tiny"]
    assert tune.main([*options, "--csv", str(sink)]) == 1
    said = capfd.readouterr()
    assert "no such build did not build" in said.err
    with sink.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], row["contender"]) for row in rows} == {
        (variant, contender)
        for variant in (tune.AS_IS, "one thread")
        for contender in ("fastopt", "torch fused")
    }
    threads = {row["variant"]: row["machine"].split(", ")[-1] for row in rows}
    assert threads["one thread"] == "1 threads"
    assert "| one of 16 (optimizer in backward) |" in sink.with_suffix(".md").read_text()


def test_a_variant_is_built_for_itself(monkeypatch, tmp_path):
    asked = []

    class Done:
        returncode, stdout = 0, ""

    def run(command, env, **kwargs):
        asked.append((command, env))
        return Done()

    monkeypatch.setattr(tune.subprocess, "run", run)
    monkeypatch.setattr(tune, "BUILDS", tmp_path)
    target = tune.build("48 KiB", tune.Variant(build={"FASTOPT_TUNED": "48"}))
    ((command, environment),) = asked
    assert target == tmp_path / "48-KiB"
    assert command[command.index("--target") + 1] == str(target)
    assert environment["FASTOPT_TUNED"] == "48"
