"""Parameters, gradients and states that share memory are stepped one after the other, in order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

import fastopt
from cases import CHUNK, PARALLEL
from helpers import (
    FALLBACK,
    assert_agrees_with_torch,
    assert_equal,
    assert_same_tensors,
    every_optimizer,
    make,
    native_only,
    parameters,
    snapshot,
)

pytestmark = native_only

LARGE = PARALLEL + CHUNK + 5  # two threads take its chunks


def tied():
    weight = Parameter(torch.randn(LARGE, dtype=torch.float64))
    return [weight, Parameter(weight.data)]


def flat_and_its_parts():
    flat = torch.randn(3 * LARGE, dtype=torch.float64)
    return [
        Parameter(part) for part in (flat[:LARGE], flat, flat[LARGE - 7 : 2 * LARGE], flat[-3:])
    ]


def numpy_views():
    """Two storages over one memory."""
    array = torch.randn(LARGE, dtype=torch.float64).numpy()
    return [Parameter(torch.from_numpy(array)), Parameter(torch.from_numpy(array[5:]))]


def complex_and_its_reals():
    values = torch.randn(LARGE, dtype=torch.complex128)
    return [Parameter(values), Parameter(torch.view_as_real(values)[3:])]


def transposed_twin():
    values = torch.randn(211, 199, dtype=torch.float64)
    return [Parameter(values), Parameter(values.t())]


def rows_and_columns():
    """The columns lie in between each other without sharing an element."""
    values = torch.randn(LARGE, 3, dtype=torch.float64)
    return [Parameter(values[:, i]) for i in range(3)] + [Parameter(values[5:9])]


def apart():
    return [Parameter(torch.randn(LARGE, dtype=torch.float64)) for _ in range(3)]


SHARED = [
    tied,
    flat_and_its_parts,
    numpy_views,
    complex_and_its_reals,
    transposed_twin,
    rows_and_columns,
    apart,
]


def trained(optimizer, steps=3):
    params = parameters(optimizer)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()
    return optimizer


@every_optimizer
@pytest.mark.parametrize("params", SHARED)
def test_shared_memory_is_stepped_in_torchs_order(name, params):
    def made(module, **options):
        torch.manual_seed(0)
        return trained(make(module, name, params(), lr=0.01, **options))

    assert_agrees_with_torch(made(fastopt), made(torch.optim, foreach=False))


@every_optimizer
@pytest.mark.parametrize("params", SHARED)
def test_shared_memory_leaves_the_bits_of_one_thread(name, params):
    def made(threads):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            return snapshot(trained(make(fastopt, name, params(), lr=0.01)))
        finally:
            torch.set_num_threads(2)

    assert_equal(made(2), made(1))


@every_optimizer
def test_order_holds_across_tables(name):
    """The one between them has states of another dtype, which is another table."""

    def made(module, **options):
        torch.manual_seed(0)
        weight = torch.randn(LARGE)
        params = [Parameter(weight), Parameter(weight[:-9]), Parameter(weight)]
        optimizer = trained(make(module, name, params, lr=0.1, **options), steps=1)
        for key, value in optimizer.state[params[1]].items():
            if key != "step":
                optimizer.state[params[1]][key] = value.bfloat16().float()
                if module is fastopt:
                    optimizer.state[params[1]][key] = value.bfloat16()
        return trained(optimizer, steps=1)

    ours, stock = made(fastopt), made(torch.optim, foreach=False)
    torch.testing.assert_close(parameters(ours), parameters(stock), rtol=1e-5, atol=1e-6)


@every_optimizer
def test_shared_states_are_stepped_in_turn(name):
    def made(module, **options):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(LARGE, dtype=torch.float64)) for _ in range(2)]
        optimizer = trained(make(module, name, params, **options), steps=1)
        first, second = (optimizer.state[param] for param in params)
        for key in first:  # the step count, too: it counts twice
            second[key] = first[key]
        return trained(optimizer)

    ours, stock = made(fastopt), made(torch.optim, foreach=False)
    assert_same_tensors(ours, stock, rtol=1e-12, atol=1e-14)  # RMSprop divides by small numbers


@every_optimizer
def test_shared_gradient_is_unscaled_in_turn(name):
    """Twice, as torch's fused step does, and by no two threads at once."""
    params = [Parameter(torch.ones(LARGE)) for _ in range(2)]
    shared = torch.full((LARGE,), 8.0)
    for param in params:
        param.grad = shared
    optimizer = make(fastopt, name, params, lr=0.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert_equal(shared, torch.full((LARGE,), 2.0))


@pytest.mark.parametrize(("params", "tables"), [(tied, 2), (rows_and_columns, 4), (apart, 1)])
def test_each_turn_is_a_launch_of_its_own_on_a_device(params, tables, monkeypatch):
    """Within one launch a device steps all its slots at once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launched = []
    monkeypatch.setattr(
        fastopt.triton, "launch", lambda *args: launched.append(fastopt.triton.Table(*args[2:]))
    )
    optimizer = make(fastopt, "AdamW", params(), backend="triton")
    trained(optimizer, steps=1)
    assert len(launched) == tables
    slots = sum(len(table.grads) // 8 for table in launched)
    assert slots == len(parameters(optimizer))


@every_optimizer
def test_gradient_that_is_another_parameter_is_read_in_turn(name):
    def made(module, **options):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(LARGE, dtype=torch.float64)) for _ in range(2)]
        optimizer = make(module, name, params, **options)
        for _ in range(2):
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = params[0].data
            optimizer.step()
        return optimizer

    assert_agrees_with_torch(made(fastopt), made(torch.optim, foreach=False))


@every_optimizer
@pytest.mark.parametrize("offset", [0, 3])
def test_parameter_that_shares_memory_with_its_own_gradient_is_torchs_to_step(name, offset):
    def made(module, **options):
        torch.manual_seed(0)
        memory = torch.randn(20, dtype=torch.float64)
        param = Parameter(memory[: 20 - offset])
        param.grad = memory[offset:]
        optimizer = make(module, name, [param], **options)
        try:
            for _ in range(2):
                optimizer.step()
        except RuntimeError as error:  # one of torch's operations refuses
            return str(error)
        return optimizer

    with pytest.warns(UserWarning, match=f"{FALLBACK}: the parameter and grad share memory"):
        ours = made(fastopt)
    stock = made(torch.optim, foreach=False)
    if isinstance(stock, str):
        assert ours == stock
    else:
        assert_same_tensors(ours, stock, rtol=0, atol=0)


@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(1, 300), st.integers(1, 3)),
        min_size=2,
        max_size=12,
    ),
    st.booleans(),
)
def test_any_views_of_one_memory_agree_with_torchs_loop(views, many):
    """(offset, length, stride) each; `many` adds parameters that make threads share the step."""

    def made(module, name, **options):
        torch.manual_seed(0)
        memory = torch.randn(2000, dtype=torch.float64)
        params = [
            Parameter(memory.as_strided((length,), (stride,), offset))
            for offset, length, stride in views
        ]
        if many:
            params.insert(1, Parameter(torch.randn(LARGE, dtype=torch.float64)))
        return trained(make(module, name, params, lr=0.01, **options), steps=2)

    for name in ("AdamW", "SGD"):
        assert_agrees_with_torch(made(fastopt, name), made(torch.optim, name, foreach=False))
