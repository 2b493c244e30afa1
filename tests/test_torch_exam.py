"""torch's own exam for its optimizers, sat by ours.

The questions (configurations and error inputs) ship with torch as `optim_db`; the bodies follow
`TestOptimRenewed` in torch's test/test_optim.py, which does not ship.
"""

import copy
import io
import itertools

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import fastopt
from cases import construct
from helpers import assert_equal, assert_same_tensors, snapshot, step_alike


def _info_of_ours(info):
    info = copy.copy(info)
    info.optim_cls = getattr(fastopt, info.name)
    return info


INFOS = [_info_of_ours(info) for info in optim_db if hasattr(fastopt, info.name)]


def _native_inputs(info):
    # torch asks about capturable on accelerators only; our kernels know it everywhere
    return info.optim_inputs_func(device="cuda")


def _all_inputs(info):
    # a differentiable step cannot update leaves, which these bodies train
    return _native_inputs(info) + _get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, info, skip=("differentiable",)
    )


def _questions(inputs):
    return pytest.mark.parametrize(
        ("info", "question"),
        [
            pytest.param(info, question, id=f"{info.name}-{question.desc}")
            for info in INFOS
            for question in inputs(info)
        ],
    )


run_natively = _questions(_native_inputs)
in_every_configuration = _questions(_all_inputs)
fused_in_torch = pytest.mark.parametrize(
    "info",
    [info for info in INFOS if "fused" in info.supported_impls],
    ids=lambda info: info.name,
)


def make(info, question, params, **overrides):
    return info.optim_cls(params, **copy.deepcopy(question.kwargs) | overrides)


def make_forloop(info, question, params):
    """torch's own for-loop, which on the CPU has no capturable: there it changes no number. It
    computes with a Tensor lr in float32, with a number in double."""
    kwargs = copy.deepcopy(question.kwargs) | {"foreach": False, "fused": False}
    kwargs.pop("capturable", None)
    if "lr" in kwargs:
        kwargs["lr"] = float(kwargs["lr"])
    return construct(torch.optim, info.name, params, **kwargs)


class Regression:
    """Fits a small linear layer to zero: two parameters, one of them perhaps not contiguous."""

    def __init__(self, contiguous=True, dtype=torch.float32):
        weight = torch.randn(10, 5, dtype=dtype) if contiguous else _strided((10, 5), dtype)
        bias = torch.randn(10, dtype=dtype) if contiguous else _strided((10,), dtype)
        self.weight, self.bias = Parameter(weight), Parameter(bias)
        self.input = torch.randn(5, dtype=dtype)

    @property
    def params(self):
        return [self.weight, self.bias]

    def closure(self, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
            loss.backward()
            return loss

        return closure

    def train(self, optimizer, steps):
        for _ in range(steps):
            loss = optimizer.step(self.closure(optimizer))
        return loss.item()


def _strided(shape, dtype):
    return torch.randn(*shape, 2, dtype=dtype)[..., 0]


def trained(info, question):
    problem = Regression()
    optimizer = make(info, question, problem.params)
    problem.train(optimizer, steps=3)
    return problem, optimizer


@run_natively
def test_configuration_runs_natively(info, question, monkeypatch):
    monkeypatch.setattr(info.optim_cls, "_torch_step", None)  # not called, or an error
    trained(info, question)


@pytest.mark.parametrize(
    ("info", "error_input"),
    [
        pytest.param(info, error_input, id=f"{info.name}-{error_input.optimizer_error_input.desc}")
        for info in INFOS
        for error_input in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    ],
)
def test_errors(info, error_input):
    assert error_input.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    question = error_input.optimizer_error_input
    params = [Parameter(torch.randn(2, 3))] if question.params is None else question.params
    expect = pytest.warns if issubclass(error_input.error_type, Warning) else pytest.raises
    with expect(error_input.error_type, match=error_input.error_regex):
        info.optim_cls(params, **question.kwargs)


@pytest.mark.parametrize(
    "info", [i for i in INFOS if "fused" in i.supported_impls], ids=lambda info: info.name
)
@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("foreach", "`fused` and `foreach` cannot be `True` together"),
        ("differentiable", "`fused` does not support `differentiable`"),
    ],
)
def test_fused_excludes(info, flag, text):
    with pytest.raises(RuntimeError, match=text):
        info.optim_cls([Parameter(torch.randn(2))], fused=True, **{flag: True})


def assert_right_direction(question, problem, optimizer, after_step=lambda loss: None):
    closure = problem.closure(optimizer)
    first = closure().item()
    for _ in range(20):
        after_step(optimizer.step(closure))
    if question.kwargs.get("maximize"):
        assert closure().item() > first
    else:
        assert closure().item() < first


@in_every_configuration
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_right_direction(info, question, contiguous):
    problem = Regression(contiguous)
    assert_right_direction(question, problem, make(info, question, problem.params))


@run_natively
def test_goes_right_direction_with_lrsched(info, question):
    for make_schedulers in info.scheduler_inputs:
        problem = Regression()
        optimizer = make(info, question, problem.params)
        schedulers = [make_scheduler(optimizer) for make_scheduler in make_schedulers]

        def after_step(loss, schedulers=schedulers):
            for scheduler in schedulers:
                scheduler.step(*[loss.item()] * isinstance(scheduler, ReduceLROnPlateau))

        assert_right_direction(question, problem, optimizer, after_step)


@run_natively
@pytest.mark.parametrize(
    ("key", "values"), [("lr", (0.01, 0.0)), ("weight_decay", (0.0, 0.7))], ids=["lr", "decay"]
)
def test_param_groups(info, question, key, values):
    """Each group goes by its own value, and the others by the default."""
    problem = Regression()
    twin = copy.deepcopy(problem)

    def groups(problem):
        weight, bias = ({"params": p, key: v} for p, v in zip(problem.params, values, strict=True))
        return [weight, bias, {"params": Parameter(torch.ones(3))}]

    ours = make(info, question, groups(problem))
    reference = make_forloop(info, question, groups(twin))
    problem.train(ours, steps=5)
    twin.train(reference, steps=5)
    assert_same_tensors(ours, reference)


@run_natively
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.complex64],  # in 16 bit the for-loop is no reference
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_matches_forloop(info, question, dtype):
    shapes = [(2, 3), (1,), (), (0,), (17, 33), (5,)]
    params = [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    twins = copy.deepcopy(params)
    ours, reference = make(info, question, params), make_forloop(info, question, twins)
    for _ in range(7):
        step_alike(ours, reference)
    assert_same_tensors(ours, reference)


@run_natively
def test_complex_2d_equals_a_real_parameter_of_pairs(info, question):
    values = torch.randn(10, 5, dtype=torch.complex64)
    as_complex = Parameter(values.clone())
    as_pairs = Parameter(torch.view_as_real(values.clone()))
    of_complex = make(info, question, [as_complex])
    of_pairs = make(info, question, [as_pairs])
    for _ in range(4):
        as_complex.grad = torch.randn_like(as_complex)
        as_pairs.grad = torch.view_as_real(as_complex.grad).clone()
        of_complex.step()
        of_pairs.step()
    assert torch.equal(torch.view_as_real(as_complex.detach()), as_pairs.detach())
    for name, state in of_pairs.state[as_pairs].items():
        of_complex_state = of_complex.state[as_complex][name]
        if state.dim() > 0:
            of_complex_state = torch.view_as_real(of_complex_state)
        assert torch.equal(of_complex_state, state), name


@in_every_configuration
@pytest.mark.parametrize("empty", [False, True])
def test_step_is_noop_when_params_have_no_grad(info, question, empty):
    params = [Parameter(torch.randn(0 if empty else 2, 3)) for _ in range(2)]
    before = copy.deepcopy(params)
    make(info, question, params).step()
    assert all(map(torch.equal, params, before))


@in_every_configuration
def test_step_is_noop_for_zero_grads(info, question):
    """Without weight decay; and an empty parameter is no obstacle."""
    params = [Parameter(torch.randn(5, 1, dtype=torch.float64)), Parameter(torch.randn(0, 2))]
    before = copy.deepcopy(params)
    optimizer = make(info, question, params)
    optimizer.param_groups[0].update(weight_decay=0.0, lambd=0.0)  # of ASGD
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(map(torch.equal, params, before))


@run_natively
def test_step_does_nothing_if_found_inf(info, question):
    problem, optimizer = trained(info, question)
    before = snapshot(optimizer)
    problem.closure(optimizer)()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert_equal(snapshot(optimizer), before)


@in_every_configuration
def test_optimizer_can_be_printed(info, question):
    optimizer = make(info, question, [Parameter(torch.randn(2, 3))])
    assert repr(optimizer).startswith(f"{info.name} (\nParameter Group 0\n")
    for key in optimizer.param_groups[0].keys() - {"params"}:
        assert f"    {key}: " in repr(optimizer)


@in_every_configuration
def test_state_dict_is_deterministic_and_resumes(info, question):
    """A copy that loads the state dict goes the very same way."""
    problem, optimizer = trained(info, question)
    twin = copy.deepcopy(problem)
    resumed = make(info, question, twin.params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert str(resumed.state_dict()) == str(optimizer.state_dict())
        problem.train(optimizer, steps=1)
        twin.train(resumed, steps=1)
        assert_same_tensors(resumed, optimizer, rtol=0, atol=0)


@in_every_configuration
def test_can_load_older_state_dict(info, question):
    """Flags that later versions of torch added may be missing."""
    problem, optimizer = trained(info, question)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group, flag in itertools.product(state_dict["param_groups"], info.not_og_supported_flags):
        group.pop(flag, None)
    optimizer.load_state_dict(state_dict)
    problem.train(optimizer, steps=1)


@in_every_configuration
def test_load_nontensor_step(info, question):
    problem, optimizer = trained(info, question)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    twin = copy.deepcopy(problem)
    resumed = make(info, question, twin.params)
    resumed.load_state_dict(state_dict)
    problem.train(optimizer, steps=1)
    twin.train(resumed, steps=1)
    assert_same_tensors(resumed, optimizer, rtol=0, atol=0)


@in_every_configuration
@pytest.mark.parametrize("named", ["neither", "saved", "loading", "both"])
def test_can_load_from_to_named_state_dict(info, question, named):
    problem = Regression()
    names = ["weight", "bias"]

    def optimizer_for(problem, is_named):
        params = zip(names, problem.params, strict=True) if is_named else problem.params
        return make(info, question, [*params])

    optimizer = optimizer_for(problem, named in ("saved", "both"))
    problem.train(optimizer, steps=3)
    twin = copy.deepcopy(problem)
    resumed = optimizer_for(twin, named in ("loading", "both"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    problem.train(optimizer, steps=2)
    twin.train(resumed, steps=2)
    assert_same_tensors(resumed, optimizer, rtol=0, atol=0)
    assert resumed.param_groups[0].get("param_names") == (None if named == "neither" else names)


@in_every_configuration
def test_save_load_equality_with_weights_only(info, question):
    _, optimizer = trained(info, question)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert str(loaded) == str(saved)
    for key, state in saved["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(loaded["state"][key][name], value, rtol=0, atol=0)


@in_every_configuration
def test_deepcopy_copies_all_public_attrs(info, question):
    optimizer = make(info, question, [Parameter(torch.randn(2, 3))])

    def public(optimizer):
        return {name: value for name, value in vars(optimizer).items() if name[0] != "_"}

    assert str(public(copy.deepcopy(optimizer))) == str(public(optimizer))


@in_every_configuration
def test_non_empty_state(info, question):
    """Entries of the state that belong to no parameter are left alone."""
    problem = Regression()
    optimizer = make(info, question, problem.params)
    optimizer.state["shared"] = {"note": torch.ones(1)}
    problem.train(optimizer, steps=1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    problem.train(optimizer, steps=1)
    assert torch.equal(optimizer.state["shared"]["note"], torch.ones(1))


@run_natively
@pytest.mark.filterwarnings("ignore:fastopt.* steps through torch.optim")
@pytest.mark.parametrize("fused", [True, False])
def test_engine_may_change_in_mid_run(info, question, fused):
    """A flag set on a group changes who steps it, not where it goes."""
    problem, optimizer = trained(info, question)
    twin = copy.deepcopy(problem)
    changed = make(info, question, twin.params)
    changed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    changed.param_groups[0].update(fused=fused, capturable=False)
    problem.train(optimizer, steps=3)
    twin.train(changed, steps=3)
    assert_same_tensors(changed, optimizer)


@in_every_configuration
def test_hooks_fire_in_order(info, question):
    optimizer = make(info, question, [Parameter(torch.randn(2, 3))])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before save"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("after save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after load"))
    optimizer.step()
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict(state_dict)
    assert seen == [
        f"{when} {what}" for what in ("step", "save", "load") for when in ("before", "after")
    ]
