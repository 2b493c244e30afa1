"""What several test files share: optimizers made, trained and compared in the same way."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.testing import assert_close

import fastopt
from cases import IN_TORCH, OPTIONS, Case, construct

every_rule = pytest.mark.parametrize("name", OPTIONS)


def _all_but(*names: str) -> pytest.MarkDecorator:
    """Of those that torch has, too."""
    return pytest.mark.parametrize("name", [name for name in IN_TORCH if name not in names])


every_optimizer = _all_but()

# Rprop reads its rate when it makes a state, and never again.
reading_lr = _all_but("Rprop")

# Some schedulers cycle momentum or beta1, too; and RMSprop divides by variances so small that eight
# steps leave float64 only 1e-11.
of_schedulers = _all_but("Adadelta", "Adagrad", "ASGD", "Rprop", "RMSprop")

# torch's own ASGD reads numbers of its state, which tensors without memory do not have; Adagrad's
# loop does so only where it is traced.
on_meta = _all_but("ASGD")
traceable = _all_but("ASGD", "Adagrad")

# Those with a fused step in torch: to them `fused` is an option.
fused_in_torch = pytest.mark.parametrize("name", ["Adagrad", "Adam", "AdamW", "SGD"])

# torch's step in place of ours is an error, unless a test expects it.
FALLBACK = ".* steps through torch.optim"
native_only = pytest.mark.filterwarnings(f"error:{FALLBACK}:UserWarning")

# Hints about torch's own implementations: they choose nothing here.
HINTS: dict[str, dict[str, Any]] = {
    "none": {},
    "fused=True": {"fused": True},
    "fused=False": {"fused": False},
    "foreach=True": {"foreach": True},
    "foreach=False": {"foreach": False},
}
every_hint = pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS)

# Ways to ask for the stock implementation, each with what asks torch itself for the same.
ASKED_FOR_TORCH = {
    "differentiable=True": ({"differentiable": True}, {"differentiable": True}),
    "backend=torch": ({"backend": "torch"}, {}),
    "backend=torch fused": ({"backend": "torch", "fused": True}, {"fused": True}),
    "backend=torch foreach": ({"backend": "torch", "foreach": True}, {"foreach": True}),
}

# Options with which an optimizer keeps every state it has.
ALL_STATES: dict[str, dict[str, Any]] = {
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
}

# In float64: room for another order of operations, none for another formula.
LAST_DIGITS = {"rtol": 1e-12, "atol": 1e-15}


# Making.


def make(module: Any, name: str, params: Any, **kwargs: Any) -> Optimizer:
    """An optimizer of `module` (torch.optim, fastopt) with every state and a rate that shows."""
    return construct(module, name, params, **{"lr": 0.1} | ALL_STATES.get(name, {}) | kwargs)


def forloop(name: str, params: Any) -> Optimizer:
    return make(torch.optim, name, params, fused=False, foreach=False)


def pair(
    case: Case, ours: dict[str, Any] | None = None, stock: dict[str, Any] | None = None
) -> tuple[Optimizer, Optimizer]:
    """The same optimizer twice over equal parameters: ours and torch's for-loop."""
    loop = {"foreach": False, "fused": False} if stock is None else stock
    return (
        case.make_optimizer(case.parameters(), fastopt, **(ours or {})),
        case.make_optimizer(case.parameters(), torch.optim, **loop),
    )


# Training.


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(case: Case, optimizer: Optimizer, steps: range) -> None:
    """Steps whose gradients depend on nothing but the step's number."""
    for step in steps:
        case.set_gradients(parameters(optimizer), step)
        optimizer.step()


def step_alike(
    optimizer: Optimizer, reference: Optimizer, place: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    """One step of both with the same random gradients, put by `place` where the first reads it."""
    for param, twin in zip(parameters(optimizer), parameters(reference), strict=True):
        twin.grad = torch.randn(twin.shape, dtype=twin.dtype)
        param.grad = place(twin.grad)
    optimizer.step()
    reference.step()


# Comparing.


def tensors_of(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Every parameter together with its states, by name; the tensors themselves, in group order."""
    return [{"param": param, **optimizer.state.get(param, {})} for param in parameters(optimizer)]


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of all parameters and their states, named so that two optimizers can be compared."""
    return {
        f"{i}.{name}": copy.deepcopy(value.detach() if name == "param" else value)
        for i, tensors in enumerate(tensors_of(optimizer))
        for name, value in tensors.items()
    }


def assert_equal(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_tensors(actual: Optimizer, expected: Optimizer, **tolerance: Any) -> None:
    """Parameters and states agree: as torch.testing does by default, or within rtol and atol."""
    assert_close(snapshot(actual), snapshot(expected), equal_nan=True, **tolerance)


def assert_agrees_with_torch(ours: Optimizer, stock: Optimizer) -> None:
    """Of float64 parameters: the two engines differ only in the order of rounding."""
    assert_same_tensors(ours, stock, **LAST_DIGITS)


def assert_same_bits(actual: Optimizer, expected: Optimizer) -> None:
    """Parameters and states agree bit for bit, wherever they are. Only NaNs may differ in theirs:
    IEEE 754 leaves open which NaN an operation gives, and processors differ."""
    for mine, theirs in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert _same_bits(mine[name].detach().cpu(), theirs[name].detach().cpu()), name


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits_differ = a.contiguous().view(integer) != b.contiguous().view(integer)
    return not (bits_differ & ~(a.isnan() & b.isnan())).any()


def assert_refused(optimizer: Optimizer, match: str) -> None:
    """The step raises ValueError with such a text and changes nothing."""
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)
