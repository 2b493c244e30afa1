"""Triton's kernels, interpreted on CPU tensors: the same bits as the CPU backend.

Whether triton interprets is settled when it is imported, for the whole process: these tests exist
only where TRITON_INTERPRET=1 is set, as in the process that test_triton.py runs them in.

What this cannot show: what compilers make of the kernels (test_triton.py reads NVIDIA's), races,
copies to a device, streams and graphs (test_gpu.py).
"""

import copy
import math
import os
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from cases import (
    BFLOAT16,
    CASES_OF_TORCH,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    MIXED,
    OPTIONS,
    count_names,
    every_second,
    state_names,
    transposed,
    unaligned,
)
from helpers import assert_equal, assert_same_bits, native_only, parameters, snapshot
from same_bits import *  # noqa: F403 - its tests
from same_bits import assert_clipped_alike, assert_steps_alike, set_gradients, train_alike, twins
from test_properties import STEPS, build, plans

__test__ = os.environ.get("TRITON_INTERPRET") == "1"

# numpy, which the interpreter computes with, warns of overflow and NaN unless told not to.
pytestmark = [native_only, pytest.mark.filterwarnings("error::RuntimeWarning")]


@pytest.fixture
def backend():
    return "triton"


# How one of many slots is found depends neither on the rule nor on a dtype. Formats are found in
# same_bits.py, of every rule and in any layout: the table's sizes take a second in each.
@pytest.mark.parametrize(
    "case",
    [case for case in CASES_OF_TORCH if case.layout != "many" or case.dtypes == FLOAT32],
    ids=str,
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


@pytest.fixture
def _as_on_a_device(monkeypatch):
    """As many elements at a time as compiled kernels take."""
    from fastopt.triton import apply

    constants, rows = apply.constants, apply.rows
    monkeypatch.setattr(apply, "constants", lambda *table: constants(*table[:-1], "cuda"))
    monkeypatch.setattr(apply, "rows", lambda format, _, size: rows(format, "cuda", size))


@pytest.mark.usefixtures("_as_on_a_device")
def test_tiles_as_small_as_a_devices_have_the_same_bits():
    shapes = [(1030,), (40, 3), (11, 16), (11, 8), (5, 300), (3, 1200), (9, 18)]
    for states in (None, "bfloat16", "8bit"):
        values = [torch.randn(shape) for shape in shapes]
        assert_steps_alike(*twins("triton", "AdamW", values, states=states))


# Norms, and what steps do about them: on a device the kernels alone know. Of CPU tensors the core
# asks the norm itself, and clip_grad_norm_ is the CPU backend's.


@pytest.mark.usefixtures("_as_on_a_device")
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
def test_as_many_rows_as_a_device_loads_have_the_same_bits(dtypes):
    values = [torch.randn(size).to(dtypes.param) for size in (1, 33, 255, 256, 257, 513, 4100)]
    optimizers = twins("triton", "SGD", values, max_grad_norm=1e-3)
    set_gradients(*optimizers)
    for optimizer in optimizers:
        optimizer.step()
    assert_clipped_alike(*optimizers)
    for optimizer in optimizers:
        for param in parameters(optimizer):
            param.grad[:32], param.grad[32:] = 1.0, 2.0**-27  # in any other order it adds up
        optimizer.step()
    assert_clipped_alike(*optimizers)


def number(value=0.0):
    """A struct Number that is at hand, or in a tensor, which must live as long."""
    if not isinstance(value, torch.Tensor):
        return struct.pack("<dqq", value, 0, 0)
    formats = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
    return struct.pack("<dqq", 0, value.data_ptr(), formats.index(value.dtype))


@pytest.mark.parametrize("counts", [[0], [0, 1], [31], [32, 1], [100, 1500, 0, 3]])
@pytest.mark.parametrize("scale", [1.0, 3.0, *torch.tensor([3.0]).bfloat16(), torch.tensor(3.0)])
def test_total_adds_all_chunks_in_order(counts, scale, request):
    numbers = torch.rand(sum(counts), dtype=torch.float64).exp()
    numbers[32:] *= 2.0**-54  # in any other order than theirs they add up
    sums = list(numbers.split(counts))
    lanes = [0.0] * 32
    for i, x in enumerate(torch.cat(sums).tolist()):
        lanes[i % 32] += x
    while len(lanes) > 1:
        lanes = [a + b for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    expected = torch.tensor(math.sqrt(lanes[0]) / float(scale), dtype=torch.float64)
    assert_equal(fastopt.triton.total(sums, number(scale)), expected)
    request.getfixturevalue("_as_on_a_device")
    assert_equal(fastopt.triton.total(sums, number(scale)), expected)


def norm_tables(grads, monkeypatch):
    """What is launched for the norm of these gradients."""
    tables = []

    def spy(_, kernels, *fields):
        if kernels == "norm":
            tables.append(fastopt.triton.Table(*fields))
        return torch.zeros(1, dtype=torch.float64)

    params = [torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    with monkeypatch.context() as patched:
        patched.setattr(fastopt.triton, "launch", spy)
        fastopt.SGD(params, max_grad_norm=1.0, backend="triton").step()
    return tables


def scaling(norm, limit, skip, counter=None, found_inf=0.0):
    """What Table.numbers begin with."""
    skipped = number(counter) if counter is not None else number()
    return b"".join([*map(number, (found_inf, 1.0, norm, limit, skip)), skipped])


NEVER, NONFINITE, UNCLIPPED = 0.0, 1.0, 2.0  # csrc/table.h's Skip


@pytest.mark.parametrize("number_in_it", [None, torch.nan, torch.inf])
@pytest.mark.parametrize("limit", [0.5, 1e6, 0.0, torch.inf])
def test_clip_grad_norm_has_the_cpus_bits(limit, number_in_it, monkeypatch):
    """As csrc/clip.cpp launches it."""
    grads = [
        place(torch.randn(shape).to(dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for shape, place in [((300,), unaligned), ((5, 7), every_second), ((6, 9), transposed)]
    ]
    grads += [torch.randn(()), torch.randn(0), torch.randn(9, dtype=torch.complex64)]
    if number_in_it is not None:
        grads[1][2, 3] = number_in_it
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = copy.deepcopy(grad)
    expected = fastopt.clip_grad_norm_(params, limit)

    tables = norm_tables(grads, monkeypatch)
    cache = {}
    sums = [fastopt.triton.launch(cache, "norm", *table) for table in tables]
    norm = fastopt.triton.total(sums, number(1.0))
    numbers = scaling(norm, limit, UNCLIPPED) + 8 * number()
    for i, table in enumerate(tables):
        table = table._replace(place=("clip", i), numbers=numbers)
        fastopt.triton.launch(cache, "average", *table)
    assert_equal(norm.float(), expected)
    assert_equal(grads, [param.grad for param in params])


@pytest.mark.parametrize(("norm", "limit", "moves"), [(1.0, 1.5, 0), (1.0, 0.5, 1), (2.0, 2.0, 1)])
def test_gradients_within_the_limit_are_not_written(norm, limit, moves, monkeypatch):
    grad, other = torch.zeros(5), torch.ones(5)
    (table,) = norm_tables([grad], monkeypatch)
    table = table._replace(
        grads=struct.pack("<q", other.data_ptr()),
        numbers=scaling(norm, limit, UNCLIPPED) + 8 * number(),
    )
    fastopt.triton.launch({}, "average", *table)
    assert (grad != 0).all() == moves
    assert (grad != 0).any() == moves


@pytest.mark.parametrize(
    ("norm", "skip", "found_inf", "stops", "counts"),
    [
        (torch.nan, NONFINITE, 0.0, True, True),
        (torch.inf, NONFINITE, 0.0, True, True),
        (-torch.inf, NONFINITE, 0.0, True, True),
        (torch.inf, NONFINITE, 1.0, True, False),
        (1e308, NONFINITE, 0.0, False, False),
        (torch.inf, NEVER, 0.0, False, False),
    ],
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_device_skips_a_step_and_counts_it_once(
    name, norm, skip, found_inf, stops, counts, monkeypatch
):
    from fastopt.triton import apply

    # Several programs of advance, and not of a size that the cache has.
    monkeypatch.setattr(apply, "SLOTS", 2)
    monkeypatch.setattr(apply, "constants", apply.constants.__wrapped__)
    values = [torch.randn(3) for _ in range(5)]
    optimizer, _ = twins("triton", name, values, average=0.75)
    set_gradients(optimizer)
    optimizer.step()
    counter = torch.tensor(41)
    launch = fastopt.triton.launch

    def with_norm(cache, kernels, *fields):
        table = fastopt.triton.Table(*fields)
        of_table = counter if table.place == ("update", 0) else None
        start = scaling(norm, torch.inf, skip, of_table, found_inf)
        launch(cache, kernels, *table._replace(numbers=start + table.numbers[len(start) :]))

    before = snapshot(optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(fastopt.triton, "launch", with_norm)
        optimizer.step()
    after = snapshot(optimizer)
    changed = [not torch.equal(value, after[key]) for key, value in before.items()]
    assert changed == [not stops] * len(changed)
    assert counter == 41 + counts


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
    slots, grads, numbers = 3 * 88, 3 * 8, (6 + 8) * 24

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
