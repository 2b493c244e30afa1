"""bench/step.py: the rows it writes, by the command the README gives; what it skips, and flags."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import step
from throughput import rivals, situations, workloads

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
        assert list(row) == step.COLUMNS
        assert (row["tensors"], row["elements"]) == ("200", "105600")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["host_ms"]) <= float(row["median_ms"])
        assert float(row["state_bytes_per_param"]) == 8
        assert row["median_ms"] in done.stdout
    assert float(rows[1]["ratio"]) == 1


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


def tiny(situation: str = "plain") -> step.Setting:
    return step.Setting([(16,), (3, 5)], "adamw", situation, "float32", "cpu")


def measured(setting: step.Setting, *contenders: str) -> list[dict[str, str]]:
    return list(step.measure(setting, contenders, seconds=0.01, patience=5))


@pytest.mark.parametrize(
    ("optimizer", "reference", "lacking"),
    [
        ("adagrad", "torch fused", {"authors' loop"}),
        ("rprop", "torch foreach", {"torch fused", "authors' loop"}),
        ("lion", "authors' loop", {"torch fused", "torch foreach"}),
    ],
)
def test_a_ratio_is_to_the_best_known_step_that_there_is(optimizer, reference, lacking):
    setting = step.Setting([(16,)], optimizer, "plain", "float32", "cpu")
    rows = measured(setting, "fastopt", "torch fused", "torch foreach", "authors' loop")
    assert {row["contender"] for row in rows if "skipped" in row} == lacking
    assert {row["contender"] for row in rows if row.get("ratio_p20") == "1.00"} == {reference}


@pytest.mark.parametrize(
    ("contender", "flags"),
    [("torch fused", (True, None)), ("torch foreach", (None, True)), ("torch loop", (None, False))],
)
@pytest.mark.parametrize("name", cases.IN_TORCH)
def test_torchs_own_contenders_are_what_their_names_say(name, contender, flags):
    params = [torch.nn.Parameter(torch.zeros(1))]
    if contender == "torch fused" and rivals.reference_of(name) != contender:
        with pytest.raises(TypeError, match="fused"):
            rivals.CONTENDERS[contender].make(params, name)
        return
    (group,) = rivals.CONTENDERS[contender].make(params, name).param_groups
    assert (group.get("fused"), group["foreach"]) == flags


def broken(params, name, **options):
    raise ImportError("no such library\nand how to install it")


def stuck(params, name, **options):
    while True:
        pass


@pytest.mark.parametrize(
    ("make", "why"), [(broken, "ImportError: no such library"), (stuck, "TimeoutError: not ready")]
)
def test_a_contender_that_cannot_run_is_skipped_with_its_reason(monkeypatch, make, why):
    monkeypatch.setitem(rivals.CONTENDERS, "rival", rivals.Contender(make, "rival"))
    ours, skipped = step.measure(tiny(), ["fastopt", "rival"], seconds=0.01, patience=2)
    assert float(ours["ratio"]) > 0
    assert skipped["skipped"].startswith(why)
    assert "\n" not in skipped["skipped"]


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


def test_contenders_that_do_not_fit_together_step_in_groups(monkeypatch):
    room_for_two = 2.5 * step.BYTES_PER_ELEMENT * 31
    monkeypatch.setattr(step.machine, "free_bytes", lambda device: room_for_two)
    names = ["fastopt", "torch fused", "torch foreach", "torch loop"]
    rows = measured(tiny(), *names)
    assert sorted(row["contender"] for row in rows) == sorted(names)
    assert all(float(row["ratio"]) > 0 for row in rows)


def test_what_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(step.machine, "free_bytes", lambda device: 0)
    (row,) = measured(tiny(), "fastopt")
    assert row["skipped"].startswith(step.TOO_LARGE)


@pytest.mark.parametrize("name", [name for name in situations.SITUATIONS if name != "graph"])
def test_every_situation_steps(name):
    """Each turn moves every parameter, whatever surrounds it; or all that there is, gradients."""
    clock = tiny(name).clock("fastopt")
    for _ in range(2):
        params = clock.situation.params
        clock.situation.before()
        before = [t.detach().clone() for p in params for t in (p, p.grad)]
        clock.turn()
        moved = params if name != "clip alone" else [param.grad for param in params]
        for old, new in zip(before[name == "clip alone" :: 2], moved, strict=True):
            assert (old != new).all()


def test_fresh_gradients_lie_elsewhere_each_time():
    situation = tiny("fresh").clock("fastopt").situation
    situation.before()
    before = [param.grad.data_ptr() for param in situation.params]
    situation.before()
    after = [param.grad.data_ptr() for param in situation.params]
    assert not set(before) & set(after)


def test_shared_and_nested_states_are_counted_once():
    table = torch.zeros(256)
    situation = tiny().clock("fastopt").situation
    optimizer = situation.optimizers[0]
    for param in situation.params:
        optimizer.state[param] = {"nested": [param.detach(), {"table": table}]}
    assert step.state_bytes(situation.optimizers) == 4 * (256 + 31)


def row_with_ratios(p20: str, median: str, p80: str) -> dict[str, str]:
    key = dict.fromkeys(step.COLUMNS, "") | {"workload": "mlp", "contender": "fastopt"}
    return key | {"ratio_p20": p20, "ratio": median, "ratio_p80": p80}


def test_only_what_is_slower_by_more_than_both_spreads_is_flagged():
    old = [row_with_ratios("1.9", "2.0", "2.1")]
    assert step.regressions([row_with_ratios("1.7", "1.85", "1.95")], old) == []
    assert step.regressions([row_with_ratios("2.5", "2.6", "2.7")], old) == []
    (line,) = step.regressions([row_with_ratios("1.6", "1.7", "1.8")], old)
    assert "mlp" in line


def test_a_regression_is_an_error(tmp_path):
    file, faster = tmp_path / "rows.csv", tmp_path / "faster.csv"
    chosen = ["--workload", "one-tiny", "--optimizer", "adamw", *PAIR]
    assert run(*chosen, "--csv", str(file)).returncode == 0
    rows = rows_of(file)
    for row in rows:
        row["ratio_p20"] = "1000"
    with faster.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, step.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    done = run(*chosen, "--compare", str(faster))
    assert done.returncode == 1
    assert "slower: one-tiny adamw" in done.stdout


def test_models_have_their_published_sizes():
    published = {"bert-base": (201, 109.5e6), "resnet50": (161, 25.6e6), "minilm": (103, 22.7e6)}
    published |= {"gpt2-xl": (580, 1.558e9), "llama-1b": (146, 1.236e9)}
    for name, (tensors, elements) in published.items():
        shapes = workloads.WORKLOADS[name].shapes()
        assert len(shapes) == tensors
        assert workloads.elements(shapes) == pytest.approx(elements, rel=2e-3)


def test_lora_adds_two_factors_to_each_linear_layer():
    # Llama-7B: q, k, v and o of 32 layers, 4096 wide.
    shapes = workloads.WORKLOADS["lora-llama-7b"].shapes()
    assert len(shapes) == 2 * 4 * 32
    assert set(shapes) == {(8, 4096), (4096, 8)}
