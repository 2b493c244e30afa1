"""What a step does beside its rule: max_grad_norm, skip_nonfinite, average."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import fastopt
from cases import CASES, KEPT, construct
from helpers import (
    assert_equal,
    assert_same_bits,
    every_optimizer,
    every_rule,
    make,
    native_only,
    parameters,
    snapshot,
)

pytestmark = native_only

every_case = pytest.mark.parametrize("case", CASES, ids=str)
LIMIT = 0.5
every_format = pytest.mark.parametrize(
    "options", KEPT.values(), ids=[name or "as torch" for name in KEPT]
)


def new_params(dtype=torch.float32, shapes=((40, 50), (7,), (), (5000,))):
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params, step=0, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (scale * values).to(param.dtype)


def grads_of(params):
    return [param.grad.clone() for param in params]


def without(states, *names):
    return {key: value for key, value in states.items() if key.rsplit(".")[-1] not in names}


# Clipping.


@every_case
def test_clipping_inside_is_clipping_before(case):
    def optimizer(**options):
        return case.make_optimizer(case.parameters(), fastopt, **options)

    inside, before = optimizer(max_grad_norm=LIMIT), optimizer()
    for step in range(3):
        for each in (inside, before):
            case.set_gradients(parameters(each), step)
        given = [p.grad if p.grad is None else p.grad.clone() for p in parameters(inside)]
        norm = fastopt.clip_grad_norm_(parameters(before), LIMIT)
        before.step()
        inside.step()
        assert_close(inside.grad_norm.to(norm.dtype), norm, rtol=0, atol=0)
        assert_equal([p.grad for p in parameters(inside)], given)  # read, not written
    assert_same_bits(inside, before)


@every_optimizer
def test_clipping_inside_is_torchs_two_calls_within_rounding(name):
    ours = make(fastopt, name, new_params(torch.float64), max_grad_norm=LIMIT)
    stock = make(torch.optim, name, new_params(torch.float64))
    for step in range(5):
        give_gradients(parameters(ours), step)
        give_gradients(parameters(stock), step)
        norm = torch.nn.utils.clip_grad_norm_(parameters(stock), LIMIT)
        ours.step()
        stock.step()
        assert_close(ours.grad_norm, norm)
    assert_close(snapshot(ours), snapshot(stock), rtol=1e-9, atol=1e-11)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_goes_with_every_format(dtype, options):
    inside = fastopt.AdamW(new_params(dtype), max_grad_norm=LIMIT, **options)
    before = fastopt.AdamW(new_params(dtype), **options)
    for step in range(3):
        for each in (inside, before):
            give_gradients(parameters(each), step)
        fastopt.clip_grad_norm_(parameters(before), LIMIT)
        before.step()
        inside.step()
    assert_same_bits(inside, before)


def test_gradients_within_the_limit_are_left_alone():
    clipped = fastopt.AdamW(new_params(), max_grad_norm=1e9)
    plain = fastopt.AdamW(new_params())
    for each in (clipped, plain):
        give_gradients(parameters(each))
        each.step()
    assert_same_bits(clipped, plain)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_a_scaler_the_norm_is_of_unscaled_gradients(dtype, fused):
    def steps(optimizer, clip):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            give_gradients(parameters(optimizer), step, scale=2.0**10)
            scaler.scale(torch.ones(()))  # makes the scale's tensor
            if clip:
                scaler.unscale_(optimizer)
                fastopt.clip_grad_norm_(parameters(optimizer), LIMIT)
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    inside = steps(fastopt.AdamW(new_params(dtype), max_grad_norm=LIMIT, fused=fused), False)
    before = steps(fastopt.AdamW(new_params(dtype), fused=fused), True)
    assert_same_bits(inside, before)
    give_gradients(parameters(before), 2)
    grads = [grad.float() for grad in grads_of(parameters(before))]
    assert_equal(inside.grad_norm, fastopt.get_total_norm(grads))


def test_all_groups_have_one_norm():
    first, second = new_params(shapes=((3,),)), new_params(shapes=((4,),))
    optimizer = fastopt.SGD(
        [{"params": first}, {"params": second, "lr": 0.1}], lr=1.0, max_grad_norm=1.0
    )
    first[0].grad, second[0].grad = torch.full((3,), 3.0), torch.full((4,), 3.0)
    start = [first[0].detach().clone(), second[0].detach().clone()]
    optimizer.step()
    norm = math.sqrt(7 * 9)
    assert_close(optimizer.grad_norm.item(), norm)
    assert_close(start[0] - first[0], torch.full((3,), 3 / norm))
    assert_close(start[1] - second[0], torch.full((4,), 0.3 / norm))


def test_limit_as_a_tensor_can_change_between_steps():
    limit = torch.tensor(1.0)
    optimizer = fastopt.SGD(new_params(shapes=((4,),)), lr=1.0, max_grad_norm=limit)
    (param,) = parameters(optimizer)
    for value in (1.0, 3.0, 100.0):
        limit.fill_(value)
        start = param.detach().clone()
        param.grad = torch.full((4,), 3.0)
        optimizer.step()
        assert_close(start - param, torch.full((4,), min(3.0, value / 2)))


def test_a_norm_that_was_found_elsewhere():
    optimizer = fastopt.SGD(new_params(shapes=((4,),)), lr=1.0, max_grad_norm=1.0)
    (param,) = parameters(optimizer)
    start = param.detach().clone()
    param.grad = torch.full((4,), 3.0)
    optimizer.total_norm = torch.tensor(12.0)
    optimizer.step()
    assert_close(start - param, torch.full((4,), 0.25))
    assert optimizer.grad_norm == 12
    assert optimizer.total_norm is None  # for one step
    optimizer.step()
    assert optimizer.grad_norm == 6
    for bad in (-1.0, "1", torch.ones(2)):
        with pytest.raises(ValueError, match="total_norm must be"):
            optimizer.total_norm = bad
    with pytest.raises(ValueError, match="total_norm needs max_grad_norm="):
        fastopt.SGD(new_params()).total_norm = 1.0


def test_grad_norm_is_none_before_the_first_step_and_without_the_option():
    optimizer = fastopt.AdamW(new_params(), max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    assert fastopt.AdamW(new_params()).grad_norm is None
    optimizer.step()  # without any gradient
    assert_equal(optimizer.grad_norm, torch.tensor(0.0))


def test_step_during_backward_is_refused():
    param = new_params(shapes=((4,),))[0]
    optimizer = fastopt.SGD([param], lr=1.0, max_grad_norm=1.0)
    handle = param.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="during the backward pass"):
        param.square().sum().backward()
    assert_equal(param.detach(), before)
    handle.remove()

    def step(p):
        optimizer.total_norm = p.grad.norm()
        optimizer.step()

    param.grad = None
    param.register_post_accumulate_grad_hook(step)
    param.sum().backward()
    assert_close(before - param, torch.full((4,), 0.5))


# Skipping.


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_with_a_norm_that_is_not_finite_changes_nothing(name, bad):
    skipping = construct(
        fastopt, name, new_params(), max_grad_norm=1.0, skip_nonfinite=True, average=0.9
    )
    never = construct(fastopt, name, new_params(), max_grad_norm=1.0, average=0.9)
    for step in range(4):
        give_gradients(parameters(skipping), step)
        give_gradients(parameters(never), step)
        if step in (0, 2):
            parameters(skipping)[0].grad[3, 3] = bad
            before = snapshot(skipping)
            skipping.step()
            assert_equal(snapshot(skipping), before)
            assert not skipping.grad_norm.isfinite()
        else:
            skipping.step()
            never.step()
    assert skipping.skipped_steps == 2
    assert never.skipped_steps == 0
    assert_same_bits(skipping, never)


def test_without_it_a_norm_that_is_not_finite_does_as_torch_does():
    ours, stock = fastopt.SGD(new_params(), max_grad_norm=1.0), torch.optim.SGD(new_params())
    for optimizer in (ours, stock):
        give_gradients(parameters(optimizer))
        parameters(optimizer)[0].grad[0, 0] = math.inf
    torch.nn.utils.clip_grad_norm_(parameters(stock), 1.0)
    for optimizer in (ours, stock):
        optimizer.step()
    assert_close(snapshot(ours), snapshot(stock), equal_nan=True)


# Averaging.


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_average_is_that_of_averaged_model(name, dtype):
    decay = 0.9
    model = torch.nn.ParameterList(new_params(dtype))
    optimizer = construct(fastopt, name, list(model.parameters()), average=decay)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(5):
        give_gradients(parameters(optimizer), step)
        optimizer.step()
        averaged.update_parameters(model)
        for param, expected in zip(parameters(optimizer), averaged.parameters(), strict=True):
            assert_close(optimizer.state[param]["average"], expected.detach())


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_average_of_16_bit_parameters_is_kept_in_float32(dtype, options):
    if dtype == torch.float16 and "weights" in options:
        with pytest.raises(ValueError, match="float16"):
            fastopt.AdamW(new_params(dtype), average=0.5, **options)
        return
    optimizer = fastopt.AdamW(new_params(dtype), lr=0.1, average=0.5, **options)
    expected = None
    for step in range(4):
        give_gradients(parameters(optimizer), step)
        optimizer.step()
        values = [param.detach().float() for param in parameters(optimizer)]
        expected = (
            values
            if expected is None
            else [e.lerp(v, 0.5) for e, v in zip(expected, values, strict=True)]
        )
    averages = [optimizer.state[param]["average"] for param in parameters(optimizer)]
    assert {average.dtype for average in averages} == {torch.float32}
    assert_close(averages, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_has_the_averages_for_a_while(dtype):
    optimizer = fastopt.AdamW(new_params(dtype), lr=0.1, average=0.5, max_grad_norm=1.0)
    params = parameters(optimizer)
    with optimizer.averaged():
        pass  # there are none yet
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    before = snapshot(optimizer)
    with optimizer.averaged():
        for param in params:
            assert_equal(param.detach(), optimizer.state[param]["average"].to(dtype))
        assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match=r"leave averaged\(\) before the next step"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="leave the inner"), optimizer.averaged():
            pass
    assert_equal(snapshot(optimizer), before)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert_equal(snapshot(optimizer), before)
    with pytest.raises(ValueError, match="needs average="), fastopt.SGD(params).averaged():
        pass


def test_average_begins_with_the_first_step_that_is_asked_for_it():
    plain = fastopt.AdamW(new_params(), lr=0.1)
    give_gradients(parameters(plain))
    plain.step()
    optimizer = fastopt.AdamW(new_params(), lr=0.1, average=0.99)
    optimizer.load_state_dict(plain.state_dict())
    give_gradients(parameters(optimizer), 1)
    optimizer.step()
    for param in parameters(optimizer):
        assert_equal(optimizer.state[param]["average"], param.detach())


def test_average_of_another_model_is_refused():
    optimizer = fastopt.AdamW(new_params(), average=0.9)
    give_gradients(parameters(optimizer))
    optimizer.step()
    optimizer.state[parameters(optimizer)[0]]["average"] = torch.zeros(3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="parameter 0 of group 0: state 'average'"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


# Kept.

ALL = {"max_grad_norm": LIMIT, "skip_nonfinite": True, "average": 0.9}


@every_format
def test_run_resumes_bit_for_bit(options):
    def optimizer():
        return fastopt.AdamW(new_params(torch.bfloat16), lr=0.1, **ALL, **options)

    whole, first = optimizer(), optimizer()
    for step in range(2):
        for each in (whole, first):
            give_gradients(parameters(each), step)
            each.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = optimizer()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for param, saved in zip(parameters(resumed), parameters(first), strict=True):
        param.data.copy_(saved)
    for step in range(2, 4):
        for each in (whole, resumed):
            give_gradients(parameters(each), step)
            each.step()
    assert_same_bits(resumed, whole)


@every_optimizer
def test_torch_goes_on_with_such_a_checkpoint(name):
    ours = construct(fastopt, name, new_params(), **ALL)
    give_gradients(parameters(ours))
    ours.step()
    stock = construct(torch.optim, name, copy.deepcopy(parameters(ours)))
    stock.load_state_dict(ours.state_dict())
    give_gradients(parameters(stock), 1)
    start = snapshot(stock)
    stock.step()
    moved = snapshot(stock)
    assert_equal(moved["0.average"], start["0.average"])  # torch leaves what it does not know
    assert not torch.equal(moved["0.param"], start["0.param"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_options_survive_copies(copied):
    optimizer = fastopt.AdamW(new_params(), **ALL)
    parameters(optimizer)[0].grad = torch.full((40, 50), math.nan)
    optimizer.step()
    twin = copied(optimizer)
    assert twin.skipped_steps == 1
    for each in (optimizer, twin):
        give_gradients(parameters(each))
        each.step()
    assert_same_bits(twin, optimizer)
    assert_equal(twin.grad_norm, optimizer.grad_norm)


# Refused.


@pytest.mark.parametrize("limit", [-1.0, math.nan, "1", [1.0], True, torch.ones(2), 1j])
def test_max_grad_norm_must_be_one_number_from_0_on(limit):
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        fastopt.AdamW(new_params(), max_grad_norm=limit)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan, "0.9", True])
def test_average_must_be_a_decay(decay):
    with pytest.raises(ValueError, match="average must be a decay from 0 up to 1"):
        fastopt.AdamW(new_params(), average=decay)


def test_skip_nonfinite_needs_a_norm():
    with pytest.raises(ValueError, match=r"needs max_grad_norm=.*float\('inf'\) clips nothing"):
        fastopt.AdamW(new_params(), skip_nonfinite=True)
    fastopt.AdamW(new_params(), skip_nonfinite=True, max_grad_norm=math.inf)


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"average": 0.9}], ids=str)
def test_what_torch_would_have_to_step_is_refused(option):
    with pytest.raises(ValueError, match="does not go with differentiable=True"):
        fastopt.AdamW(new_params(), differentiable=True, **option)
    with pytest.raises(ValueError, match="torch's own step has no"):
        fastopt.AdamW(new_params(), backend="torch", **option)
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = fastopt.SGD(embedding.parameters(), lr=1.0, **option)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="give dense tensors"):
        optimizer.step()
    assert_equal(embedding.weight.detach(), before)


def test_unknown_option_is_pythons_error():
    with pytest.raises(TypeError, match=r"AdamW.__init__\(\) got an unexpected keyword .*'decay'"):
        fastopt.AdamW(new_params(), decay=0.9)
