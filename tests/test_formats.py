"""Narrow states and split weights: what is kept, what training sees of it, and what cannot be."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastopt
from cases import in_formats
from fastopt import _C
from helpers import assert_same_bits, every_rule, make, native_only, parameters

pytestmark = native_only

SHAPES = [(3, 300), (5,), (), (2, 3, 5, 5), (130, 7), (0, 4)]
narrow = pytest.mark.parametrize("states", ["bfloat16", "8bit"])
KEPT = in_formats("bfloat16", "8bit", "split", "split 8bit", "stochastic bfloat16")
every_format = pytest.mark.parametrize(("kept", "dtype"), KEPT, ids=str)


def make_params(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(parameters(optimizer)):
            generator = torch.Generator().manual_seed(100 * step + i)
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.bfloat16().to(param.dtype)
        optimizer.step()


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers of a split parameter."""
    return ((param.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


# Split weights.


@pytest.mark.parametrize("states", [None, "bfloat16", "8bit"])
@every_rule
def test_split_training_is_float32_training_bit_for_bit(name, states):
    params = make_params(torch.bfloat16)
    wide = [torch.nn.Parameter(param.detach().float()) for param in params]
    split = make(fastopt, name, params, weights="split", states=states)
    whole = make(fastopt, name, wide, states=states)
    for step in range(4):
        train(split, range(step, step + 1))
        train(whole, range(step, step + 1))
        for param, expected in zip(params, wide, strict=True):
            remainder = split.state[param]["remainder"]
            assert torch.equal(joined(param.detach(), remainder), expected.detach())
            off = (param.detach().float() - expected.detach()).abs()
            nearest = (expected.detach().bfloat16().float() - expected.detach()).abs()
            assert torch.equal(off, nearest)


def test_split_weights_overwritten_take_effect():
    weights = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, 0.0, 3.0, 0.0]).bfloat16()
    for _ in range(20):
        param = torch.nn.Parameter(torch.randn(8).bfloat16())
        optimizer = fastopt.SGD([param], lr=1e-3, weights="split")
        for _ in range(3):
            param.grad = torch.randn(8).bfloat16()
            optimizer.step()
        param.data.copy_(weights)
        param.grad = torch.zeros(8, dtype=torch.bfloat16)
        optimizer.step()
        assert torch.equal(param.detach(), weights)


def test_small_updates_of_bfloat16_weights_are_kept():
    for kept in ({"weights": "split"}, {"weights": "stochastic"}):
        param = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        optimizer = fastopt.SGD([param], lr=1e-5, **kept)
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert param.detach().float().mean().sub(0.99).abs() < 0.002  # nearest leaves it at 1
        assert param.detach().float().std() < 0.01


@every_format
def test_a_step_of_nothing_moves_nothing(kept, dtype):
    params = make_params(dtype)
    before = copy.deepcopy(params)
    optimizer = fastopt.AdamW(params, lr=0.0, **kept)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(map(torch.equal, params, before))


# 8 bits.


def packed(numbers: Tensor, is_signed: bool) -> Tensor:
    codes = torch.empty(_C.block_bytes(numbers), dtype=torch.uint8)
    _C.encode(numbers, numbers.shape[0], numbers.numel(), is_signed, codes)
    return codes


def unpacked(codes: Tensor, shape: torch.Size, is_signed: bool) -> Tensor:
    numbers = torch.empty(shape, dtype=torch.bfloat16)
    _C.decode(codes, shape[0], numbers.numel(), is_signed, numbers)
    return numbers.float()


PATTERNS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x80000001]),
    st.integers(0x3F000000, 0x40000000),
    st.integers(0, 0x00FFFFFF),
)


@pytest.mark.parametrize("is_signed", [True, False])
@settings(deadline=None, max_examples=300)
@given(patterns=st.lists(PATTERNS, min_size=1, max_size=300), rows=st.integers(1, 3))
def test_what_was_stored_is_stored_again_as_it_is(is_signed, patterns, rows):
    row = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    numbers = row.repeat(rows, 1)
    once = unpacked(packed(numbers, is_signed), numbers.shape, is_signed)
    again = unpacked(packed(once, is_signed), numbers.shape, is_signed)
    assert torch.equal(once.isnan(), again.isnan())
    assert torch.equal(once.nan_to_num(), again.nan_to_num())
    finite = numbers.isfinite()
    assert not (once.isfinite() & ~finite).any()  # neither NaN nor infinity is hidden
    if not is_signed:
        assert ((once == 0) == (numbers == 0)).all()
    for block, kept in zip(numbers.split(128, dim=1), once.split(128, dim=1), strict=True):
        largest = block.abs().amax(dim=1, keepdim=True)
        near = (block.abs() >= largest / 2**12) & (largest > 1e-30) & (largest < 1e38)
        error = (kept.abs() - block.abs()).abs()
        assert (error[near] <= block.abs()[near] / 16).all()


@narrow
@every_rule
def test_states_are_bfloat16_numbers_and_no_square_is_lost(name, states):
    params = make_params(torch.float32)
    optimizer = make(fastopt, name, params, states=states)
    reference = make(fastopt, name, make_params(torch.float32))
    train(optimizer, range(3))
    train(reference, range(3))
    saved, exact = (o.state_dict()["state"] for o in (optimizer, reference))
    for i, kept in saved.items():
        for key, value in kept.items():
            if value.dim() == 0 and SHAPES[i] != ():
                continue
            assert value.shape == SHAPES[i]
            if name != "ASGD" and not (name == "RMSprop" and "grad_avg" in kept) and key != "step":
                assert value.dtype in (torch.bfloat16, torch.float32)
            if key.endswith("_sq") or key in ("square_avg", "sum"):
                assert ((value > 0) == (exact[i][key] > 0)).all()


# The seven cases of the simulation that the format was chosen by: the relative error of the summed
# update, and the largest single one, of exact averages; bound is what it measured.
CASES_8BIT = [
    ("steady", 0.999, 1e-3, 0.109, 1.15),
    ("falling", 0.999, 1e-3, 0.106, 1.0),
    ("spiky", 0.999, 1e-3, 0.083, 3.4),
    ("steady", 0.95, 1e-3, 0.070, 1.0),
    ("falling", 0.95, 1e-3, 0.074, 1.0),
    ("spiky", 0.95, 1e-3, 0.084, 1.0),
    ("steady", 0.999, 1e-8, 0.078, 1.0),
]


@pytest.mark.parametrize(("kind", "beta2", "size", "bound", "largest"), CASES_8BIT)
def test_eight_bits_follow_exact_averages(kind, beta2, size, bound, largest):
    count, steps = 2048, 2000
    scale = size * np.exp(np.random.default_rng(1).normal(0, 1.0, count))
    random = np.random.default_rng(2)
    param = torch.nn.Parameter(torch.zeros(1, count))
    optimizer = fastopt.Adam([param], lr=1.0, betas=(0.9, beta2), states="8bit")
    m, v, ours, exact = (np.zeros(count) for _ in range(4))
    most = 0.0
    for t in range(1, steps + 1):
        g = scale * random.standard_normal(count)
        if kind == "falling":
            g = g * 10 ** (-1.5 * t / steps)
        if kind == "spiky":
            g = g * np.where(random.random(count) < 0.003, 100, 1)
        g = g.astype(np.float32)
        m = 0.9 * m + 0.1 * g.astype(float)
        v = beta2 * v + (1 - beta2) * g.astype(float) ** 2
        exact += m / (1 - 0.9**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        param.data.zero_()
        param.grad = torch.from_numpy(g)[None]
        optimizer.step()
        update = -param.detach().numpy()[0]
        ours += update
        most = max(most, float(np.abs(update).max()))
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert error < 1.05 * bound  # 1.05: other random bits
    assert most < 1.5 * largest


@narrow
def test_average_of_squares_falls_with_the_gradients(states):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(16, 256)) for _ in range(2)]
    optimizers = [
        fastopt.Adam([params[0]], lr=0.0, states=states),
        fastopt.Adam([params[1]], lr=0.0),
    ]
    for step in range(4000):
        grad = torch.randn(16, 256, generator=generator) / (1 if step < 1000 else 30)
        grad[:, 0] *= step < 1000  # this one stops
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad
            optimizer.step()
    ours, exact = (o.state_dict()["state"][0]["exp_avg_sq"].float() for o in optimizers)
    ratio = ours[:, 1:] / exact[:, 1:]
    assert abs(ratio.mean() - 1) < 0.1
    assert abs((ours[:, 0] / exact[:, 0]).mean() - 1) < 0.25  # of 16 numbers


@narrow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_random_bits_do_not_depend_on_threads(states, threads):
    def stepped(count: int) -> torch.optim.Optimizer:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            params = [torch.nn.Parameter(torch.ones(70, 1000)), torch.nn.Parameter(torch.ones(9))]
            optimizer = fastopt.AdamW(params, states=states)
            train(optimizer, range(2))
            return optimizer
        finally:
            torch.set_num_threads(before)

    state = torch.get_rng_state()
    assert_same_bits(stepped(threads), stepped(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_states_are_rounded_up_as_often_as_they_should_and_independently():
    param = torch.nn.Parameter(torch.zeros(1 << 18))
    # 0.375 of the way from 1 to the next bfloat16; its square 0.75.
    param.grad = torch.full_like(param, 1 + 3 / 1024)
    optimizer = fastopt.Adam([param], lr=0.0, betas=(0.0, 0.0), states="bfloat16")
    optimizer.step()
    state = optimizer.state[param]
    up = torch.stack([state["exp_avg"] > 1, state["exp_avg_sq"] > 1]).float()
    spread = 4 / param.numel() ** 0.5  # four standard deviations of a mean, at most
    assert (up.mean(1) - torch.tensor([0.375, 0.75])).abs().max() < spread
    neighbours = torch.corrcoef(torch.cat([up[:, 1:], up[:, :-1]]))
    assert (neighbours - torch.eye(4)).abs().max() < spread


# What surrounds a step changes no bit of it.


@every_format
def test_a_scaled_loss_leaves_the_same_bits(kept, dtype):
    plain = fastopt.AdamW(make_params(dtype), **kept)
    scaled = fastopt.AdamW(make_params(dtype), **kept)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        train(plain, range(step, step + 1))
        for param, own in zip(parameters(scaled), parameters(plain), strict=True):
            scaler.scale((param * own.grad).sum()).backward()  # whose gradient it is
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
    assert_same_bits(plain, scaled)


@every_format
def test_a_step_in_the_backward_pass_leaves_the_same_bits(kept, dtype):
    plain = fastopt.AdamW(make_params(dtype), **kept)
    params = make_params(dtype)
    each = {param: fastopt.AdamW([param], **kept) for param in params}
    for param in params:
        param.register_post_accumulate_grad_hook(lambda param: each[param].step())
    for step in range(3):
        train(plain, range(step, step + 1))
        for param, own in zip(params, parameters(plain), strict=True):
            param.grad = None
            (param * own.grad).sum().backward()
    for param, own in zip(params, parameters(plain), strict=True):
        assert torch.equal(param, own)


@every_format
def test_a_tensor_as_learning_rate_leaves_the_same_bits(kept, dtype):
    optimizers = [
        fastopt.AdamW(make_params(dtype), lr=lr, **kept) for lr in (2.0**-7, torch.tensor(2.0**-7))
    ]
    for optimizer in optimizers:
        train(optimizer, range(3))
    for param, own in zip(*map(parameters, optimizers), strict=True):
        assert torch.equal(param, own)


# Checkpoints.


@every_format
@every_rule
def test_resumed_is_as_if_it_had_not_stopped(name, kept, dtype):
    straight = make(fastopt, name, make_params(dtype), **kept)
    train(straight, range(3))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    params = [torch.nn.Parameter(p.detach().clone()) for p in parameters(straight)]
    resumed = make(fastopt, name, params, **kept)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        train(straight, range(step, step + 1))
        train(resumed, range(step, step + 1))
        for own, other in zip(parameters(straight), params, strict=True):
            assert torch.equal(own, other)
    saved = [o.state_dict()["state"] for o in (straight, resumed)]
    for i in saved[0]:
        for key, value in saved[0][i].items():
            assert torch.equal(value, saved[1][i][key]), key


@every_format
def test_torch_trains_on_from_a_checkpoint(kept, dtype):
    ours = fastopt.AdamW(make_params(dtype), **kept)
    train(ours, range(3))
    checkpoint = ours.state_dict()
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach()) for p in parameters(ours)])
    theirs.load_state_dict(checkpoint)
    for param, kept_of in zip(parameters(theirs), checkpoint["state"].values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(theirs.state[param][key], kept_of[key].to(param.dtype))
    train(theirs, range(3, 5))


@narrow
def test_torchs_checkpoint_is_narrowed(states):
    theirs = torch.optim.AdamW(make_params(torch.float32))
    train(theirs, range(3))
    ours = fastopt.AdamW(
        [torch.nn.Parameter(p.detach()) for p in parameters(theirs)], states=states
    )
    ours.load_state_dict(theirs.state_dict())
    for i, kept in ours.state_dict()["state"].items():
        assert kept["exp_avg_sq"].dtype == torch.bfloat16
        exact = theirs.state_dict()["state"][i]["exp_avg_sq"]
        torch.testing.assert_close(kept["exp_avg_sq"].float(), exact, rtol=1 / 15, atol=0)
    train(ours, range(3, 5))


def test_remainder_that_was_cast_is_begun_anew():
    optimizer = fastopt.AdamW(make_params(torch.bfloat16), weights="split")
    train(optimizer, range(2))
    checkpoint = optimizer.state_dict()
    for kept in checkpoint["state"].values():
        kept["remainder"] = kept["remainder"].bfloat16()
    fresh = fastopt.AdamW(make_params(torch.bfloat16), weights="split")
    with pytest.warns(UserWarning, match="remainder of split weights came back as torch.bfloat16"):
        fresh.load_state_dict(checkpoint)
    assert all(kept["remainder"].dtype == torch.int16 for kept in fresh.state.values())
    train(fresh, range(2, 4))


@every_format
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_options(kept, dtype, how):
    optimizer = fastopt.AdamW(make_params(dtype), **kept)
    train(optimizer, range(2))
    other = how(optimizer)
    train(optimizer, range(2, 4))
    train(other, range(2, 4))
    assert_same_bits(optimizer, other)


@every_format
def test_states_moved_away_and_back(kept, dtype):
    """As offloading does: every tensor is replaced by another."""
    optimizer, other = (fastopt.AdamW(make_params(dtype), **kept) for _ in range(2))
    for step in range(3):
        train(optimizer, range(step, step + 1))
        train(other, range(step, step + 1))
        for state in optimizer.state.values():
            for key, value in state.items():
                state[key] = value.to("cpu", copy=True)
    assert_same_bits(optimizer, other)


@every_format
def test_bytes_kept(kept, dtype):
    param = torch.nn.Parameter(torch.zeros(256, 512, dtype=dtype))
    optimizer = fastopt.AdamW([param], **kept)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param]
    kept_bytes = sum(v.numel() * v.element_size() for k, v in state.items() if k != "step")
    moments = {"bfloat16": 4, "8bit": 2 + 2 / 128, None: 8}[kept.get("states")]
    split = 2 if kept.get("weights") == "split" else 0
    assert kept_bytes == param.numel() * (moments + split)


# What cannot be.


def test_wrong_options():
    params = make_params(torch.float32)
    with pytest.raises(ValueError, match="unknown states 'int8'; choose one of 'float32'"):
        fastopt.AdamW(params, states="int8")
    with pytest.raises(ValueError, match="unknown weights 'kahan'; choose one of 'split'"):
        fastopt.AdamW(params, weights="kahan")


BAD: list[tuple[dict[str, Any], torch.dtype, str]] = [
    ({"states": "8bit", "backend": "torch"}, torch.float32, "leave it or backend='torch' out"),
    ({"states": "8bit", "differentiable": True}, torch.float32, "leave one of them out"),
    ({"states": "8bit"}, torch.complex64, "an optimizer without states="),
    ({"weights": "split"}, torch.float16, r"\.bfloat16\(\) or \.float\(\)"),
    ({"weights": "stochastic"}, torch.float16, r"\.bfloat16\(\) or \.float\(\)"),
]


@pytest.mark.parametrize(("kwargs", "dtype", "fix"), BAD)
def test_what_does_not_go_together_says_what_to_do(kwargs, dtype, fix):
    with pytest.raises(ValueError, match=fix):
        fastopt.AdamW([torch.nn.Parameter(torch.ones(3, 3, dtype=dtype))], **kwargs)


def test_a_group_that_does_not_go_is_not_added():
    optimizer = fastopt.AdamW(make_params(torch.float32), weights="split")
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3).half())]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_an_error():
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9, states="8bit")
    param.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="leave the option out"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(4, 3))
    assert not optimizer.state


def test_a_state_of_another_model_is_an_error():
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = fastopt.AdamW([param], states="8bit")
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(3, dtype=torch.uint8)
    before = param.detach().clone()
    with pytest.raises(ValueError, match="not the 16 bytes of 8-bit numbers"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_float64_and_float32_parameters_are_without_effect_of_weights():
    for dtype in (torch.float32, torch.float64):
        plain, split = (
            fastopt.AdamW(make_params(dtype), **kept) for kept in ({}, {"weights": "split"})
        )
        train(plain, range(3))
        train(split, range(3))
        assert_same_bits(plain, split)
