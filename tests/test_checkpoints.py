"""Training goes on from a checkpoint: torch's in ours, ours in torch, ours in ours bit for bit."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import fastopt
from cases import BFLOAT16, CASES, FLOAT32, FLOAT64, Case, state_names
from helpers import (
    assert_agrees_with_torch,
    assert_equal,
    assert_same_tensors,
    every_optimizer,
    native_only,
    parameters,
    snapshot,
    train,
)

pytestmark = native_only

PEERS = {
    "torch for-loop": (torch.optim, {"foreach": False, "fused": False}),
    "torch foreach": (torch.optim, {"foreach": True}),
    "torch fused": (torch.optim, {"fused": True}),
    "fastopt": (fastopt, {}),
    "fastopt fused=True": (fastopt, {"fused": True}),
}
every_peer = pytest.mark.parametrize(("module", "engine"), PEERS.values(), ids=PEERS)

Checkpoint = dict[str, Any]


def through_a_file(checkpoint: Checkpoint) -> Checkpoint:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save(optimizer: torch.optim.Optimizer) -> Checkpoint:
    params = [param.detach() for param in parameters(optimizer)]
    return {"params": params, "optimizer": optimizer.state_dict()}


def load(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        for param, saved in zip(parameters(optimizer), checkpoint["params"], strict=True):
            param.copy_(saved)
    optimizer.load_state_dict(checkpoint["optimizer"])


def resumed(
    case: Case, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> torch.optim.Optimizer:
    """After three more steps from the checkpoint, taken by an optimizer already in use."""
    train(case, optimizer, range(100, 102))
    load(optimizer, through_a_file(checkpoint))
    train(case, optimizer, range(3, 6))
    return optimizer


def checkpoint_after_three_steps(case: Case, module: Any, **engine: Any) -> Checkpoint:
    optimizer = case.make_optimizer(case.parameters(), module, **engine)
    train(case, optimizer, range(3))
    return save(optimizer)


def straight_through(case: Case, module: Any = torch.optim, **engine: Any):
    optimizer = case.make_optimizer(case.parameters(), module, **engine)
    train(case, optimizer, range(6))
    return optimizer


def as_resumed_by(module: Any, case: Case) -> torch.optim.Optimizer:
    """Ours goes on as if it had not stopped; so does torch's, unless loading changes a dtype:
    NAdam's mu_product, ASGD's eta and mu take the parameter's."""
    if module is fastopt:
        return straight_through(case, foreach=False)
    stock = case.make_optimizer(case.parameters(), foreach=False)
    return resumed(case, stock, checkpoint_after_three_steps(case, torch.optim, foreach=False))


@every_optimizer
@every_peer
def test_checkpoint_resumes_in_fastopt(name, module, engine):
    case = Case(name, "everything", FLOAT64, "sizes")
    checkpoint = checkpoint_after_three_steps(case, module, **engine)
    ours = case.make_optimizer(case.parameters(), fastopt)
    resumed(case, ours, checkpoint)
    if name == "ASGD" and engine.get("foreach"):  # whose powers are float32 there
        assert_same_tensors(ours, straight_through(case, foreach=False), rtol=1e-6, atol=1e-6)
    else:
        assert_agrees_with_torch(ours, straight_through(case, foreach=False))


@every_optimizer
@every_peer
def test_checkpoint_of_fastopt_resumes_in(name, module, engine):
    case = Case(name, "everything", FLOAT64, "sizes")
    checkpoint = checkpoint_after_three_steps(case, fastopt)
    theirs = resumed(case, case.make_optimizer(case.parameters(), module, **engine), checkpoint)
    assert_agrees_with_torch(theirs, as_resumed_by(module, case))


# Every dtype and layout, but for states narrower than their parameter: those are widened on load.
LASTING = [
    case
    for case in CASES
    if case.options == "everything" and case.dtypes.state.itemsize >= case.dtypes.param.itemsize
]


@pytest.mark.parametrize("case", LASTING, ids=str)
def test_resuming_is_never_having_stopped_bit_for_bit(case):
    checkpoint = checkpoint_after_three_steps(case, fastopt)
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    resumed(case, optimizer, checkpoint)
    assert_equal(snapshot(optimizer), snapshot(straight_through(case, fastopt)))


@every_optimizer
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_copy_of_an_optimizer_trains_on_like_the_original_and_apart_from_it(name, copied):
    case = Case(name, "everything", FLOAT32, "sizes")
    original = case.make_optimizer(case.parameters(), fastopt)
    train(case, original, range(3))
    at_three = snapshot(original)
    twin = copied(original)
    train(case, twin, range(3, 6))
    assert_equal(snapshot(original), at_three)
    train(case, original, range(3, 6))
    assert_equal(snapshot(twin), snapshot(original))


@every_optimizer
def test_state_dict_is_torchs(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    ours, stock = (
        checkpoint_after_three_steps(case, module)["optimizer"] for module in (fastopt, torch.optim)
    )
    assert ours["param_groups"] == stock["param_groups"]
    torch.testing.assert_close(ours["state"], stock["state"], rtol=1e-12, atol=1e-14)


@every_optimizer
@pytest.mark.parametrize("writer", [fastopt, torch.optim], ids=["fastopt", "torch"])
@pytest.mark.parametrize("reader", [fastopt, torch.optim], ids=["fastopt", "torch"])
@pytest.mark.parametrize("named", ["writer", "reader", "both"])
def test_names_travel_with_a_checkpoint(name, writer, reader, named):
    case = Case(name, "everything", FLOAT64, "sizes")

    def make(module, with_names, prefix):
        params = case.parameters()
        given = [(f"{prefix}.{i}", param) for i, param in enumerate(params)]
        return case.make_optimizer(given if with_names else params, module)

    saved = make(writer, named in ("writer", "both"), "writer")
    train(case, saved, range(3))
    loaded = make(reader, named in ("reader", "both"), "reader")
    resumed(case, loaded, save(saved))
    assert_agrees_with_torch(loaded, as_resumed_by(reader, case))
    owner = "reader" if named == "reader" else "writer"
    assert loaded.param_groups[0]["param_names"][0] == f"{owner}.0"


# What torch's __setstate__ fills in when a checkpoint lacks it.
NEWER_OPTIONS = {
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
    *("nesterov", "decoupled_weight_decay"),
}


@every_optimizer
@pytest.mark.parametrize("number", [int, float])
def test_checkpoint_from_before_tensor_steps_and_newer_options_loads(name, number):
    case = Case(name, "default", FLOAT64, "sizes")
    checkpoint = checkpoint_after_three_steps(case, torch.optim)
    for state in checkpoint["optimizer"]["state"].values():
        if "step" in state:
            state["step"] = number(state["step"])
    for group in checkpoint["optimizer"]["param_groups"]:
        for key in NEWER_OPTIONS & group.keys():
            del group[key]
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    load(optimizer, checkpoint)
    train(case, optimizer, range(3, 6))
    assert_agrees_with_torch(optimizer, straight_through(case, foreach=False))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_float64_step_counts_load(name, shape):
    """Written by torch under torch.set_default_dtype(torch.float64)."""
    case = Case(name, "default", FLOAT64, "sizes")
    checkpoint = checkpoint_after_three_steps(case, torch.optim)
    for state in checkpoint["optimizer"]["state"].values():
        state["step"] = state["step"].double().reshape(shape)
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    load(optimizer, checkpoint)
    train(case, optimizer, range(3, 6))
    straight = straight_through(case, foreach=False)
    for ours, stock in zip(parameters(optimizer), parameters(straight), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)
        assert optimizer.state[ours]["step"].item() == 6


def test_momentum_buffer_of_none_is_a_first_step():
    """Older torch saved None for parameters that had not had a gradient yet."""
    case = Case("SGD", "everything", FLOAT64, "sizes")
    checkpoint = save(case.make_optimizer(case.parameters()))
    for index in range(len(checkpoint["params"])):
        checkpoint["optimizer"]["state"][index] = {"momentum_buffer": None}
    trained = []
    for module in (fastopt, torch.optim):
        optimizer = case.make_optimizer(case.parameters(), module)
        load(optimizer, checkpoint)
        train(case, optimizer, range(3))
        trained.append(optimizer)
    assert_agrees_with_torch(*trained)


@every_optimizer
def test_wider_state_of_16_bit_parameters_is_loaded_as_it_is(name):
    """torch truncates it to the parameter's dtype."""
    case = Case(name, "everything", BFLOAT16, "sizes")
    saved = case.make_optimizer(case.parameters(), fastopt)
    train(case, saved, range(1))
    for state in saved.state.values():
        for key in state_names(saved):
            state[key] = state[key].float() * (1 + 2**-12)
    loaded = case.make_optimizer(case.parameters(), fastopt)
    load(loaded, through_a_file(save(saved)))
    for optimizer in (saved, loaded):
        train(case, optimizer, range(1, 4))
    assert_equal(snapshot(loaded), snapshot(saved))
    for state in loaded.state.values():
        assert {state[key].dtype for key in state_names(loaded)} == {torch.float32}


@every_optimizer
def test_narrower_state_takes_the_parameters_dtype_as_in_torch(name):
    """A checkpoint of a bfloat16 model goes on in float32."""
    narrow = checkpoint_after_three_steps(Case(name, "everything", BFLOAT16, "sizes"), fastopt)
    case = Case(name, "everything", FLOAT32, "sizes")
    loaded = case.make_optimizer(case.parameters(), fastopt)
    load(loaded, narrow)
    for index, param in enumerate(parameters(loaded)):
        for key in state_names(loaded):
            saved = narrow["optimizer"]["state"][index][key]
            assert_equal(loaded.state[param][key], saved.float())


@every_optimizer
@pytest.mark.parametrize("first", [fastopt, torch.optim], ids=["fastopt", "torch"])
@pytest.mark.parametrize("second", [fastopt, torch.optim], ids=["fastopt", "torch"])
def test_state_handed_over_in_memory_is_carried_on(name, first, second):
    case = Case(name, "everything", FLOAT64, "sizes")
    params = case.parameters()
    before = case.make_optimizer(params, first)
    train(case, before, range(3))
    after = case.make_optimizer(params, second)
    after.state = before.state
    train(case, after, range(3, 6))
    assert_agrees_with_torch(after, straight_through(case, foreach=False))
