"""What torch and its users may rely on from an optimizer, one property per test.

Checkpoints, AMP, errors, threads, the ecosystem and distributed training have files of their own.
"""

import copy
import importlib
import inspect
import pickle
import types
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from cases import COMPLEX64, FLOAT32, FLOAT64, OPTIONS, UNIFORM, Case, construct, state_names
from fastopt.options import DEFAULTS
from helpers import (
    ASKED_FOR_TORCH,
    FALLBACK,
    HINTS,
    assert_agrees_with_torch,
    assert_equal,
    every_hint,
    every_optimizer,
    on_meta,
    pair,
    parameters,
    snapshot,
    train,
)

ENGINES = {f"native {hint}": options for hint, options in HINTS.items()} | {
    way: ours for way, (ours, _) in ASKED_FOR_TORCH.items()
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@pytest.fixture
def stock_steps(monkeypatch) -> list[str]:
    """Names of torch's functional optimizers as they are called: what ran on the stock engine."""
    calls = []

    def record(name):
        # torch.optim binds the name of the module `adam` to the function of that name.
        module = importlib.import_module(f"torch.optim.{name}")
        stock = getattr(module, name)

        def recorded(*args, **kwargs):
            calls.append(name)
            return stock(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    for name in OPTIONS.keys() - {"AdamW", "Lion"}:
        record(name.lower())
    return calls


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_")}


# Constructor.


@every_optimizer
def test_signature_is_torchs_plus_ours(name):
    def described(cls):
        return {
            key: (parameter.kind, parameter.default)
            for key, parameter in inspect.signature(cls).parameters.items()
        }

    ours = described(getattr(fastopt, name))
    for own, default in DEFAULTS.items():
        assert ours.pop(own) == (inspect.Parameter.KEYWORD_ONLY, default)
    assert ours == described(getattr(torch.optim, name))


@every_optimizer
def test_class_is_torchs(name):
    ours, stock = getattr(fastopt, name), getattr(torch.optim, name)
    assert issubclass(ours, stock)
    assert ours.__name__ == stock.__name__


@every_optimizer
def test_defaults_are_torchs(name):
    ours, stock = pair(Case(name, "default", FLOAT32, "sizes"), stock={})
    assert ours.defaults == stock.defaults


@every_optimizer
def test_param_groups_have_torchs_keys_and_no_others(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    ours, stock = pair(case, {"backend": "cpu"}, {})

    def assert_same_keys():
        assert [list(group) for group in ours.param_groups] == [
            list(group) for group in stock.param_groups
        ]

    assert_same_keys()
    for optimizer in (ours, stock):
        train(case, optimizer, range(2))
        optimizer.add_param_group({"params": case.parameters()})
        optimizer.load_state_dict(optimizer.state_dict())
    assert_same_keys()


@every_optimizer
def test_instance_has_no_other_public_attributes_than_torchs_and_of_its_passes(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    ours, stock = pair(case, {"backend": "cpu"})
    for optimizer in (ours, stock):
        train(case, optimizer, range(2))
    of_passes = {"averaged", "grad_norm", "skipped_steps", "total_norm"}
    assert public(dir(ours)) == public(dir(stock)) | of_passes
    assert not of_passes & vars(ours).keys()


@every_optimizer
def test_named_parameters_keep_their_names(name):
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(fastopt, name)(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.param_groups[0]["params"][0] is model.weight


# State.


@every_optimizer
@pytest.mark.parametrize("options", ["default", "everything"])
def test_state_has_torchs_keys_dtypes_and_shapes(name, options):
    case = Case(name, options, COMPLEX64, "sizes")

    def described(optimizer):
        train(case, optimizer, range(1))
        return [
            {
                key: (value.dtype, value.device, value.shape)
                for key, value in optimizer.state.get(param, {}).items()
            }
            for param in parameters(optimizer)
        ]

    ours, stock = map(described, pair(case))
    assert ours == stock


@every_optimizer
@pytest.mark.parametrize("layout", ["sizes", "transposed", "every_second", "channels_last"])
def test_moments_lie_in_memory_as_their_parameter_does(name, layout):
    case = Case(name, "everything", FLOAT32, layout)
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    train(case, optimizer, range(1))
    for param in parameters(optimizer):
        expected = torch.zeros_like(param, memory_format=torch.preserve_format).stride()
        for key in state_names(optimizer):
            assert optimizer.state[param][key].stride() == expected


@every_optimizer
def test_state_is_made_when_a_parameter_first_has_a_gradient(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    ours, stock = pair(case)
    in_constructor = name == "Adagrad"
    assert bool(ours.state) == in_constructor
    for optimizer in (ours, stock):
        params = parameters(optimizer)
        case.set_gradients(params, 0)
        params[3].grad = None
        optimizer.step()
        assert (params[3] in optimizer.state) == in_constructor
        train(case, optimizer, range(1, 3))
    assert_agrees_with_torch(ours, stock)


def test_first_momentum_buffer_is_the_decayed_gradient_without_dampening():
    param = torch.nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = fastopt.SGD([param], lr=0.5, momentum=0.9, dampening=0.25, weight_decay=0.5)
    param.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert_equal(optimizer.state[param]["momentum_buffer"], torch.tensor([2.0, -1.0]))
    assert_equal(param.data, torch.tensor([1.0, -3.5]))
    assert param.grad is not optimizer.state[param]["momentum_buffer"]


def test_sgd_without_momentum_keeps_no_state():
    case = Case("SGD", "decay", FLOAT32, "sizes")
    ours, stock = pair(case)
    for optimizer in (ours, stock):
        train(case, optimizer, range(2))
    assert ours.state_dict()["state"] == stock.state_dict()["state"] == {}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_step_is_a_0d_float32_tensor_whatever_the_default_dtype(name):
    case = Case(name, "default", FLOAT32, "sizes")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = case.make_optimizer(case.parameters(), fastopt)
        train(case, optimizer, range(3))
    finally:
        torch.set_default_dtype(before)
    for param in parameters(optimizer):
        assert_equal(optimizer.state[param]["step"], torch.tensor(3.0, dtype=torch.float32))


@every_optimizer
def test_state_may_hold_keys_that_are_not_parameters(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    optimizer.state["epoch"] = {"number": 7}
    train(case, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    train(case, optimizer, range(2))
    assert optimizer.state["epoch"] == {"number": 7}


@every_optimizer
def test_getstate_keeps_what_torch_keeps(name):
    ours, stock = pair(Case(name, "default", FLOAT32, "sizes"))
    assert list(ours.__getstate__()) == list(stock.__getstate__())


@every_optimizer
def test_copy_keeps_the_backend_asked_for(name, stock_steps):
    case = Case(name, "default", FLOAT32, "sizes")
    original = case.make_optimizer(case.parameters(), fastopt, backend="torch")
    train(case, copy.deepcopy(original), range(1))
    train(case, pickle.loads(pickle.dumps(original)), range(1))
    assert len(stock_steps) == 2


@every_optimizer
def test_copy_has_the_public_attributes_of_the_original(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    train(case, optimizer, range(2))
    assert public(dir(copy.deepcopy(optimizer))) == public(dir(optimizer))


# Calling step.


@every_optimizer
def test_step_takes_what_torchs_step_takes(name):
    ours, stock = getattr(fastopt, name), getattr(torch.optim, name)
    assert (
        inspect.signature(ours.step).parameters.keys()
        == inspect.signature(stock.step).parameters.keys()
    )


def after_torchs(name: str, engine: dict[str, Any]) -> tuple[Tensor, torch.optim.Optimizer]:
    """A parameter with a gradient and its optimizer, made when torch's own class has been used.

    torch wraps `step` of a class in its profile hook when the class is first instantiated: a
    fallback that calls the wrapped one would fire every hook twice.
    """
    getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(1))])
    param = torch.ones(1)
    param.grad = torch.ones(1)
    return param, construct(fastopt, name, [param], **engine)


@every_optimizer
@every_engine
def test_hooks_fire_once_and_in_torchs_order(name, engine):
    param, optimizer = after_torchs(name, engine)
    events = []

    def recorder(event):
        return lambda hooked, args, kwargs: events.append(
            (event, hooked is optimizer, param.item() != 1)
        )

    handles = [
        register_optimizer_step_post_hook(recorder("global post")),
        register_optimizer_step_pre_hook(recorder("global pre")),
        optimizer.register_step_post_hook(recorder("local post")),
        optimizer.register_step_pre_hook(recorder("local pre")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert events == [
        ("global pre", True, False),
        ("local pre", True, False),
        ("local post", True, True),
        ("global post", True, True),
    ]


@every_optimizer
@every_engine
def test_profiler_sees_one_step(name, engine):
    _, optimizer = after_torchs(name, engine)
    with torch.profiler.profile() as profile:
        optimizer.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{name}.step"] == 1


@every_optimizer
@every_engine
def test_closure_runs_once_under_enable_grad_and_its_loss_is_returned(name, engine):
    param = torch.ones(1)
    optimizer = construct(fastopt, name, [param], **engine)
    loss = object()
    grad_modes = []

    def closure():
        grad_modes.append(torch.is_grad_enabled())
        param.grad = torch.ones(1)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is loss
        assert not torch.is_grad_enabled()
    assert grad_modes == [True]
    assert param.item() < 1


@every_optimizer
def test_step_without_closure_returns_none_and_restores_the_grad_mode(name):
    case = Case(name, "default", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    case.set_gradients(parameters(optimizer), 0)
    assert optimizer.step() is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_graph_capture_health_is_checked_before_anything_moves(name, monkeypatch):
    case = Case(name, "default", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)

    def unhealthy(self):
        raise RuntimeError("capturing without capturable")

    # torch 2.10 knows the check by its old name.
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    for known in vars(torch.optim.Optimizer).keys() & set(names):
        monkeypatch.setattr(torch.optim.Optimizer, known, unhealthy)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="capturing without capturable"):
        train(case, optimizer, range(1))
    assert_equal(snapshot(optimizer), before)


@every_optimizer
def test_copy_steps_beside_an_accelerator(name, monkeypatch):
    """torch's health check asks all groups for `capturable`, which SGD's do not have."""
    case = Case(name, "default", FLOAT32, "sizes")
    twin = copy.deepcopy(case.make_optimizer(case.parameters(), fastopt))
    stream = types.SimpleNamespace(is_capturing=lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    before = snapshot(twin)
    train(case, twin, range(1))
    with pytest.raises(AssertionError):
        assert_equal(snapshot(twin), before)


@every_optimizer
def test_backward_through_a_parameter_that_has_stepped_raises(name):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(fastopt, name)([param])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    version = param._version
    optimizer.step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_optimizer
def test_step_keeps_the_very_tensors(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    train(case, optimizer, range(1))

    def identities():
        return [
            (param.data_ptr(), {key: id(value) for key, value in optimizer.state[param].items()})
            for param in parameters(optimizer)
        ]

    before = identities()
    train(case, optimizer, range(1, 3))
    assert identities() == before


# What a step reads.

_ADAM_CHANGES = {
    "lr": 0.05,
    "betas": (0.5, 0.6),
    "eps": 0.1,
    "weight_decay": 0.5,
    "maximize": False,
}
CHANGES = {
    "Adam": _ADAM_CHANGES | {"decoupled_weight_decay": True},
    "AdamW": _ADAM_CHANGES,
    "SGD": {
        "lr": 0.05,
        "momentum": 0.5,
        "dampening": 0.5,
        "weight_decay": 0.5,
        "nesterov": False,
        "maximize": False,
    },
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in CHANGES.items() for key in keys]
)
def test_hyper_parameter_is_read_at_every_step(name, key):
    case = Case(name, "everything", FLOAT64, "sizes")
    ours, stock = pair(case)
    unchanged = case.make_optimizer(case.parameters(), fastopt)
    for optimizer in (ours, stock, unchanged):
        train(case, optimizer, range(2))
    for optimizer in (ours, stock):
        optimizer.param_groups[0][key] = CHANGES[name][key]
    for optimizer in (ours, stock, unchanged):
        train(case, optimizer, range(2, 4))
    assert_agrees_with_torch(ours, stock)
    with pytest.raises(AssertionError):
        assert_agrees_with_torch(unchanged, stock)


@every_optimizer
def test_tensor_lr_filled_in_place_is_read_at_every_step(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
        for step in range(4):
            train(case, optimizer, range(step, step + 1))
            optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + step))
    assert_agrees_with_torch(*pairs)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tensor_betas_filled_in_place_are_read_at_every_step(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.99))
        optimizer.param_groups[0]["betas"] = betas
        for step in range(4):
            train(case, optimizer, range(step, step + 1))
            for beta in betas:
                beta.mul_(0.9)
    assert_agrees_with_torch(*pairs)


@every_optimizer
def test_each_group_goes_by_its_own_hyper_parameters(name):
    case = Case(name, "default", FLOAT64, "sizes")

    def grouped(module):
        first, second, *rest = case.parameters()
        return getattr(module, name)(
            [
                {"params": [first], "weight_decay": 0.3},
                {"params": [second], "lr": 0.2},
                {"params": rest, "maximize": True},
            ],
            lr=0.1,
        )

    ours, stock = grouped(fastopt), grouped(torch.optim)
    for optimizer in (ours, stock):
        train(case, optimizer, range(3))
    assert_agrees_with_torch(ours, stock)


@every_optimizer
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtypes", UNIFORM, ids=str)
def test_lr_zero_on_zero_gradients_moves_nothing(name, lr, dtypes):
    case = Case(name, "everything", dtypes, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    optimizer.param_groups[0]["lr"] = lr
    params = parameters(optimizer)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_equal([param.detach() for param in params], before)


@every_optimizer
def test_without_gradients_a_step_does_nothing(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    before = snapshot(optimizer)
    optimizer.step()
    assert_equal(snapshot(optimizer), before)


@every_optimizer
def test_group_without_parameters_is_stepped_over(name):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(fastopt, name)([{"params": []}, {"params": [param]}, {"params": []}])
    param.grad = torch.ones(2)
    optimizer.step()
    assert (param < 1).all()


@every_optimizer
def test_params_of_a_group_may_be_a_tuple(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        group = optimizer.param_groups[0]
        group["params"] = tuple(group["params"])
        train(case, optimizer, range(2))
    assert_agrees_with_torch(*pairs)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
@every_optimizer
def test_parameter_given_twice_is_stepped_twice(name):
    case = Case(name, "everything", FLOAT64, "sizes")

    def trained(module):
        params = case.parameters()
        optimizer = case.make_optimizer(params + params, module)
        for step in range(3):
            case.set_gradients(params, step)
            optimizer.step()
        return optimizer

    with pytest.warns(UserWarning, match=FALLBACK):
        ours = trained(fastopt)
    assert_agrees_with_torch(ours, trained(torch.optim))


@every_optimizer
def test_zero_size_parameters_alone_are_no_error(name):
    param = torch.nn.Parameter(torch.empty(0, 3))
    optimizer = getattr(fastopt, name)([param])
    param.grad = torch.empty(0, 3)
    for _ in range(2):
        optimizer.step()
    assert param.shape == (0, 3)
    assert all(state["step"] == 2 for state in optimizer.state.values() if "step" in state)


@every_optimizer
def test_freezing_and_thawing_between_steps(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        params = parameters(optimizer)
        train(case, optimizer, range(2))
        for step in range(2, 6):
            case.set_gradients(params, step)
            for frozen in params[step % 2 :: 2]:
                frozen.grad = None
                frozen.requires_grad_(False)
            optimizer.step()
            for param in params:
                param.requires_grad_(True)
        train(case, optimizer, range(6, 8))
    assert_agrees_with_torch(*pairs)


@every_optimizer
def test_one_group_may_mix_dtypes_and_layouts(name):
    cases = [
        Case(name, "everything", dtypes, layout)
        for dtypes, layout in [(FLOAT64, "sizes"), (COMPLEX64, "transposed"), (FLOAT32, "many")]
    ]

    def together(module, **engine):
        params = [case.parameters() for case in cases]
        optimizer = cases[0].make_optimizer(list(chain(*params)), module, **engine)
        for step in range(3):
            for case, its_params in zip(cases, params, strict=True):
                case.set_gradients(its_params, step)
            optimizer.step()
        return snapshot(optimizer)

    def apart(case):
        optimizer = case.make_optimizer(case.parameters(), fastopt)
        train(case, optimizer, range(3))
        return snapshot(optimizer)

    ours = together(fastopt)
    assert_close(ours, together(torch.optim, foreach=False))
    assert_equal(list(ours.values()), list(chain(*(apart(case).values() for case in cases))))


@every_optimizer
def test_zero_grad_is_torchs(name):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(fastopt, name)([param])
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
    param.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert_equal(param.grad, torch.zeros(2))
    optimizer.zero_grad()
    assert param.grad is None


# Nothing is cached by faith.


def _replace_data(optimizer):
    for param in parameters(optimizer):
        param.data = param.data.clone() + 1


def _replace_data_by_another_layout(optimizer):
    for param in parameters(optimizer):
        wider = param.data.new_empty(*param.shape, 2)
        wider[..., 0] = param.data
        param.data = wider[..., 0]


def _replace_state(optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value * 2 if key != "step" else value + 1


def _replace_groups(optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.5


def _replace_parameters(optimizer):
    """As FSDP and Accelerate do to an optimizer made before the model was wrapped."""
    group = optimizer.param_groups[0]
    for i, old in enumerate(group["params"]):
        new = torch.nn.Parameter(old.detach().clone())
        optimizer.state[new] = optimizer.state.pop(old)
        group["params"][i] = new


def _forget_state(optimizer):
    optimizer.state.clear()


@every_optimizer
@pytest.mark.parametrize(
    "change",
    [
        _replace_data,
        _replace_data_by_another_layout,
        _replace_state,
        _replace_groups,
        _replace_parameters,
        _forget_state,
    ],
)
def test_what_is_replaced_between_steps_is_seen(name, change):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        train(case, optimizer, range(2))
        change(optimizer)
        train(case, optimizer, range(2, 4))
    assert_agrees_with_torch(*pairs)


@every_optimizer
def test_group_added_between_steps_is_stepped(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    for optimizer in pairs:
        train(case, optimizer, range(2))
        added = [torch.nn.Parameter(param.detach() + 1) for param in parameters(optimizer)]
        optimizer.add_param_group({"params": added, "lr": 0.5})
        for step in range(2, 4):
            case.set_gradients(parameters(optimizer)[: -len(added)], step)
            case.set_gradients(added, step)
            optimizer.step()
    assert_agrees_with_torch(*pairs)


# Which engine steps.


@every_optimizer
@every_hint
@pytest.mark.parametrize("dtypes", UNIFORM, ids=str)
def test_native_engine_steps_without_torchs_whatever_the_hint(name, hint, dtypes, stock_steps):
    case = Case(name, "everything", dtypes, "sizes")
    hinted = case.make_optimizer(case.parameters(), fastopt, **hint)
    plain = case.make_optimizer(case.parameters(), fastopt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in (hinted, plain):
            train(case, optimizer, range(2))
    assert_equal(snapshot(hinted), snapshot(plain))
    assert stock_steps == []


@every_optimizer
@every_hint
def test_hint_in_a_group_or_a_checkpoint_chooses_nothing_and_stays(name, hint, stock_steps):
    case = Case(name, "everything", FLOAT32, "sizes")
    stock = case.make_optimizer(case.parameters(), torch.optim, **hint)
    given = case.make_optimizer([{"params": case.parameters(), **hint}], fastopt, backend="cpu")
    loaded = case.make_optimizer(case.parameters(), fastopt)
    loaded.load_state_dict(stock.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in (given, loaded):
            train(case, optimizer, range(2))
    assert stock_steps == []
    for optimizer in (given, loaded):
        for flag in {"fused", "foreach"} & stock.param_groups[0].keys():
            assert optimizer.param_groups[0][flag] == stock.param_groups[0][flag]


@every_optimizer
@pytest.mark.parametrize(("ours", "stock"), ASKED_FOR_TORCH.values(), ids=ASKED_FOR_TORCH)
def test_asked_for_torch_is_torch_bit_for_bit_and_silent(name, ours, stock, stock_steps):
    case = Case(name, "everything", FLOAT32, "sizes")
    # Plain tensors, because `differentiable` refuses leaves that require grad.
    pairs = [
        case.make_optimizer([param.detach() for param in case.parameters()], module, **engine)
        for module, engine in [(fastopt, ours), (torch.optim, stock)]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in pairs:
            train(case, optimizer, range(3))
    assert_equal(*map(snapshot, pairs))
    assert len(stock_steps) == 2 * 3


def assert_torch_steps_and_we_warn_once(
    trained: Callable[[Any], Any], reason: str, stock_steps: list[str]
) -> None:
    """`trained` gives the outcome of several steps of fastopt or torch.optim."""
    with pytest.warns(UserWarning, match=reason) as caught:
        ours = trained(fastopt)
    assert len(caught) == 1
    through_ours = len(stock_steps)
    assert_equal(ours, trained(torch.optim))
    assert 2 * through_ours == len(stock_steps) > 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradient_sends_the_whole_step_to_torch_and_warns_once(momentum, stock_steps):
    def trained(module):
        torch.manual_seed(0)
        dense, rows = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        optimizer = module.SGD([{"params": [dense]}, {"params": [rows]}], momentum=momentum)
        for step in range(2):
            dense.grad = torch.full((4, 3), 0.1 * step)
            rows.grad = torch.sparse_coo_tensor(
                [[0, 2]], torch.randn(2, 3), (4, 3), check_invariants=True
            )
            optimizer.step()
        return [dense.detach(), rows.detach()]

    assert_torch_steps_and_we_warn_once(trained, "sparse", stock_steps)


@on_meta
def test_device_without_a_backend_sends_the_whole_step_to_torch_and_warns_once(name, stock_steps):
    def trained(module):
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "meta")]
        optimizer = getattr(module, name)(params)
        for _ in range(2):
            for param in params:
                param.grad = torch.full_like(param, 0.5)
            optimizer.step()
        return params[0].detach()

    assert_torch_steps_and_we_warn_once(trained, "meta", stock_steps)


@every_optimizer
def test_backend_asked_for_by_name_never_gives_way_to_torch(name, stock_steps):
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones_like(param)
    optimizer = getattr(fastopt, name)([param], backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot make this step: .* meta"):
        optimizer.step()
    assert stock_steps == []


@every_optimizer
def test_subclass_with_torch_dispatch_goes_to_torch_and_warns_once(name, stock_steps):
    def trained(module):
        param = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.zeros(3)))
        optimizer = getattr(module, name)([param])
        for _ in range(2):
            param.grad = TwoTensor(torch.full((3,), 0.5), torch.full((3,), 0.25))
            optimizer.step()
        return [param.a.detach(), param.b.detach()]

    assert_torch_steps_and_we_warn_once(trained, "TwoTensor", stock_steps)


@every_optimizer
def test_subclass_without_torch_dispatch_is_stepped_natively(name, stock_steps):
    class Tagged(torch.nn.Parameter):
        pass

    param = Tagged(torch.ones(3))
    optimizer = getattr(fastopt, name)([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert (param < 1).all()
    assert stock_steps == []


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_capturable_on_the_cpu_is_no_error_and_changes_no_bit(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    capturable = case.make_optimizer(case.parameters(), fastopt, capturable=True)
    plain = case.make_optimizer(case.parameters(), fastopt)
    for optimizer in (capturable, plain):
        train(case, optimizer, range(3))
    assert_equal(snapshot(capturable), snapshot(plain))


# torch.compile.


@every_optimizer
def test_compiled_step_is_the_plain_one_and_silent(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    compiled, plain = (case.make_optimizer(case.parameters(), fastopt) for _ in range(2))
    compiled_step = torch.compile(lambda: compiled.step(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            case.set_gradients(parameters(compiled), step)
            compiled_step()
    train(case, plain, range(3))
    assert_equal(snapshot(compiled), snapshot(plain))


@every_optimizer
def test_compiled_training_step_is_the_plain_one(name):
    def trained(compile):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = getattr(fastopt, name)(model.parameters(), lr=0.1)

        def training_step(inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = torch.compile(training_step, backend="eager") if compile else training_step
        return [step(torch.randn(3, 4)) for _ in range(3)], snapshot(optimizer)

    assert_equal(trained(compile=True), trained(compile=False))
