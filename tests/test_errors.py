"""Bad arguments get torch's texts; a step that raises names its parameter and changes nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastopt
from cases import BFLOAT16, COMPLEX64, FLOAT32, FLOAT64, Case, state_names
from helpers import (
    assert_equal,
    every_optimizer,
    parameters,
    reading_lr,
    snapshot,
    tensors_of,
    train,
)

# The constructor.


def one() -> list[Parameter]:
    return [Parameter(torch.ones(2))]


def shared_between_groups() -> list[dict[str, Any]]:
    param = Parameter(torch.ones(2))
    return [{"params": [param]}, {"params": [param]}]


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "none at all": list,
    "a tensor": lambda: torch.ones(2, requires_grad=True),
    "a set in a group": lambda: [{"params": set(one())}],
    "not a leaf": lambda: [torch.ones(2, requires_grad=True) * 2],
    "not a tensor": lambda: ["weight"],
    "in two groups": shared_between_groups,
    "some without name": lambda: [("weight", *one()), *one()],
    "a group without names": lambda: [
        {"params": [("weight", *one())]},
        {"params": one()},
    ],
}

_ANY_BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"lr": -1e-3},
    "lr of two elements": {"lr": torch.tensor([0.1, 0.2])},
    "weight_decay": {"weight_decay": -0.1},
    "fused and foreach": {"fused": True, "foreach": True},
    "fused and differentiable": {"fused": True, "differentiable": True},
    "unknown": {"learning_rate": 0.1},
}
_ADAM_BAD_OPTIONS = _ANY_BAD_OPTIONS | {
    "eps": {"eps": -1e-8},
    "beta1": {"betas": (1.0, 0.9)},
    "beta2": {"betas": (0.9, -0.1)},
    "one beta a tensor": {"betas": (0.9, torch.tensor(0.99))},
    "int betas": {"betas": (0, 0)},
    "beta1 of two elements": {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))},
    "beta2 of two elements": {"betas": (torch.tensor(0.9), torch.tensor([0.9, 0.9]))},
    "tensor lr and foreach": {"lr": torch.tensor(0.1), "foreach": True},
    "tensor betas and foreach": {
        "betas": (torch.tensor(0.9), torch.tensor(0.99)),
        "foreach": True,
    },
}
BAD_OPTIONS = {
    "Adam": _ADAM_BAD_OPTIONS,
    "AdamW": _ADAM_BAD_OPTIONS | {"always decoupled": {"decoupled_weight_decay": False}},
    "SGD": _ANY_BAD_OPTIONS
    | {
        "momentum": {"momentum": -0.9},
        "nesterov without momentum": {"nesterov": True},
        "nesterov with dampening": {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "no capturable": {"capturable": True},
    },
}


def assert_same_error(call: Callable[[Any], Any]) -> None:
    """`call` raises the same for fastopt as for torch.optim."""
    with pytest.raises(Exception) as stock:  # noqa: PT011 - whatever torch raises
        call(torch.optim)
    with pytest.raises(stock.type) as ours:
        call(fastopt)
    assert ours.type is stock.type
    assert str(ours.value) == str(stock.value)


@every_optimizer
@pytest.mark.parametrize("params", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_bad_params_get_torchs_text(name, params):
    assert_same_error(lambda module: getattr(module, name)(params()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{what}")
        for name, table in BAD_OPTIONS.items()
        for what, options in table.items()
    ],
)
def test_bad_option_gets_torchs_text(name, options):
    assert_same_error(lambda module: getattr(module, name)(one(), **options))


@every_optimizer
def test_duplicate_parameter_gets_torchs_warning(name):
    def text(module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(module, name)(one() * 2)
        return [str(warning.message) for warning in caught]

    assert text(fastopt) == text(torch.optim) != []


@every_optimizer
def test_checkpoint_of_other_groups_gets_torchs_text(name):
    def load(module, groups):
        optimizer = getattr(module, name)(one())
        optimizer.load_state_dict(getattr(module, name)(groups).state_dict())

    two_parameters = one() + one()
    two_groups = [{"params": one()}, {"params": one()}]
    assert_same_error(lambda module: load(module, two_parameters))
    assert_same_error(lambda module: load(module, two_groups))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_sparse_gradient_gets_torchs_text(name):
    def step(module):
        param = Parameter(torch.ones(2, 2))
        param.grad = torch.eye(2).to_sparse()
        optimizer = getattr(module, name)([param])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()

    assert_same_error(step)


@every_optimizer
def test_unknown_backend_is_refused_with_the_names_there_are(name):
    with pytest.raises(ValueError, match="nonsense") as error:
        getattr(fastopt, name)(one(), backend="nonsense")
    for backend in fastopt.backends():
        assert backend in str(error.value)


@every_optimizer
def test_backend_that_cannot_run_here_is_refused_with_the_reason(name, monkeypatch):
    monkeypatch.setitem(fastopt.optimizer._WHY_NOT, "cuda", lambda: "no driver was found")
    with pytest.raises(RuntimeError, match="no driver was found"):
        getattr(fastopt, name)(one(), backend="cuda")


@every_optimizer
def test_usable_backends_are_accepted(name):
    usable = [backend for backend, reason in fastopt.backends().items() if reason is None]
    assert {"cpu", "torch"} <= set(usable)
    for backend in usable:
        getattr(fastopt, name)(one(), backend=backend)


# A step that raises.


def _misshape_state(optimizer: Optimizer, param: Parameter) -> None:
    key = state_names(optimizer)[-1]
    optimizer.state[param][key] = optimizer.state[param][key].new_zeros(2, 5)


def _shorten_state(optimizer: Optimizer, param: Parameter) -> None:
    """As many dimensions, fewer elements: what would be read past its end."""
    key = state_names(optimizer)[0]
    optimizer.state[param][key] = optimizer.state[param][key][:1].clone()


def _integer_state(optimizer: Optimizer, param: Parameter) -> None:
    key = state_names(optimizer)[0]
    optimizer.state[param][key] = optimizer.state[param][key].long()


def _complex_state(optimizer: Optimizer, param: Parameter) -> None:
    key = state_names(optimizer)[0]
    optimizer.state[param][key] = optimizer.state[param][key].to(torch.complex64)


def _expand_state(optimizer: Optimizer, param: Parameter) -> None:
    key = state_names(optimizer)[0]
    state = optimizer.state[param]
    state[key] = state[key].flatten()[0].expand(param.shape)


def _meta_state(optimizer: Optimizer, param: Parameter) -> None:
    key = state_names(optimizer)[0]
    optimizer.state[param][key] = optimizer.state[param][key].to("meta")


def _text_state(optimizer: Optimizer, param: Parameter) -> None:
    optimizer.state[param][state_names(optimizer)[0]] = "lost"


def _lose_a_state(optimizer: Optimizer, param: Parameter) -> None:
    del optimizer.state[param][state_names(optimizer)[0]]


def _lose_the_step(optimizer: Optimizer, param: Parameter) -> None:
    del optimizer.state[param]["step"]


def _misshape_the_step(optimizer: Optimizer, param: Parameter) -> None:
    optimizer.state[param]["step"] = torch.zeros(3)


def _expand_the_parameter(optimizer: Optimizer, param: Parameter) -> None:
    param.data = param.data.flatten()[0].clone().expand(param.shape)


def _complex_gradient(optimizer: Optimizer, param: Parameter) -> None:
    param.grad_dtype = None
    param.grad = param.grad.to(torch.complex64)


def _complex_step(optimizer: Optimizer, param: Parameter) -> None:
    optimizer.state[param]["step"] = torch.zeros((), dtype=torch.complex64)


def _text_step(optimizer: Optimizer, param: Parameter) -> None:
    optimizer.state[param]["step"] = "two"


def _free_the_parameter(optimizer: Optimizer, param: Parameter) -> None:
    param.untyped_storage().resize_(0)


def _free_the_gradient(optimizer: Optimizer, param: Parameter) -> None:
    """A view into a freed buffer does not lie at address 0."""
    flat = torch.ones(3 + param.numel())
    param.grad = flat[3:].view(param.shape)
    flat.untyped_storage().resize_(0)


def _free_a_state(optimizer: Optimizer, param: Parameter) -> None:
    optimizer.state[param][state_names(optimizer)[0]].untyped_storage().resize_(0)


ANY_BREAKS = [
    _misshape_state,
    _shorten_state,
    _integer_state,
    _complex_state,
    _expand_state,
    _meta_state,
    _text_state,
    _expand_the_parameter,
    _complex_gradient,
    _free_the_parameter,
    _free_the_gradient,
    _free_a_state,
]
ADAM_BREAKS = [
    *ANY_BREAKS,
    _lose_a_state,
    _lose_the_step,
    _misshape_the_step,
    _complex_step,
    _text_step,
]
BREAKS = {"Adam": ADAM_BREAKS, "AdamW": ADAM_BREAKS, "SGD": ANY_BREAKS}


def grouped(case: Case, named: bool) -> Optimizer:
    """Two groups; the last parameter of the last one has many good ones before it."""
    params: list[Any] = case.parameters()
    if named:
        params = [(f"layers.{i}.weight", param) for i, param in enumerate(params)]
    return case.make_optimizer([{"params": params[:2]}, {"params": params[2:]}], fastopt)


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize(
    ("name", "break_it"),
    [(name, break_it) for name, breaks in BREAKS.items() for break_it in breaks],
)
def test_step_that_raises_names_the_parameter_and_changes_nothing(name, break_it, named):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = grouped(case, named)
    train(case, optimizer, range(2))
    params = parameters(optimizer)
    case.set_gradients(params, 2)
    del optimizer.state[params[0]]  # this one would get new states in the same step
    break_it(optimizer, params[-1])
    before = _values(tensors_of(optimizer))
    versions = [param._version for param in params]
    gradients = [param.grad for param in params]
    grads_before = _values([{"grad": param.grad} for param in params])
    at_last = len(optimizer.param_groups[1]["params"]) - 1
    named_as = f"layers.{len(params) - 1}.weight" if named else f"parameter {at_last} of group 1"
    with pytest.raises(ValueError, match=named_as):
        optimizer.step()
    assert_equal(_values(tensors_of(optimizer)), before)
    assert_equal(_values([{"grad": param.grad} for param in params]), grads_before)
    assert all(param.grad is grad for param, grad in zip(params, gradients, strict=True))
    assert [param._version for param in params] == versions
    assert params[0] not in optimizer.state


def _values(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of what has values: no text, no tensor on the meta device or without memory."""
    return [
        {
            name: value.detach().clone()
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and not value.is_meta and value.data_ptr() > 4096
        }
        for named in tensors
    ]


@every_optimizer
def test_after_the_repair_training_goes_on_as_if_nothing_had_been(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    repaired, never_broken = (case.make_optimizer(case.parameters(), fastopt) for _ in range(2))
    train(case, repaired, range(2))
    last, key = parameters(repaired)[-1], state_names(repaired)[0]
    good = repaired.state[last][key]
    repaired.state[last][key] = torch.zeros(1)
    with pytest.raises(ValueError, match=key):
        train(case, repaired, range(2, 3))
    repaired.state[last][key] = good
    train(case, repaired, range(2, 4))
    train(case, never_broken, range(4))
    assert_equal(snapshot(repaired), snapshot(never_broken))


@every_optimizer
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16, COMPLEX64], ids=str)
def test_error_names_the_tensor_at_fault(name, dtypes):
    case = Case(name, "everything", dtypes, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    train(case, optimizer, range(1))
    for key in state_names(optimizer):
        state = optimizer.state[parameters(optimizer)[5]]
        good, state[key] = state[key], torch.zeros(7, dtype=dtypes.state)
        with pytest.raises(ValueError, match=rf"parameter 5 of group 0.*{key}.*\[7\]"):
            train(case, optimizer, range(1, 2))
        state[key] = good


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_turned_on_in_mid_run_is_refused_until_turned_off(name):
    case = Case(name, "default", FLOAT32, "sizes")
    optimizer, never_on = (case.make_optimizer(case.parameters(), fastopt) for _ in range(2))
    train(case, optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*max_exp_avg_sq"):
        train(case, optimizer, range(2, 3))
    optimizer.param_groups[0]["amsgrad"] = False
    train(case, optimizer, range(2, 4))
    train(case, never_on, range(4))
    assert_equal(snapshot(optimizer), snapshot(never_on))


@every_optimizer
def test_error_in_the_closure_leaves_everything_as_it_was(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    train(case, optimizer, range(1))
    before = snapshot(optimizer)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_equal(snapshot(optimizer), before)


@reading_lr
@pytest.mark.parametrize("lr", ["0.1", None, torch.tensor([0.1, 0.2])], ids=str)
def test_lr_that_is_no_number_changes_nothing(name, lr):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = grouped(case, named=False)
    train(case, optimizer, range(1))
    before = snapshot(optimizer)
    optimizer.param_groups[-1]["lr"] = lr
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        train(case, optimizer, range(1, 2))
    assert_equal(snapshot(optimizer), before)
