"""What every backend owes the CPU backend, tested alike for each that can be given CPU tensors.

A test module imports these tests and says in a fixture `backend` whom they are to test.
"""

import copy
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import fastopt
from cases import BFLOAT16, CASES, CHUNK, FLOAT16, FLOAT32, FLOAT64
from helpers import (
    assert_equal,
    assert_same_bits,
    every_rule,
    make,
    parameters,
    snapshot,
    train,
)

every_dtype = pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16], ids=str)


def twins(backend: str, name: str, params: list[Any], **kwargs: Any) -> list[Optimizer]:
    """The same optimizer twice over equal parameters or groups of them: of this backend and of the
    CPU's."""
    return [
        make(fastopt, name, [_copied(item) for item in params], backend=which, **kwargs)
        for which in (backend, "cpu")
    ]


def _copied(item: Any) -> Any:
    """A parameter of these values, with the strides they have; or a group of such."""
    if isinstance(item, dict):
        return {**item, "params": [_copied(value) for value in item["params"]]}
    return torch.nn.Parameter(copy.deepcopy(item))


def set_gradients(*optimizers: Optimizer) -> None:
    """Equal new gradients, in new memory."""
    for params in zip(*map(parameters, optimizers), strict=True):
        grad = torch.randn_like(params[0])
        for param in params:
            param.grad = grad.clone()


def assert_steps_alike(*optimizers: Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        set_gradients(*optimizers)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(*optimizers)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_cpu_backend(case, backend):
    tested, cpu = (
        case.make_optimizer(case.parameters(), fastopt, backend=which) for which in (backend, "cpu")
    )
    # Triton's interpreter takes 10 ms for each of many slots.
    steps = range(1 if case.layout == "many" else 2)
    train(case, tested, steps)
    train(case, cpu, steps)
    assert_same_bits(tested, cpu)


class Subclass(torch.Tensor):
    """A tensor with memory of its own."""


def test_option_of_a_tensor_subclass(backend):
    params = [torch.randn(7)]
    lr = torch.tensor(0.01).as_subclass(Subclass)
    assert_steps_alike(*twins(backend, "AdamW", params, lr=lr, fused=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensor_options_of_every_dtype(backend, dtype):
    lr, *betas = torch.tensor([0.03125, 0.75, 0.9375], dtype=dtype)  # exact in all of them
    params = [torch.nn.Parameter(torch.ones(9)) for _ in range(2)]
    assert_steps_alike(
        fastopt.Adam([params[0]], lr=lr, betas=tuple(betas), backend=backend),
        fastopt.Adam([params[1]], lr=0.03125, betas=(0.75, 0.9375), backend="cpu"),
    )


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, torch.inf, torch.nan])
@every_dtype
@pytest.mark.parametrize("name", ["AdamW", "SGD", "ASGD"])  # of one count, none and three
def test_found_inf_and_grad_scale_as_tensors(backend, name, dtypes, found_inf):
    values = [torch.randn(size).to(dtypes.param) for size in (3, CHUNK + 9)]
    optimizers = twins(backend, name, values)
    assert_steps_alike(*optimizers, steps=1)
    set_gradients(*optimizers)
    before = snapshot(optimizers[0])
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(found_inf)
        optimizer.step()
    assert_same_bits(*optimizers)
    assert_equal(*([param.grad for param in parameters(optimizer)] for optimizer in optimizers))
    if found_inf != 0:
        assert_equal(snapshot(optimizers[0]), before)


@every_dtype
def test_step_counted_in_float64(backend, dtypes):
    optimizers = twins(backend, "AdamW", [torch.randn(5).to(dtypes.param)])
    assert_steps_alike(*optimizers, steps=1)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"] = torch.tensor(2.0**24, dtype=torch.float64)
    assert_steps_alike(*optimizers)
    assert all(state["step"] == 2**24 + 2 for state in optimizers[0].state.values())


@pytest.mark.parametrize("count", [3.5, 1e-3, 2.0**40, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "ASGD"])
def test_any_count(backend, name, count):
    optimizers = twins(backend, name, [torch.randn(5)])
    assert_steps_alike(*optimizers, steps=1)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"].fill_(count)
    assert_steps_alike(*optimizers)


@every_rule
def test_parameters_that_share_memory_are_stepped_in_turn(backend, name):
    values = torch.randn(CHUNK + 9)
    optimizers = []
    for which in (backend, "cpu"):
        weight = values.clone()
        views = [weight, weight[5:], torch.ones(3), weight[::2]]
        params = [torch.nn.Parameter(view) for view in views]
        optimizers.append(make(fastopt, name, params, backend=which))
    assert_steps_alike(*optimizers)


@every_rule
def test_run_continued_on_another_backend_continues_bit_identically(backend, name):
    values = [torch.randn(size) for size in (3, CHUNK + 9)]
    moved, stayed = twins(backend, name, values)
    assert_steps_alike(moved, stayed)
    continued = make(fastopt, name, parameters(moved), backend="cpu")
    continued.load_state_dict(moved.state_dict())
    assert_steps_alike(continued, stayed)
    back = make(fastopt, name, parameters(continued), backend=backend)
    back.load_state_dict(continued.state_dict())
    assert_steps_alike(back, stayed)
