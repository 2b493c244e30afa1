"""What every backend owes the CPU backend, tested alike for each that can be given CPU tensors.

A test module imports these tests and says in a fixture `backend` whom they are to test.
"""

from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import fastopt
from cases import (
    BFLOAT16,
    CASES,
    CHUNK,
    COMPLEX64,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    MIXED,
    channels_last,
    contiguous,
    every_second,
    in_formats,
    transposed,
    unaligned,
)
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


# Where the tested backend has its tensors; those of the CPU's are where that is. test_gpu.py says
# otherwise.
DEVICE = "cpu"


def twins(backend: str, name: str, params: list[Any], **kwargs: Any) -> list[Optimizer]:
    """The same optimizer twice over equal parameters or groups of them: of this backend and of the
    CPU's."""
    return [
        make(
            fastopt,
            name,
            [_copied(item, device) for item in params],
            backend=which,
            **{k: v.to(device) if torch.is_tensor(v) else v for k, v in kwargs.items()},
        )
        for which, device in sides(backend)
    ]


def sides(backend: str) -> list[tuple[str, str]]:
    """The tested backend and the CPU's, each with its device."""
    return [(backend, DEVICE), ("cpu", "cpu")]


def _copied(item: Any, device: str) -> Any:
    """A parameter of these values, in all of the memory around them as they are in it; or a group
    of such."""
    if isinstance(item, dict):
        return {**item, "params": [_copied(value, device) for value in item["params"]]}
    memory = item.new_empty(0).set_(item.untyped_storage()).to(device, copy=True)
    return torch.nn.Parameter(memory.as_strided(item.shape, item.stride(), item.storage_offset()))


def number(optimizer: Optimizer, value: Any, **kwargs: Any) -> torch.Tensor:
    """Or several, as a tensor where the optimizer's parameters are."""
    return torch.tensor(value, device=parameters(optimizer)[0].device, **kwargs)


def gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    return [param.grad.cpu() for param in parameters(optimizer)]


def set_gradients(*optimizers: Optimizer) -> None:
    """Equal new gradients, in new memory."""
    for params in zip(*map(parameters, optimizers), strict=True):
        give(torch.randn_like(params[-1]), *params)


def give(grad: torch.Tensor, *params: torch.Tensor) -> None:
    """To each a copy, where it is."""
    for param in params:
        param.grad = grad.to(param.device, copy=True)


def assert_steps_alike(*optimizers: Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        set_gradients(*optimizers)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(*optimizers)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_cpu_backend(case, backend):
    train_alike(case, backend)


def train_alike(case, backend):
    tested, cpu = (
        case.make_optimizer(case.parameters(device=device), fastopt, backend=which)
        for which, device in sides(backend)
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
    lr, *betas = torch.tensor([0.03125, 0.75, 0.9375], dtype=dtype, device=DEVICE)  # exact in all
    tested, plain = (torch.nn.Parameter(torch.ones(9, device=d)) for _, d in sides(backend))
    assert_steps_alike(
        fastopt.Adam([tested], lr=lr, betas=tuple(betas), backend=backend),
        fastopt.Adam([plain], lr=0.03125, betas=(0.75, 0.9375), backend="cpu"),
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
        optimizer.grad_scale = number(optimizer, 3.0)
        optimizer.found_inf = number(optimizer, found_inf)
        optimizer.step()
    assert_same_bits(*optimizers)
    assert_equal(*map(gradients, optimizers))
    if found_inf != 0:
        assert_equal(snapshot(optimizers[0]), before)


@every_dtype
def test_step_counted_in_float64(backend, dtypes):
    optimizers = twins(backend, "AdamW", [torch.randn(5).to(dtypes.param)])
    assert_steps_alike(*optimizers, steps=1)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"] = number(optimizer, 2.0**24, dtype=torch.float64)
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
    for which, device in sides(backend):
        weight = values.to(device, copy=True)
        views = [weight, weight[5:], torch.ones(3, device=device), weight[::2]]
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


# Formats.

FORMATS = in_formats("bfloat16", "8bit", "split", "split bfloat16", "stochastic 8bit")
every_format = pytest.mark.parametrize(("kept", "dtype"), FORMATS, ids=str)


@every_format
@every_rule
def test_formats_have_the_cpus_bits(backend, name, kept, dtype):
    assert_steps_alike(*twins(backend, name, [torch.randn(2, 130).to(dtype)], **kept))


# Shapes, and how a parameter and its gradient lie in memory.
LAID_OUT = [
    *(
        (shape, contiguous, contiguous)
        # The last of them are chunks that begin in the middle of a row, and many tiles.
        for shape in [(7,), (4, 0), (4, 1), (2, 3, 3, 3), (3, 128), (90, 20), (20, 300), (1500, 3)]
    ),
    *((shape, transposed, transposed) for shape in [(6, 5), (130, 3)]),
    ((6, 130), contiguous, transposed),
    ((3, 4, 5, 5), channels_last, channels_last),
    ((4, 16), unaligned, unaligned),
    ((4, 24), every_second, contiguous),
]


@every_format
def test_formats_have_the_cpus_bits_in_any_layout(backend, kept, dtype):
    values = [place(torch.randn(shape).to(dtype)) for shape, place, _ in LAID_OUT]
    optimizers = twins(backend, "AdamW", values, **kept)
    for _ in range(2):
        set_gradients(*optimizers)
        for optimizer in optimizers:
            for param, (_, _, place) in zip(parameters(optimizer), LAID_OUT, strict=True):
                param.grad = place(param.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(*optimizers)


@every_format
@pytest.mark.parametrize("name", ["Adam", "SGD"])  # of one count and none
def test_formats_with_found_inf_and_grad_scale(backend, name, kept, dtype):
    values = [torch.randn(shape).to(dtype) for shape in [(5,), (2, 130)]]
    optimizers = twins(backend, name, values, **kept)
    for found_inf in (0.0, 1.0, 0.0):
        set_gradients(*optimizers)
        for optimizer in optimizers:
            optimizer.grad_scale = number(optimizer, 3.0)
            optimizer.found_inf = number(optimizer, found_inf)
            optimizer.step()
    assert_same_bits(*optimizers)
    assert_equal(*map(gradients, optimizers))


@every_format
def test_formats_of_any_gradient(backend, kept, dtype):
    """Rows of zeros, of the least and greatest numbers, and with one that is no number."""
    rows = [
        [0.0, -0.0],
        [1e-45, -3e-39],
        [3e38, -1e38],
        [1e-30, 1e30],
        [torch.inf, 1.0],
        [torch.nan, 2.0],
    ]
    grads = torch.tensor(rows).repeat(1, 70).to(dtype)
    optimizers = twins(backend, "Adam", [torch.ones(grads.shape, dtype=dtype)], **kept)
    for grad in (grads, grads.flip(1), grads.flip(0)):
        for optimizer in optimizers:
            give(grad, *parameters(optimizer))
            optimizer.step()
        assert_same_bits(*optimizers)


def test_split_parameter_overwritten_since(backend):
    optimizers = twins(backend, "AdamW", [torch.randn(64).bfloat16()], weights="split")
    assert_steps_alike(*optimizers)
    for optimizer in optimizers:
        (param,) = parameters(optimizer)
        values = number(optimizer, [0.0, -0.0, torch.inf, -torch.inf], dtype=torch.bfloat16)
        param.data = values.repeat(16)
    assert_steps_alike(*optimizers)


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_momentum_goes_on_where_steps_are_counted_only_from_now_on(backend, states):
    before = twins(backend, "SGD", [torch.randn(3, 20)])
    assert_steps_alike(*before)
    after = twins(backend, "SGD", [parameters(before[0])[0].detach()], states=states)
    for old, new in zip(before, after, strict=True):
        new.load_state_dict(old.state_dict())
    assert_steps_alike(*after)


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_random_bits_are_those_of_the_whole_parameters_elements(backend, states, monkeypatch):
    places = {(7,): (5, (1,)), (3, 20): (40, (20, 1)), (4, 5, 3): (2**32 - 30, (90, 6, 1))}
    asked = set()

    def place_in_whole(param):
        asked.add(tuple(param.shape))
        return places[tuple(param.shape)]

    monkeypatch.setattr(fastopt.tensors, "place_in_whole", place_in_whole)
    values = [torch.randn(shape) for shape in places]
    optimizers = [
        fastopt.AdamW(
            [
                torch.nn.Parameter(value.to(device, copy=True).as_subclass(Subclass))
                for value in values
            ],
            states=states,
            backend=which,
        )
        for which, device in sides(backend)
    ]
    assert_steps_alike(*optimizers)
    assert asked == set(places)


# Clipping, skipping, averaging.


def assert_clipped_alike(*optimizers: Optimizer) -> None:
    """Parameters, states, gradients, and the norm of the last step in all its bits."""
    assert_same_bits(*optimizers)
    assert_equal(*map(gradients, optimizers))
    assert_equal(*(float(optimizer._passes.norm) for optimizer in optimizers))


# The first clips whatever there is here, the second nothing.
clipping_or_not = pytest.mark.parametrize("limit", [1e-3, 1e6])

# With the first nothing is written but parameters and states; what the last divides, it rounds.
every_scale = pytest.mark.parametrize("scale", [None, 2.0**10, 3.0])


@every_scale
@clipping_or_not
@pytest.mark.parametrize(
    "dtypes", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16, COMPLEX64, *MIXED[:1], *MIXED[-2:]], ids=str
)
def test_clipping_has_the_cpus_bits(backend, dtypes, limit, scale):
    values = [torch.randn(shape).to(dtypes.param) for shape in [(), (0,), (3,), (5, 7), (300,)]]
    optimizers = twins(backend, "AdamW", values, max_grad_norm=limit)
    for _ in range(2):
        for params in zip(*map(parameters, optimizers), strict=True):
            grad = torch.randn(params[0].shape, dtype=dtypes.grad)
            for param in params:
                param.grad_dtype = dtypes.grad
            give(grad, *params)
        before = [grad.clone() for grad in gradients(optimizers[1])]
        for optimizer in optimizers:
            if scale is not None:
                optimizer.grad_scale = number(optimizer, scale)
            optimizer.step()
        assert_clipped_alike(*optimizers)
        after = gradients(optimizers[0])
        assert (scale is None) == all(map(torch.equal, before, after))
        assert (float(optimizers[0]._passes.norm) > limit) == (limit < 1)


@every_rule
def test_every_rule_clips_and_averages_with_the_cpus_bits(backend, name):
    values = [torch.randn(shape) for shape in [(3,), (5, 7)]]
    assert_steps_alike(*twins(backend, name, values, max_grad_norm=1e-3, average=0.75), steps=3)


def expanded(values: torch.Tensor) -> torch.Tensor:
    """Of every row the first number, in one place."""
    return values[..., :1].contiguous().expand(values.shape)


def test_clipping_has_the_cpus_bits_in_any_layout(backend):
    laid_out = [
        *LAID_OUT,
        ((CHUNK + 33,), unaligned, unaligned),
        ((2 * CHUNK,), contiguous, contiguous),
        ((3, 1500), contiguous, every_second),  # of more chunks than one
        ((7, 9, 4), transposed, every_second),
    ]
    values = [place(torch.randn(shape)) for shape, place, _ in laid_out]
    optimizers = twins(backend, "SGD", values, max_grad_norm=1e-3)
    set_gradients(*optimizers)
    for optimizer in optimizers:
        for param, (_, _, place) in zip(parameters(optimizer), laid_out, strict=True):
            param.grad = place(param.grad)
        optimizer.grad_scale = number(optimizer, 2.0)  # the gradients are written, too
        optimizer.step()
    assert_clipped_alike(*optimizers)


def test_clipping_by_gradients_that_share_memory_has_the_cpus_bits(backend):
    shapes = [(3,), (5, 7), (4, 3, 9), (2, 40)]
    optimizers = twins(backend, "SGD", list(map(torch.randn, shapes)), max_grad_norm=1e-3)
    set_gradients(*optimizers)
    for optimizer in optimizers:
        for param in parameters(optimizer)[1:]:
            param.grad = expanded(param.grad)
        optimizer.step()
    assert_clipped_alike(*optimizers)


def test_norm_of_many_tensors_and_dtypes(backend):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64]
    values = [torch.randn(1 + i % 3).to(dtypes[i % 5]) for i in range(60)]
    optimizers = twins(backend, "SGD", values, max_grad_norm=1e-3)
    for _ in range(2):
        set_gradients(*optimizers)
        for optimizer in optimizers:
            optimizer.step()
        assert_clipped_alike(*optimizers)


@pytest.mark.parametrize(("norm", "limit"), [(1e300, 1e299), (1e-300, 1e-301), (3.0, 0.0)])
def test_any_norm_and_limit(backend, norm, limit):
    optimizers = twins(
        backend, "SGD", [torch.zeros(3, dtype=torch.float64)], max_grad_norm=torch.tensor(limit)
    )
    for optimizer in optimizers:
        give(torch.full((3,), norm, dtype=torch.float64), *parameters(optimizer))
        optimizer.total_norm = number(optimizer, norm, dtype=torch.float64)
        optimizer.step()
    assert_clipped_alike(*optimizers)


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_factor_that_float_rounds_to_1_has_gradients_rounded_nonetheless(backend, dtypes):
    limit = (1 + 1e-6) * (1 - 2.0**-30)
    optimizers = twins(backend, "SGD", [torch.randn(40).to(dtypes.param)], max_grad_norm=limit)
    set_gradients(*optimizers)
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.total_norm = number(optimizer, 3.0), 1.0
        optimizer.step()
    assert_clipped_alike(*optimizers)


@clipping_or_not
@every_format
def test_formats_with_clipping_and_averages(backend, kept, dtype, limit):
    values = [torch.randn(shape).to(dtype) for shape in [(5,), (2, 130), (40, 3)]]
    optimizers = twins(backend, "AdamW", values, max_grad_norm=limit, average=0.75, **kept)
    for scale in (1.0, 3.0, 2.0):
        set_gradients(*optimizers)
        for optimizer in optimizers:
            optimizer.grad_scale = number(optimizer, scale)
            optimizer.step()
        assert_clipped_alike(*optimizers)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e200])  # the last's square is infinite
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_step_is_skipped_where_the_norm_is_not_finite(backend, name, number):
    values = [torch.randn(size, dtype=torch.float64) for size in (3, 40)]
    optimizers = twins(
        backend, name, values, max_grad_norm=torch.inf, skip_nonfinite=True, average=0.75
    )
    assert_steps_alike(*optimizers, steps=2)
    before = snapshot(optimizers[0])
    set_gradients(*optimizers)
    for optimizer in optimizers:
        parameters(optimizer)[1].grad[7] = number
        optimizer.step()
    assert_clipped_alike(*optimizers)
    assert_equal(snapshot(optimizers[0]), before)
    assert [optimizer.skipped_steps for optimizer in optimizers] == [1, 1]
    assert_steps_alike(*optimizers, steps=1)
    assert [optimizer.skipped_steps for optimizer in optimizers] == [1, 1]


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("limit", [0.1, torch.inf])
def test_norm_that_is_not_finite_and_not_skipped(backend, limit, number):
    optimizers = twins(backend, "SGD", [torch.randn(5), torch.randn(3)], max_grad_norm=limit)
    set_gradients(*optimizers)
    for optimizer in optimizers:
        parameters(optimizer)[1].grad[1] = number
        optimizer.step()
    assert_clipped_alike(*optimizers)


@pytest.mark.parametrize(
    "dtypes", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16, COMPLEX64, MIXED[0]], ids=str
)
def test_averages_have_the_cpus_bits(backend, dtypes):
    shapes = [
        ((), contiguous),
        ((0,), contiguous),
        ((CHUNK + 5,), contiguous),
        ((5, 7), transposed),
    ]
    values = [
        place(torch.randn(shape).to(dtypes.param))
        for shape, place in [*shapes, ((4, 9), every_second), ((33,), unaligned)]
    ]
    assert_steps_alike(*twins(backend, "AdamW", values, average=0.9), steps=3)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_averages_stay_where_found_inf_stops_the_step(backend, name):
    optimizers = twins(backend, name, [torch.randn(7).bfloat16(), torch.randn(9)], average=0.75)
    for found_inf in (0.0, 1.0, 0.0):
        set_gradients(*optimizers)
        before = snapshot(optimizers[0])
        for optimizer in optimizers:
            optimizer.grad_scale = number(optimizer, 2.0)
            optimizer.found_inf = number(optimizer, found_inf)
            optimizer.step()
        assert_same_bits(*optimizers)
        if found_inf:
            assert_equal(snapshot(optimizers[0]), before)


__all__ = [name for name in globals() if name.startswith("test_")]  # for import *
