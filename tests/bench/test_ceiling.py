"""bench/throughput/ceiling.cu moves what a step moves, as a step does; run on the host it changes
every byte that it writes once."""

import ctypes
import dataclasses
import functools
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastopt
import machine
from fastopt import optimizer as engine
from test_cuda_source import Launch
from throughput import ceiling, measure
from throughput.situations import Plain

ON_HOST = machine.ROOT / "tests" / "cuda_on_host"
MULTIPROCESSORS = 3  # of the device that the host plays

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# The options of an AdamW, its parameters' dtype, and the mix of its tensors.
MIXES = {
    "float32": ({}, FLOAT32, (4, 4, 4, 4)),
    "bfloat16": ({}, BFLOAT16, (2, 2, 2, 2)),
    "float64": ({}, torch.float64, (8, 8, 8, 8)),
    "amsgrad": ({"amsgrad": True}, FLOAT32, (4, 4, 4, 4, 4)),
    "bfloat16 states": ({"states": "bfloat16"}, FLOAT32, (4, 4, 2, 2)),
    "8-bit states": ({"states": "8bit"}, FLOAT32, (4, 4, 1, 1)),
    "split": ({"weights": "split"}, BFLOAT16, (2, 2, 4, 4, 2)),
    "split, 8-bit states": ({"weights": "split", "states": "8bit"}, BFLOAT16, (2, 2, 1, 1, 2)),
}
every_mix = pytest.mark.parametrize(("options", "dtype", "mix"), MIXES.values(), ids=MIXES.keys())


def forget_launches(core: ctypes.CDLL) -> None:
    core.past_launches(None, ctypes.c_int64(0))


def last_launch(core: ctypes.CDLL) -> tuple[int, int, int]:
    launches = (Launch * 100)()
    count = core.past_launches(launches, ctypes.c_int64(len(launches)))
    last = launches[count - 1]
    return last.blocks, last.threads, last.vectors_streamed


@functools.cache
def compiled(mix: ceiling.Mix) -> ctypes.CDLL:
    library = Path(tempfile.mkdtemp()) / "ceiling.so"
    options = ceiling.command(mix, library, "-fPIC", "-Wno-unknown-pragmas", f"-I{ON_HOST}")
    sources = ["-x", "c++", machine.ROOT / "bench/throughput/ceiling.cu"]
    sources += [ON_HOST / "device_on_host.cpp"]
    subprocess.run(["c++", *options, *sources], check=True)
    return ceiling.loaded(library)


def stream(core: ctypes.CDLL, mix: ceiling.Mix, slots: list[list[np.ndarray]], mask: int) -> None:
    pointers = torch.tensor([[memory.ctypes.data for memory in slot] for slot in slots])
    numels = [len(slot[1]) // mix[1] for slot in slots]
    chunks = ceiling.chunks_of(numels, ceiling.DEVICE_CHUNK)
    error = core.stream(
        *ceiling.addresses(pointers, *chunks),
        ctypes.c_int64(chunks.shape[1]),
        ctypes.c_int64(MULTIPROCESSORS),
        ctypes.c_uint32(mask),
        None,
    )
    assert error is None


def plain(dtype: torch.dtype, shapes: list[tuple[int, ...]], **options) -> Plain:
    def make(params, ours):
        return fastopt.AdamW(params, **options)

    situation = Plain(shapes, make, dtype, "cpu")
    situation.before()
    situation.turn()
    return situation


@every_mix
def test_a_steps_tensors_are_found(options, dtype, mix):
    (slot,) = ceiling.slots_of(plain(dtype, [(64, 128)], **options))
    assert ceiling.mix_of(slot) == mix


SIZES = [3 * ceiling.DEVICE_CHUNK, 1, 13, ceiling.DEVICE_CHUNK + 37]
UNALIGNED = 13


def random_bytes(mix: ceiling.Mix, numel: int) -> list[np.ndarray]:
    """The memory of a slot; that of one lies an element beyond where an access may begin."""
    first = numel == UNALIGNED
    return [
        torch.randint(256, (w * (numel + first),), dtype=torch.uint8).numpy()[w * first :]
        for w in mix
    ]


def change(slot: list[np.ndarray], mix: ceiling.Mix) -> int:
    """Do to a slot what the kernel is to do where all bits are to change; returns the vectors it
    takes, more than a word each."""
    piece, numel = ceiling.shape_of(mix).piece, len(slot[1]) // mix[1]
    in_pieces = 0 if numel == UNALIGNED else numel // piece * piece
    folded = slot[1][: in_pieces * mix[1]].view(np.uint32).reshape(-1, piece * mix[1] // 4)
    folded = np.bitwise_xor.reduce(folded, axis=1, keepdims=True)
    single = slot[1].view(f"u{mix[1]}")[in_pieces:].astype(np.uint64) & 0xFFFFFFFF
    for j, width in enumerate(mix):
        if j != 1:
            words = slot[j][: in_pieces * width].view(np.uint32)
            words.reshape(-1, piece * width // 4)[:] ^= folded
            slot[j].view(f"u{width}")[in_pieces:] ^= single.astype(f"u{width}")
    return in_pieces // piece * sum(piece * width > 4 for width in mix)


@every_mix
def test_every_byte_is_moved_once(options, dtype, mix):
    """Written twice, a byte would have its old bits again. (The kernel is told to change them,
    which it never is where it is measured.)"""
    core = compiled(mix)
    slots = [random_bytes(mix, numel) for numel in SIZES]
    wanted = [[memory.copy() for memory in slot] for slot in slots]
    stream(core, mix, slots, mask=0)
    assert same(slots, wanted)
    vectors = sum(change(slot, mix) for slot in wanted)
    stream(core, mix, slots, mask=0xFFFFFFFF)
    assert same(slots, wanted)
    assert last_launch(core)[2] == vectors


def same(slots: list[list[np.ndarray]], others: list[list[np.ndarray]]) -> bool:
    return all(
        np.array_equal(a, b)
        for slot, other in zip(slots, others, strict=True)
        for a, b in zip(slot, other, strict=True)
    )


@pytest.mark.network
@every_mix
def test_launch_is_that_of_the_update(options, dtype, mix, core_on_host, monkeypatch):
    monkeypatch.setattr(engine, "_C", core_on_host)
    monkeypatch.setitem(engine._WHY_NOT, "cuda", lambda: None)
    device = ctypes.CDLL(core_on_host.__file__)
    forget_launches(device)
    situation = plain(dtype, [(40, ceiling.DEVICE_CHUNK)], backend="cuda", **options)
    update = last_launch(device)
    slots = [[t.numpy() for t in slot] for slot in map(as_bytes, ceiling.slots_of(situation))]
    core = compiled(mix)
    stream(core, mix, slots, mask=0)
    streamed = last_launch(core)
    assert streamed[:2] == update[:2]
    if 1 not in mix:  # else update reads twice, to find the largest of a block, and scales
        assert streamed[2] == update[2]


def as_bytes(slot: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().view(torch.uint8).view(-1) for tensor in slot]


@pytest.mark.nvcc
@pytest.mark.parametrize("mix", [(4, 4, 4, 4), (2, 2, 1, 1, 2)])
def test_it_compiles_with_nvcc(mix, tmp_path):
    command = ceiling.command(mix, tmp_path / "ceiling.so", *ceiling.nvcc_options("sm_90"))
    source = machine.ROOT / "bench/throughput/ceiling.cu"
    strict = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills"]
    subprocess.run([machine.cuda_tool("nvcc"), *command, *strict, source], check=True)


# Beside a contender's rounds, where there is a GPU: here the host plays one.


@pytest.fixture
def _streams_on_the_host(monkeypatch):
    monkeypatch.setattr(ceiling, "_device_library", compiled)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda: SimpleNamespace(multi_processor_count=MULTIPROCESSORS),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))

    def device_seconds(turn, host_seconds):
        start = time.perf_counter()
        turn()
        return time.perf_counter() - start

    monkeypatch.setattr(ceiling, "device_seconds", device_seconds)


@pytest.mark.usefixtures("_streams_on_the_host")
@every_mix
def test_a_contenders_own_tensors_are_streamed_and_stay_as_they_are(options, dtype, mix):
    situation = plain(dtype, [(64, 128), (3,)], **options)
    before = [tensor.clone() for slot in ceiling.slots_of(situation) for tensor in slot]
    found = ceiling.DeviceStream(situation)
    assert found.rate() > 0
    after = [tensor for slot in ceiling.slots_of(situation) for tensor in slot]
    assert all(map(torch.equal, before, after))
    reads, writes = sum(mix), sum(mix) - mix[1]
    assert found.bytes_moved - 8192 * (reads + writes) in range(1, 400)  # of the small one


@pytest.mark.usefixtures("_streams_on_the_host")
def test_each_contender_has_the_ceiling_of_its_own_mix(monkeypatch):
    monkeypatch.setattr(measure, "CACHES", 100)
    setting = measure.Setting([(32, 128)], "adamw", "plain", "float32", "cpu")
    names = ("fastopt", "fastopt 8-bit states")
    clocks = {name: setting.clock(name) for name in names}
    for clock in clocks.values():
        clock.warm_up()
    limits = measure.Limits(dataclasses.replace(setting, device="cuda"), clocks, None)
    for _ in range(3):
        limits.turn()
    assert [len(limits.of(name)) for name in names] == [3, 3]
    wide, narrow = (limits.streams[name].bytes_moved for name in names)
    assert (wide, narrow) == (4096 * 28, 4096 * 16)


def test_where_it_does_not_compile_there_is_no_ceiling(monkeypatch, capsys):
    monkeypatch.setattr(measure, "CACHES", 100)
    monkeypatch.setattr(machine, "cuda_tool", lambda name: None)
    setting = measure.Setting([(64,)], "adamw", "plain", "float32", "cpu")
    clock = setting.clock("fastopt")
    clock.warm_up()
    assert measure.device_stream(clock) is None
    assert "no ceiling: FileNotFoundError: no nvcc" in capsys.readouterr().err


def test_peak_bandwidth_is_the_clocks_two_edges_times_the_bus(monkeypatch):
    known = {machine.MEMORY_CLOCK_RATE: 3_201_000, machine.MEMORY_BUS_WIDTH: 6144}
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "_attribute", lambda driver, which, number: known[which])
    machine.peak_bandwidth.cache_clear()
    assert machine.peak_bandwidth("cuda") == pytest.approx(4.917e12, rel=1e-3)
    known[machine.MEMORY_CLOCK_RATE] = 0
    machine.peak_bandwidth.cache_clear()
    assert machine.peak_bandwidth("cuda") is None
    machine.peak_bandwidth.cache_clear()
    assert machine.peak_bandwidth("cpu") is None
