"""What torch 2.13's fused step gets wrong and ours does not, then slips of other projects."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.nn import Parameter

import fastopt
from cases import (
    BFLOAT16,
    COMPLEX64,
    FLOAT16,
    MIXED,
    Case,
    channels_last,
    every_second,
    state_names,
    transposed,
)
from helpers import (
    assert_equal,
    assert_refused,
    assert_same_tensors,
    forloop,
    fused_in_torch,
    make,
    snapshot,
    step_alike,
    train,
)
from oracle import Oracle

# Each of these tests is known to see its bug: it fails with torch's own fused step.
wrong_in_torch = pytest.mark.parametrize(
    "module",
    [
        fastopt,
        pytest.param(
            torch.optim,
            marks=pytest.mark.xfail(
                reason="wrong in torch 2.13", strict=torch.__version__.startswith("2.13.")
            ),
        ),
    ],
    ids=["fastopt", "torch"],
)

make_fused = partial(make, fused=True)


# Strides.


def assert_steps_like_forloop(module, name, param, place_grad, after_step=lambda param: None):
    twin = Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    optimizer, reference = make_fused(module, name, [param]), forloop(name, [twin])
    for _ in range(3):
        step_alike(optimizer, reference, place_grad)
        after_step(param)
    assert_same_tensors(optimizer, reference)


@fused_in_torch
@wrong_in_torch
def test_leaf_of_every_second_column(module, name):
    param = every_second(torch.randn(4, 6)).requires_grad_()
    assert_steps_like_forloop(module, name, param, place_grad=every_second)


@fused_in_torch
@wrong_in_torch
def test_transposed_gradient(module, name):
    param = Parameter(torch.randn(4, 6))
    assert_steps_like_forloop(module, name, param, place_grad=transposed)


@fused_in_torch
@wrong_in_torch
def test_parameter_made_channels_last_once_its_state_exists(module, name):
    def to_channels_last(param):
        param.data = channels_last(param.data)

    param = Parameter(torch.randn(2, 3, 4, 4))
    assert_steps_like_forloop(module, name, param, torch.clone, after_step=to_channels_last)


# Momentum buffers.


@wrong_in_torch
def test_overflow_in_the_first_step_leaves_no_momentum_buffer(module):
    param = Parameter(torch.ones(4))
    optimizer = make_fused(module, "SGD", [param])
    param.grad = torch.full((4,), torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.state[param].get("momentum_buffer") is None
    assert torch.equal(param, torch.ones(4))


@wrong_in_torch
def test_first_gradient_may_come_late_with_momentum(module):
    params, twins = ([Parameter(torch.ones(4)), Parameter(torch.ones(3))] for _ in range(2))
    optimizer, reference = make_fused(module, "SGD", params), forloop("SGD", twins)
    for step in range(3):
        for param, twin in zip(params, twins, strict=True):
            if step > 0 or param.numel() == 4:
                param.grad, twin.grad = torch.full_like(param, 0.5), torch.full_like(twin, 0.5)
        optimizer.step()
        reference.step()
    assert_same_tensors(optimizer, reference)


# AMP.


def by_group(module, name):
    params = [Parameter(torch.ones(4))]
    return make_fused(module, name, [{"params": params, "fused": True}], fused=None)


def by_deepcopy(module, name):
    return copy.deepcopy(make_fused(module, name, [Parameter(torch.ones(4))]))


def by_pickle(module, name):
    return pickle.loads(pickle.dumps(make_fused(module, name, [Parameter(torch.ones(4))])))


def by_load_state_dict(module, name):
    optimizer = make_fused(module, name, [Parameter(torch.ones(4))], fused=None)
    optimizer.load_state_dict(make_fused(module, name, [Parameter(torch.ones(4))]).state_dict())
    return optimizer


@fused_in_torch
@pytest.mark.parametrize("way", [by_group, by_deepcopy, by_pickle, by_load_state_dict])
@wrong_in_torch
def test_fused_step_takes_scale_and_overflow_from_grad_scaler_however_it_was_made(
    module, way, name
):
    assert getattr(way(module, name), "_step_supports_amp_scaling", False)


@fused_in_torch
@wrong_in_torch
def test_overflow_on_two_devices_is_an_overflow(module, name):
    """GradScaler adds up what the devices found: 2.0 is not 1.0."""
    param = Parameter(torch.ones(4))
    optimizer = make_fused(module, name, [param])
    param.grad = torch.ones(4)
    optimizer.step()
    before = snapshot(optimizer)
    param.grad = torch.full((4,), torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(2.0)
    optimizer.step()
    assert_equal(snapshot(optimizer), before)


# Dtypes.


@pytest.mark.parametrize(
    "case",
    [
        Case(name, "everything", dtypes, "sizes")
        for name in ("Adam", "AdamW", "SGD")
        for dtypes in MIXED
    ],
    ids=str,
)
@wrong_in_torch
def test_mixed_dtypes(module, case):
    params = case.parameters()
    optimizer = case.make_optimizer(params, module, fused=True)
    oracle = Oracle(optimizer)
    case.set_gradients(params, seed=1)
    oracle.step()
    optimizer.step()
    for name, errors in oracle.ulp_errors().items():
        assert errors.max() < 16, name


@fused_in_torch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@wrong_in_torch
def test_load_state_dict_keeps_float32_state(module, dtype, name):
    param = Parameter(torch.ones(5, dtype=dtype))
    optimizer = make_fused(module, name, [param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    state_dict = optimizer.state_dict()
    moments = state_dict["state"][0]
    for key in moments.keys() - {"step"}:
        moments[key] = torch.full((5,), 1 / 3)
    optimizer.load_state_dict(state_dict)
    for key, value in moments.items():
        torch.testing.assert_close(optimizer.state[param][key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@wrong_in_torch
def test_capturable_on_the_cpu(module, name):
    param, twin = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = make_fused(module, name, [param], capturable=True, fused=None)
    reference = forloop(name, [twin])
    for _ in range(3):
        step_alike(optimizer, reference)
    assert_same_tensors(optimizer, reference)


@fused_in_torch
@wrong_in_torch
def test_complex_parameters(module, name):
    case = Case(name, "default", COMPLEX64, "sizes")
    optimizer = make_fused(module, name, case.parameters())
    reference = forloop(name, case.parameters())
    train(case, optimizer, range(3))
    train(case, reference, range(3))
    assert_same_tensors(optimizer, reference)


@pytest.mark.parametrize("dtypes", [BFLOAT16, FLOAT16], ids=str)
@wrong_in_torch
def test_sgd_in_16_bit_updates_every_element(module, dtypes):
    """pytorch #191763: whole SIMD blocks of the parameter stay behind."""
    case = Case("SGD", "momentum", dtypes, "sizes")
    params = case.parameters()
    optimizer = case.make_optimizer(params, module, fused=True)
    for seed in range(3):
        oracle = Oracle(optimizer)
        case.set_gradients(params, seed)
        oracle.step()
        optimizer.step()
        for name, errors in oracle.ulp_errors().items():
            assert errors.max() < 0.51, name


# torch reads and writes past the end of such a state, so here it cannot be asked.
@fused_in_torch
@pytest.mark.parametrize("shape", [(3,), (5,), (2, 2), ()], ids=str)
def test_state_of_another_shape_is_refused(name, shape):
    params = [Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = make_fused(fastopt, name, params)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    key = state_names(optimizer)[-1]
    optimizer.state[params[2]][key] = torch.ones(shape)
    assert_refused(optimizer, rf"parameter 2 of group 0.*{key}")


# Slips of other projects.


def test_adams_decay_goes_through_the_moments_and_adamws_does_not():
    kwargs = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.99)}
    adam_param, adamw_param = Parameter(torch.full((3,), 2.0)), Parameter(torch.full((3,), 2.0))
    adam, adamw = fastopt.Adam([adam_param], **kwargs), fastopt.AdamW([adamw_param], **kwargs)
    adam_param.grad, adamw_param.grad = torch.zeros(3), torch.zeros(3)
    adam.step()
    adamw.step()
    # decay of 0.5 * 2 is Adam's whole gradient, and its first step is one of lr
    torch.testing.assert_close(adam.state[adam_param]["exp_avg"], torch.full((3,), 0.1))
    torch.testing.assert_close(adam_param.detach(), torch.full((3,), 1.9))
    assert torch.equal(adamw.state[adamw_param]["exp_avg"], torch.zeros(3))
    torch.testing.assert_close(adamw_param.detach(), torch.full((3,), 2.0 * 0.95))


@fused_in_torch
def test_nothing_is_remembered_by_object_or_address(name):
    """Every tensor is replaced between steps, so that ids and addresses come back for others."""
    param, twin = Parameter(torch.ones(64)), Parameter(torch.ones(64))
    optimizer, reference = make_fused(fastopt, name, [param]), forloop(name, [twin])
    for step in range(10):
        param.grad = torch.full((64,), 1.0 + step)
        twin.grad = param.grad.clone()
        optimizer.step()
        reference.step()
        param.data = param.data.clone()
        optimizer.state[param] = {k: v.clone() for k, v in optimizer.state[param].items()}
        param.grad = None
    assert_same_tensors(optimizer, reference)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_group_of_several_dtypes_counts_one_step(name):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]
    params = [Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
    optimizer = make_fused(fastopt, name, params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1, 1, 1]
