"""Lion, which has no class of torch's to inherit from, nor a step of torch's to fall back to."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

import fastopt
import lion
from cases import FLOAT64, Case
from helpers import assert_agrees_with_torch, assert_equal, pair, snapshot, train


def one():
    param = Parameter(torch.ones(2, 3))
    param.grad = torch.full((2, 3), 0.5)
    return param


def test_defaults_and_group_keys_are_its_authors():
    ours, theirs = fastopt.Lion([one()]), lion.Lion([one()])
    assert ours.defaults == theirs.defaults
    assert ours.defaults["lr"] == 1e-4
    assert ours.defaults["betas"] == (0.9, 0.99)
    assert ours.defaults["weight_decay"] == 0
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        fastopt.Lion([one()], **options)


def test_momentum_is_all_it_keeps():
    param = one()
    optimizer = fastopt.Lion([param], lr=0.25, betas=(0.9, 0.5), weight_decay=0.5)
    optimizer.step()
    assert_equal(optimizer.state[param], {"exp_avg": torch.full((2, 3), 0.25)})
    assert_equal(param.detach(), torch.full((2, 3), 1 - 0.125 - 0.25))


def test_checkpoints_go_both_ways():
    case = Case("Lion", "everything", FLOAT64, "sizes")
    ours, theirs = pair(case)
    for first, second in ((ours, theirs), (theirs, ours)):
        train(case, first, range(2))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        with torch.no_grad():
            for mine, its in zip(
                second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True
            ):
                mine.copy_(its)
    train(case, ours, range(2))
    train(case, theirs, range(2))
    assert_agrees_with_torch(ours, theirs)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_copies_train_on(copied):
    case = Case("Lion", "everything", FLOAT64, "sizes")
    original = case.make_optimizer(case.parameters(), fastopt, backend="cpu")
    train(case, original, range(2))
    twin = copied(original)
    for optimizer in (original, twin):
        train(case, optimizer, range(2, 4))
    assert_equal(snapshot(twin), snapshot(original))


def test_backend_torch_is_refused():
    with pytest.raises(ValueError, match=r"torch.optim has no Lion"):
        fastopt.Lion([one()], backend="torch")


def test_gradscaler_unscales_for_it():
    assert not fastopt.Lion([one()])._step_supports_amp_scaling


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
@pytest.mark.parametrize("reason", ["sparse", "twice"])
def test_step_that_torch_would_have_to_make_is_refused_and_changes_nothing(reason):
    param = one()
    if reason == "sparse":
        param.grad = param.grad.to_sparse()
    optimizer = fastopt.Lion([param] * (2 if reason == "twice" else 1))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"{reason}.*torch.optim has none.*dense tensors"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)
