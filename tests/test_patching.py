"""torch's constructors give our optimizers, whoever holds torch's classes and since when."""

import contextlib
import copy
import inspect
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer, as_functional_optim
from torch.optim import AdamW as AdamWOfOld  # as a module does that was imported before
from torch.optim import lr_scheduler

import fastopt
from cases import IN_TORCH
from fastopt.optimizer import FusedOptimizer
from helpers import assert_equal, every_optimizer, native_only

pytestmark = native_only


def is_ours(optimizer) -> bool:
    return isinstance(optimizer, FusedOptimizer)


@pytest.fixture(autouse=True)
def _nothing_stays_patched():
    inits = {name: getattr(torch.optim, name).__init__ for name in IN_TORCH}
    yield
    assert inits == {name: getattr(torch.optim, name).__init__ for name in inits}


@pytest.fixture
def model():
    return torch.nn.Linear(3, 2)


def step(optimizer, model):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


@every_optimizer
def test_torchs_constructor_makes_our_optimizer(name):
    stock, ours = getattr(torch.optim, name), getattr(fastopt, name)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with fastopt.patch():
        made = stock(models[0].parameters(), lr=0.1)
    assert type(made) is ours
    assert isinstance(made, stock)
    assert repr(made) == repr(ours(models[1].parameters(), lr=0.1))
    for _ in range(2):
        step(made, models[0])
    its_like = ours(models[1].parameters(), lr=0.1)
    for _ in range(2):
        step(its_like, models[1])
    assert_equal(models[0].state_dict(), models[1].state_dict())
    assert_equal(made.state_dict(), its_like.state_dict())


def test_what_torch_has_and_we_do_not_stays(model):
    with fastopt.patch():
        assert type(torch.optim.LBFGS(model.parameters())) is torch.optim.LBFGS
        assert type(fastopt.Lion(model.parameters())) is fastopt.Lion


def test_no_name_and_no_signature_changes():
    before = {name: getattr(torch.optim, name) for name in IN_TORCH}
    signatures = {name: inspect.signature(cls) for name, cls in before.items()}
    with fastopt.patch():
        assert {name: getattr(torch.optim, name) for name in before} == before
        assert {name: inspect.signature(cls) for name, cls in before.items()} == signatures


def test_it_ends_with_the_context_and_what_was_made_stays(model):
    before = AdamWOfOld(model.parameters())
    with contextlib.suppress(KeyboardInterrupt), fastopt.patch():
        made = AdamWOfOld(model.parameters())
        assert not is_ours(before)
        raise KeyboardInterrupt
    assert not is_ours(AdamWOfOld(model.parameters()))
    assert is_ours(made)
    step(made, model)


def test_contexts_nest_and_the_options_of_the_last_one_count(model):
    def made(**kwargs):
        return torch.optim.SGD(model.parameters(), momentum=0.9, **kwargs)

    with fastopt.patch(max_grad_norm=1.0):
        outer = fastopt.patch(states="bfloat16")
        with fastopt.patch(states="8bit"):
            assert made()._states == "8bit"
            assert made(states="float32")._states == "float32"
            assert made()._passes is None
        assert made()._states == "bfloat16"
        with outer:
            pass
        optimizer = made()
        step(optimizer, model)
        assert optimizer._states is None
        assert optimizer.grad_norm > 0
    assert not is_ours(made())


def test_option_that_is_refused_patches_nothing(model):
    with pytest.raises(ValueError, match="unknown states '4bit'"):
        fastopt.patch(states="4bit")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sates'"):
        fastopt.patch(sates="8bit")
    assert not is_ours(torch.optim.AdamW(model.parameters()))


def test_torchs_own_errors_are_the_same(model):
    with fastopt.patch():
        with pytest.raises(ValueError, match="Invalid learning rate: -1"):
            torch.optim.AdamW(model.parameters(), lr=-1)
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            torch.optim.AdamW(model.parameters(), fused=True, foreach=True)


def test_class_that_inherits_from_torchs_keeps_its_step(model):
    class Mine(torch.optim.AdamW):
        pass

    with fastopt.patch():
        assert type(Mine(model.parameters())) is Mine


def test_copies_and_pickles_are_of_the_class_that_was_copied(model):
    stock = torch.optim.AdamW(model.parameters())
    with fastopt.patch():
        made = torch.optim.AdamW(model.parameters())
        for optimizer in (stock, made):
            for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                assert type(again) is type(optimizer)
    assert type(pickle.loads(pickle.dumps(made))) is fastopt.AdamW


def test_contexts_of_two_threads_may_end_in_any_order(model):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with fastopt.patch():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with fastopt.patch():
        thread.start()
        inside.wait()
    assert is_ours(torch.optim.AdamW(model.parameters()))
    leave.set()
    thread.join()
    assert not is_ours(torch.optim.AdamW(model.parameters()))


def test_classes_that_torch_is_given_to_call(model, tmp_path):
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        with fastopt.patch():
            sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    finally:
        torch.distributed.destroy_process_group()
    assert is_ours(sharded.optim)


def test_functions_that_torch_has_for_its_classes_stay(model):
    """Whoever asks torch.distributed for them gets torch's own step."""
    with fastopt.patch():
        functional = as_functional_optim(torch.optim.AdamW, lr=0.1)
    assert type(functional).__module__.startswith("torch.distributed.optim")


def test_scheduler_and_scaler_work_on_what_was_made(model):
    with fastopt.patch():
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert optimizer._step_supports_amp_scaling
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(optimizer, model)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


# Holds torch's class in each of the ways that programs do.
LIBRARY = """
import dataclasses
import torch
from torch.optim import AdamW, SGD as Momentum

registry = {"adamw": AdamW, "sgd": torch.optim.SGD}
tried = [AdamW, Momentum]

@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: type = torch.optim.AdamW

class Inheriting(AdamW):
    pass

def by_default(params, cls=AdamW):
    return cls(params, eps=1e-5 if cls == torch.optim.AdamW else 1e-8)

def all_of_them(params):
    yield AdamW(params)
    yield getattr(torch.optim, "AdamW")(params)
    yield registry["adamw"](params)
    yield tried[0](params)
    yield Config().optimizer(params)
    yield by_default(params)
    yield Momentum(params)
"""

PROGRAM = """
import sys
import library_imported_before
import fastopt
fastopt.patch()
import library_imported_after
import torch

params = [torch.nn.Parameter(torch.ones(2))]
for library in (library_imported_before, library_imported_after):
    for optimizer in library.all_of_them(params):
        print(type(optimizer).__module__.partition(".")[0])
    print(library.by_default(params).defaults["eps"], type(library.Inheriting(params)).__name__)
"""


def test_imports_before_and_after_make_no_difference(tmp_path):
    """stable-baselines3 takes another eps where the class that it holds is torch's Adam."""
    for when in ("before", "after"):
        (tmp_path / f"library_imported_{when}.py").write_text(LIBRARY)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 2 * [*7 * ["fastopt"], "1e-05 Inheriting"]
