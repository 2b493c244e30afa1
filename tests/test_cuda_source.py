"""The source of the CUDA kernels, run on the CPU: the same bits as the CPU backend.

FASTOPT_CUDA_ON_HOST builds the core with csrc/cuda's kernels compiled as C++ (tests/cuda_on_host),
and backend="cuda" then steps CPU tensors: block by block, thread by thread, every vector checked
for alignment and, under `make sanitize`, every access for its bounds. At a shuffle a thread waits
for its warp, all of which must get there (test_cuda_on_host.py). CPU tensors count as the device's
there: the kernel itself reads a tensor lr, found_inf or grad_scale.

What this cannot show, being one thread after another, of another compiler:
- races between threads, also of one warp, between streams, or between one step and the next;
- what the device's compiler makes of the source, such as contraction (test_machine_code.py);
- occupancy, memory traffic, speed;
- pointers to the wrong memory, launches on the wrong stream or device, graphs, synchronisation.
The rest of it, test_gpu.py shows on a GPU.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cases import (
    BFLOAT16,
    CHUNK,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    contiguous,
    count_names,
    transposed,
    unaligned,
)
from fastopt import optimizer as engine
from helpers import (
    assert_same_bits,
    every_rule,
    native_only,
    parameters,
    tensors_of,
)
from same_bits import *  # noqa: F403 - its tests
from same_bits import FORMATS, assert_steps_alike, set_gradients, twins

pytestmark = [native_only, pytest.mark.network]

# As in csrc/cuda/apply.cu: threads of a block, and what one launch of advance takes.
ADVANCE_THREADS, UPDATE_THREADS = 32, 256
SLOTS, GROUPS, LAYOUT_NUMBERS = 288, 16, 513
FEW_SLOTS, FEW_GROUPS = 32, 4


class Launch(ctypes.Structure):
    blocks: int
    threads: int
    vectors_streamed: int
    argument_bytes: int
    overlaps: int  # the kernel before
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("blocks", "threads", "vectors_streamed", "argument_bytes", "overlaps")
    ]


class Launches(NamedTuple):
    """Of one step: how often advance was launched, and the launch of update."""

    advance: int
    update: Launch


@dataclass
class Device:
    core: ctypes.CDLL

    def launches(self) -> list[Launch]:
        """Since last asked."""
        launches = (Launch * 10_000)()
        count = self.core.past_launches(launches, ctypes.c_int64(len(launches)))
        return launches[:count]

    def step(self, optimizer: torch.optim.Optimizer) -> Launches:
        self.launches()
        optimizer.step()
        *advance, update = self.launches()
        assert {launch.threads for launch in advance} == {ADVANCE_THREADS}
        assert update.threads == UPDATE_THREADS
        return Launches(len(advance), update)


@pytest.fixture(autouse=True)
def device(core_on_host, monkeypatch):
    monkeypatch.setattr(engine, "_C", core_on_host)
    monkeypatch.setitem(engine._WHY_NOT, "cuda", lambda: None)
    return Device(ctypes.CDLL(core_on_host.__file__))


@pytest.fixture
def backend():
    return "cuda"


# Where elements lie.


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
@every_rule
def test_every_size_around_vectors_and_chunks(name, dtypes):
    sizes = [*range(1, 18), *(k * CHUNK + d for k in (1, 2) for d in (-9, -8, -1, 0, 1, 8, 9))]
    values = [torch.randn(size).to(dtypes.param) for size in sizes]
    assert_steps_alike(*twins("cuda", name, values))


@every_rule
def test_blocks_take_several_turns(device, name):
    cuda, cpu = twins(
        "cuda", name, [torch.randn(3), torch.randn(25 * CHUNK + 1), torch.randn(34 * CHUNK)]
    )
    assert_steps_alike(cuda, cpu)
    set_gradients(cuda)
    assert device.step(cuda).update.blocks <= 61 / 3


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16], ids=str)
def test_aligned_tensors_move_in_vectors_of_16_bytes(device, dtypes):
    cuda, _ = twins("cuda", "AdamW", [torch.randn(2 * CHUNK).to(dtypes.param)])
    set_gradients(cuda)
    tensors = 5  # parameter, gradient and three states
    read = tensors * 2 * CHUNK * dtypes.param.itemsize
    assert device.step(cuda).update.vectors_streamed * 16 == read


@pytest.mark.parametrize("at", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
def test_one_unaligned_tensor_is_enough_to_go_without_vectors(device, dtypes, at):
    value = torch.randn(CHUNK + 5).to(dtypes.param)
    optimizers = twins("cuda", "AdamW", [unaligned(value) if at == "param" else value])
    assert_steps_alike(*optimizers, steps=1)
    for optimizer in optimizers:
        (state,) = optimizer.state.values()
        if at in state:
            state[at] = unaligned(state[at])
    set_gradients(*optimizers)
    for optimizer in optimizers:
        (param,) = parameters(optimizer)
        if at == "grad":
            param.grad = unaligned(param.grad)
    cuda, cpu = optimizers
    assert device.step(cuda).update.vectors_streamed == 0
    cpu.step()
    assert_same_bits(cuda, cpu)


@every_rule
def test_a_layout_of_many_dimensions(name):
    value = torch.randn((2,) * 13).permute(*range(12, -1, -2), *range(1, 13, 2))
    cuda, cpu = twins("cuda", name, [value])
    for optimizer in (cuda, cpu):
        (param,) = parameters(optimizer)
        param.grad = torch.arange(2.0**13).view(param.shape)  # no two dimensions merge
        optimizer.step()
    assert_same_bits(cuda, cpu)


# Averages: in the kernel of their parameters where they can be.

FEWER_STATES = {  # than three, with which an average cannot
    "Adam": {"amsgrad": False},
    "AdamW": {"amsgrad": False},
    "RMSprop": {"centered": False},
}
NATIVE = [({}, dtypes.param) for dtypes in (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)]


@pytest.mark.parametrize(("kept", "dtype"), [*NATIVE, *FORMATS], ids=str)
@every_rule
def test_averages_go_along_with_the_update(device, name, kept, dtype):
    values = [torch.randn(shape).to(dtype) for shape in [(CHUNK + 13,), (5, 256), (40, 3)]]
    options = FEWER_STATES.get(name, {})
    # The slot of a split parameter has no room left for one where there are several counts.
    own_pass = 2 if name in ("ASGD", "NAdam") and kept.get("weights") == "split" else 0
    cuda, cpu = twins("cuda", name, values, average=0.75, **options, **kept)
    without, _ = twins("cuda", name, values, **options, **kept)
    assert_steps_alike(cuda, cpu, steps=1)  # which makes the averages
    assert_steps_alike(without, without, steps=1)
    for _ in range(2):
        set_gradients(cuda, cpu, without)
        device.launches()
        cuda.step()
        launches = device.launches()
        without.step()
        cpu.step()
        assert len(launches) == len(device.launches()) + own_pass
        assert_same_bits(cuda, cpu)


@pytest.mark.parametrize("dtypes", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
def test_averages_move_in_vectors(device, dtypes):
    cuda, _ = twins("cuda", "SGD", [torch.randn(CHUNK).to(dtypes.param)], average=0.75)
    for _ in range(2):
        set_gradients(cuda)
        device.launches()
        cuda.step()
    (state,) = cuda.state.values()
    tensors = 3 * dtypes.param.itemsize + state["average"].itemsize  # a momentum, too
    assert device.launches()[-1].vectors_streamed * 16 == tensors * CHUNK


@pytest.mark.parametrize("shape", [(CHUNK + 5,), (4, 256)], ids=str)
@pytest.mark.parametrize(("kept", "dtype"), [*NATIVE, *FORMATS], ids=str)
def test_unaligned_averages(device, kept, dtype, shape):
    options = FEWER_STATES["AdamW"] | kept
    cuda, cpu = twins("cuda", "AdamW", [torch.randn(shape).to(dtype)], average=0.75, **options)
    assert_steps_alike(cuda, cpu, steps=1)
    for optimizer in (cuda, cpu):
        (state,) = optimizer.state.values()
        state["average"] = unaligned(state["average"])
    assert_steps_alike(cuda, cpu)


@pytest.mark.parametrize(
    ("place", "options"),
    [
        (transposed, {"amsgrad": False}),  # the average of one
        (contiguous, {"amsgrad": True}),
    ],
    ids=["strides", "states"],
)
def test_averages_that_cannot_go_along_have_a_pass_of_their_own(device, place, options):
    values = [torch.randn(6, 40).bfloat16(), torch.randn(6, 40).bfloat16()]
    cuda, cpu = twins("cuda", "AdamW", values, average=0.75, **options)
    assert_steps_alike(cuda, cpu, steps=1)
    for optimizer in (cuda, cpu):
        state = [*optimizer.state.values()][1]
        state["average"] = place(state["average"])
    for _ in range(2):
        set_gradients(cuda, cpu)
        device.launches()
        cuda.step()
        cpu.step()
        assert len(device.launches()) == 4
        assert_same_bits(cuda, cpu)


# How much one launch takes.


def many(count: int) -> list[Tensor]:
    return [torch.randn(3) for _ in range(count)]


@pytest.mark.parametrize("count", [1, SLOTS, SLOTS + 1, 3 * SLOTS, 21_001])
def test_any_number_of_tensors_is_one_launch_of_update(device, count):
    cuda, cpu = twins("cuda", "AdamW", many(count))
    set_gradients(cuda, cpu)
    launches = device.step(cuda)
    cpu.step()
    assert_same_bits(cuda, cpu)
    assert launches.advance == -(-count // SLOTS)


@pytest.mark.parametrize("count", [2, GROUPS, GROUPS + 1, 500])
@every_rule
def test_any_number_of_groups_is_one_launch_of_update(device, name, count):
    groups = [
        {"params": [value], "lr": 0.1 / (1 + i), "maximize": i % 3 == 0}
        for i, value in enumerate(many(count))
    ]
    cuda, cpu = twins("cuda", name, groups)
    set_gradients(cuda, cpu)
    launches = device.step(cuda)
    cpu.step()
    assert_same_bits(cuda, cpu)
    assert launches.advance == -(-count // GROUPS)


@every_rule
def test_any_number_of_layouts_is_one_launch_of_update(device, name):
    count = 100
    cuda, cpu = twins("cuda", name, [torch.randn(3, 4, 5).transpose(1, 2) for _ in range(count)])
    for optimizer in (cuda, cpu):
        for param in parameters(optimizer):
            param.grad = torch.arange(60.0).view(param.shape)
    launches = device.step(cuda)
    cpu.step()
    assert_same_bits(cuda, cpu)
    tensors = 1 + len(tensors_of(cuda)[0]) - len(count_names(cuda))  # with the gradient
    # Of a layout: its dimensions, their sizes, the strides of each tensor and of the index.
    numbers = 1 + 3 * (2 + tensors)
    assert launches.advance == -(-count // (LAYOUT_NUMBERS // numbers))


def test_slots_groups_and_layouts_in_any_order():
    """A launch of advance ends at whichever of the three it has no more room for."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for i in range(1500):
        small = torch.randn(2, 3, 4, generator=generator)
        value = small.transpose(0, 2) if i % 7 == 0 else small
        if i % 41 == 0 or i > 1400:
            groups.append({"params": [], "lr": 0.1 / (1 + i)})
        groups[-1]["params"].append(value)
    optimizers = twins("cuda", "AdamW", groups)
    for params in zip(*map(parameters, optimizers), strict=True):
        for param in params:
            param.grad = torch.arange(24.0).view(param.shape)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_bits(*optimizers)


# Variants: csrc/cuda/tuning.h.


@pytest.fixture
def held_back(device):
    """A launch runs only when the next one waits for it."""
    device.core.hold_back(True)
    yield
    assert not device.core.hold_back(False)


@pytest.mark.parametrize("variant", ["overlap", "few,overlap"])
@every_rule
def test_update_waits_for_advance(device, monkeypatch, held_back, name, variant):
    """What it would read before is not what advance writes."""
    monkeypatch.setenv("FASTOPT_CUDA_VARIANT", variant)
    device.launches()
    # No step leaves in memory what the next would find there: scale, rates and slots change.
    for sizes in ([3, CHUNK + 9, 5], [CHUNK] * 3 + [5] * SLOTS):
        optimizers = twins("cuda", name, [torch.randn(size) for size in sizes], average=0.75)
        for step in range(4):
            set_gradients(*optimizers)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] *= 0.5
                optimizer.grad_scale = torch.tensor(2.0**step)
                parameters(optimizer)[step % 3].grad = None
                optimizer.step()
            assert_same_bits(*optimizers)
    last = [launch for launch in device.launches() if launch.threads == UPDATE_THREADS]
    assert all(launch.overlaps for launch in last)


def test_nothing_overlaps_unless_it_is_asked_for(device):
    cuda, _ = twins("cuda", "AdamW", many(3))
    set_gradients(cuda)
    device.launches()
    cuda.step()
    assert not any(launch.overlaps for launch in device.launches())


@pytest.mark.parametrize("variant", ["", "few", "overlap,few"])
@pytest.mark.parametrize(
    ("slots", "groups", "are_few"),
    [
        (1, 1, True),
        (FEW_SLOTS, FEW_GROUPS, True),
        (FEW_SLOTS + 1, 1, False),
        (FEW_GROUPS + 1, FEW_GROUPS + 1, False),
    ],
)
def test_few_slots_are_sent_in_4_kib(device, monkeypatch, variant, slots, groups, are_few):
    monkeypatch.setenv("FASTOPT_CUDA_VARIANT", variant)
    values = many(slots)
    cuda, cpu = twins(
        "cuda",
        "AdamW",
        [{"params": values[i::groups], "lr": 0.1 / (1 + i)} for i in range(groups)],
    )
    for _ in range(2):
        set_gradients(cuda, cpu)
        device.launches()
        cuda.step()
        cpu.step()
        advance, _ = device.launches()
        assert (advance.argument_bytes <= 4096) == (are_few and "few" in variant)
        assert_same_bits(cuda, cpu)


def test_few_slots_of_many_layouts(device, monkeypatch):
    monkeypatch.setenv("FASTOPT_CUDA_VARIANT", "few")
    for count, are_few in ((1, True), (8, False)):
        cuda, cpu = twins("cuda", "AdamW", [torch.randn(3, 5).t() for _ in range(count)])
        for _ in range(2):
            for optimizer in (cuda, cpu):
                for param in parameters(optimizer):
                    param.grad = torch.arange(15.0).view(param.shape)
            device.launches()
            cuda.step()
            cpu.step()
            assert (device.launches()[0].argument_bytes <= 4096) == are_few
            assert_same_bits(cuda, cpu)
