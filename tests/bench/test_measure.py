"""Contenders step in turn, in every situation; what cannot run is skipped, and says why."""

import pytest
import torch
from torch.distributed.tensor import DTensor

import cases
from throughput import measure, memory, rivals, situations


def tiny(situation: str = "plain") -> measure.Setting:
    return measure.Setting([(16,), (3, 5)], "adamw", situation, "float32", "cpu")


def measured(setting: measure.Setting, *contenders: str) -> list[dict[str, str]]:
    return list(measure.measure(setting, contenders, seconds=0.01, patience=5))


@pytest.mark.parametrize(
    ("optimizer", "reference", "lacking"),
    [
        ("adagrad", "torch fused", {"authors' loop"}),
        ("rprop", "torch foreach", {"torch fused", "authors' loop"}),
        ("lion", "authors' loop", {"torch fused", "torch foreach"}),
    ],
)
def test_a_ratio_is_to_the_best_known_step_that_there_is(optimizer, reference, lacking):
    setting = measure.Setting([(16,)], optimizer, "plain", "float32", "cpu")
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
    ours, skipped = measure.measure(tiny(), ["fastopt", "rival"], seconds=0.01, patience=2)
    assert float(ours["ratio"]) > 0
    assert skipped["skipped"].startswith(why)
    assert "\n" not in skipped["skipped"]


def test_who_offloads_is_not_measured_where_nothing_is():
    (row,) = measured(tiny(), "torchao offload")
    assert row["skipped"] == "ValueError: it is for --situation offloaded"


def test_contenders_that_do_not_fit_together_step_in_groups(monkeypatch):
    room_for_two = 2.5 * situations.Plain.bytes_per_element * 31
    monkeypatch.setattr(measure.machine, "free_bytes", lambda device: room_for_two)
    names = ["fastopt", "torch fused", "torch foreach", "torch loop"]
    rows = measured(tiny(), *names)
    assert sorted(row["contender"] for row in rows) == sorted(names)
    assert all(float(row["ratio"]) > 0 for row in rows)


def test_what_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(measure.machine, "free_bytes", lambda device: 0)
    (row,) = measured(tiny(), "fastopt")
    assert row["skipped"].startswith(measure.TOO_LARGE)


@pytest.mark.usefixtures("_no_process_group_stays")
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
            assert (old != new.detach()).all()


def test_fresh_gradients_lie_elsewhere_each_time():
    situation = tiny("fresh").clock("fastopt").situation
    situation.before()
    before = [param.grad.data_ptr() for param in situation.params]
    situation.before()
    after = [param.grad.data_ptr() for param in situation.params]
    assert not set(before) & set(after)


@pytest.mark.usefixtures("_no_process_group_stays")
def test_sharded_parameters_are_those_of_all_contenders():
    ours, theirs = (tiny("sharded").clock(name).situation for name in ("fastopt", "torch fused"))
    assert all(isinstance(param, DTensor) for param in ours.params)
    assert ours.params is theirs.params
    assert tiny("sharded").clock("fastopt").situation.params is ours.params


def test_shared_and_nested_states_are_counted_once():
    table = torch.zeros(256)
    situation = tiny().clock("fastopt").situation
    optimizer = situation.optimizers[0]
    for param in situation.params:
        optimizer.state[param] = {"nested": [param.detach(), {"table": table}]}
    assert memory.state_bytes(situation.optimizers) == 4 * (256 + 31)
