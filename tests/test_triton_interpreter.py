"""Triton's kernels, interpreted on CPU tensors: the same bits as the CPU backend.

Whether triton interprets is settled when it is imported, for the whole process: these tests exist
only where TRITON_INTERPRET=1 is set, as in the process that test_triton.py runs them in.

What this cannot show: what compilers make of the kernels (test_triton.py reads NVIDIA's), races,
copies to a device, streams and graphs (test_gpu.py).
"""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from cases import (
    BFLOAT16,
    CASES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    MIXED,
    OPTIONS,
    count_names,
    state_names,
)
from helpers import assert_same_bits, native_only, parameters
from same_bits import (  # noqa: F401 - the tests among them
    assert_steps_alike,
    set_gradients,
    test_any_count,
    test_formats_have_the_cpus_bits,
    test_formats_have_the_cpus_bits_in_any_layout,
    test_formats_of_any_gradient,
    test_formats_with_found_inf_and_grad_scale,
    test_found_inf_and_grad_scale_as_tensors,
    test_momentum_goes_on_where_steps_are_counted_only_from_now_on,
    test_option_of_a_tensor_subclass,
    test_parameters_that_share_memory_are_stepped_in_turn,
    test_random_bits_are_those_of_the_whole_parameters_elements,
    test_run_continued_on_another_backend_continues_bit_identically,
    test_split_parameter_overwritten_since,
    test_step_counted_in_float64,
    test_tensor_options_of_every_dtype,
    train_alike,
    twins,
)
from test_properties import STEPS, build, plans

__test__ = os.environ.get("TRITON_INTERPRET") == "1"

# numpy, which the interpreter computes with, warns of overflow and NaN unless told not to.
pytestmark = [native_only, pytest.mark.filterwarnings("error::RuntimeWarning")]


@pytest.fixture
def backend():
    return "triton"


# How one of many slots is found depends neither on the rule nor on a dtype.
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.layout != "many" or case.dtypes == FLOAT32], ids=str
)
def test_same_bits_as_the_cpu_backend(case, backend):
    train_alike(case, backend)


# Any tensors.


@settings(max_examples=25)
@given(plans())
def test_same_bits_in_any_training(plan):
    name, plan = plan
    (interpreted, params), (native, others) = (
        build(fastopt, name, plan, backend=backend) for backend in ("triton", "cpu")
    )
    for step in range(STEPS):
        for (param, spec), (other, _) in zip(params, others, strict=True):
            spec.set_gradient(param, step)
            other.grad = param.grad
        interpreted.step()
        native.step()
    assert_same_bits(interpreted, native)


@st.composite
def values(draw):
    """An optimizer's name, dtypes, rows of a parameter, its gradient and three states, the steps
    taken so far, and options."""
    number = st.floats(width=32)  # NaN, infinities and subnormals among them
    return (
        draw(st.sampled_from(sorted(OPTIONS))),
        draw(st.sampled_from([FLOAT32, FLOAT64, BFLOAT16, FLOAT16, *MIXED])),
        draw(st.lists(st.tuples(*[number] * 5), min_size=1, max_size=40)),
        draw(st.integers(0, 2**24)),
        {
            "lr": draw(st.sampled_from([0.0, 0.1])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1, 1e30])),
        },
    )


@given(values())
def test_same_bits_from_any_values(drawn):
    name, dtypes, rows, steps_taken, options = drawn
    param, grad, *states = torch.tensor(rows, dtype=torch.float64).T
    if name == "Rprop":
        del options["weight_decay"]
    optimizers = twins("triton", name, [param.to(dtypes.param)], **options)
    for optimizer in optimizers:
        (param,) = parameters(optimizer)
        param.grad_dtype = dtypes.grad
        param.grad = grad.to(dtypes.grad)
        keys = state_names(optimizer)
        state = {key: states[i].to(dtypes.state, copy=True) for i, key in enumerate(keys)}
        for key in count_names(optimizer):
            state[key] = torch.tensor(float(steps_taken) if key == "step" else 0.25)
        optimizer.state[param] = state
        optimizer.step()
    assert_same_bits(*optimizers)


def test_groups_have_their_own_options():
    groups = [
        {"params": [torch.randn(7)], "lr": 0.1 / (2 + i), "maximize": bool(i % 2)}
        for i in range(200)
    ]
    assert_steps_alike(*twins("triton", "AdamW", groups), steps=1)


def test_tiles_as_small_as_a_devices_have_the_same_bits(monkeypatch):
    from fastopt.triton import apply

    constants = apply.constants
    monkeypatch.setattr(apply, "constants", lambda *table: constants(*table[:-1], "cuda"))
    shapes = [(1030,), (40, 3), (11, 16), (11, 8), (5, 300), (3, 1200), (9, 18)]
    for states in (None, "bfloat16", "8bit"):
        values = [torch.randn(shape) for shape in shapes]
        assert_steps_alike(*twins("triton", "AdamW", values, states=states))


# What is sent.


def test_only_what_changed_is_sent_again(monkeypatch):
    from fastopt.triton import apply

    sent = []
    stage = apply.stage

    def spy(data, device):
        sent.append(len(data))
        return stage(data, device)

    monkeypatch.setattr(apply, "stage", spy)
    optimizer, _ = twins("triton", "AdamW", [torch.randn(5) for _ in range(3)])
    slots, grads, numbers = 3 * 88, 3 * 8, (2 + 8) * 24

    def sent_in_a_step():
        sent.clear()
        optimizer.step()
        return sent.copy()

    set_gradients(optimizer)
    assert sent_in_a_step() == [slots, grads, numbers, 0]
    assert sent_in_a_step() == [slots]  # their states are no longer fresh
    assert sent_in_a_step() == []
    kept = [param.grad for param in parameters(optimizer)]  # or new ones may take their places
    set_gradients(optimizer)
    assert sent_in_a_step() == [grads]
    optimizer.param_groups[0]["lr"] /= 2
    assert sent_in_a_step() == [numbers]
    assert len(kept) == 3


# The replacement for what older Tritons take for an fma.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fma_rounds_once(dtype):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from fastopt.triton.interpreter import fma

    numbers = torch.randn(3, 500, dtype=getattr(torch, dtype)).numpy()
    result = fma(None, *(TensorHandle(row, getattr(tl, dtype)) for row in numbers)).data
    assert result.dtype == dtype
    for *factors_and_term, rounded in zip(*numbers, result, strict=True):
        a, b, c = (Fraction(float(x)) for x in factors_and_term)
        error = abs(a * b + c - Fraction(float(rounded)))
        for neighbour in (np.nextafter(rounded, side) for side in (rounded - 1, rounded + 1)):
            assert error <= abs(a * b + c - Fraction(float(neighbour)))
