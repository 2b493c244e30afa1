"""What the memory allows: the time to move bytes without a step's arithmetic."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import machine

from .clock import device_seconds
from .memory import tensors_in
from .situations import Plain
from .workloads import Shapes

HERE = Path(__file__).parent
CHUNK = 16384  # elements a thread takes in a row, as in csrc/cpu/apply.cpp
DEVICE_CHUNK = 4096  # and a block of a GPU's, as in csrc/slot.h


def chunks_of(numels: Sequence[int], size: int) -> Tensor:
    """Which tensor each chunk is of, its first element, and the one after its last: (3, chunks)."""
    chunks = [(t, b, min(b + size, n)) for t, n in enumerate(numels) for b in range(0, n, size)]
    return torch.tensor(chunks, dtype=torch.int64).T.contiguous()


def addresses(*tensors: Tensor) -> Iterator[ctypes.c_void_p]:
    return (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


# On a CPU.


@functools.cache
def _library() -> ctypes.CDLL:
    library = Path(tempfile.mkdtemp()) / "ceiling.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    compile = [os.environ.get("CXX", "c++"), *flags, HERE / "ceiling.cpp", "-o", library]
    subprocess.run(compile, check=True)
    return ctypes.CDLL(str(library))


class Stream:
    """On the CPU: the arrays that a float32 step on ``shapes`` reads and writes.

    Args:
        shapes: of the parameters; with each come its gradient and states.
        states: arrays the optimizer keeps per parameter, 0 to 2.
    """

    def __init__(self, shapes: Shapes, states: int) -> None:
        self.tensors = [[torch.zeros(s) for _ in range(2 + states)] for s in shapes]
        numels = [arrays[0].numel() for arrays in self.tensors]
        self.chunks = chunks_of(numels, CHUNK)
        self.pointers = torch.tensor([[a.data_ptr() for a in arrays] for arrays in self.tensors])
        # Everything is read, all but the gradient written.
        self.bytes_moved = 4 * sum(numels) * (3 + 2 * states)

    def rate(self) -> float:
        """Bytes a second of streaming everything once on torch's number of threads."""
        start = time.perf_counter()
        _library().stream(
            *addresses(self.pointers),
            ctypes.c_int64(self.pointers.shape[1]),
            *addresses(*self.chunks),
            ctypes.c_int64(self.chunks.shape[1]),
            ctypes.c_int(torch.get_num_threads()),
        )
        return self.bytes_moved / (time.perf_counter() - start)


# On a GPU.

# Bytes of an element of the parameter, the gradient, and each tensor that is kept of it.
Mix = tuple[int, ...]


class Shape(NamedTuple):
    """How update is laid out, as in csrc/cuda/apply.cu.

    Args:
        piece: elements that a thread moves of a tensor in one access.
        pieces: of each tensor, that it asks for before it waits for the first.
        resident: blocks to a multiprocessor.
    """

    piece: int
    pieces: int
    resident: int


def shape_of(mix: Mix) -> Shape:
    """Of the kernel that a table of such tensors gets."""
    param, grad, *kept = mix
    in_blocks = 1 in kept
    split = param == 2 and kept.count(2) == 1  # beside the remainder states of another width
    known = param == grad and not in_blocks and (len(set(kept)) < 2 or split)
    if not known:
        states = len(kept)
        pieces = (4 if states < 3 else 2) if in_blocks else (4, 4, 2, 1)[min(states, 3)]
        return Shape(4, pieces, 2)
    piece = 16 // max(mix)
    pieces = 1
    while pieces * piece * sum(mix) < (96 if param == 8 else 64):
        pieces *= 2
    return Shape(piece, pieces, 3 if pieces * piece * sum(mix) < 96 else 2)


def command(mix: Mix, library: Path, *options: str) -> list[str]:
    """What compiles ceiling.cu, but for the compiler."""
    shape = shape_of(mix)
    defines = {
        "WIDTHS": "".join(map(str, mix)),
        "PIECE": shape.piece,
        "PIECES": shape.pieces,
        "RESIDENT": shape.resident,
    }
    named = [f"-D{name}={value}" for name, value in defines.items()]
    return ["-std=c++17", "-O3", "-shared", *options, *named, "-o", str(library)]


def nvcc_options(architecture: str) -> list[str]:
    return [f"-arch={architecture}", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]


@functools.cache
def _device_library(mix: Mix) -> ctypes.CDLL:
    """Compiled once for all programs that measure: it takes seconds."""
    nvcc = machine.cuda_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc, which the ceiling is compiled by: set CUDA_HOME")
    major, minor = torch.cuda.get_device_capability()
    options = nvcc_options(f"sm_{major}{minor}")
    source = HERE / "ceiling.cu"
    known = hashlib.sha256(repr((mix, shape_of(mix), options)).encode() + source.read_bytes())
    library = machine.ROOT / "build" / "ceiling" / f"{known.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=library.parent)) / library.name
        subprocess.run([nvcc, *command(mix, made, *options), str(source)], check=True)
        made.replace(library)
        made.parent.rmdir()
    return loaded(library)


def loaded(library: Path) -> ctypes.CDLL:
    core = ctypes.CDLL(str(library))
    core.stream.restype = ctypes.c_char_p
    return core


class DeviceStream:
    """On a GPU: a contender's own tensors, each read, and all but the gradients written as they
    are, in the launch shape in which our update would.

    Left out are states of which an element is no whole number of bytes, such as codes of 4 bits.
    """

    def __init__(self, situation: Plain) -> None:
        slots: dict[Mix, list[list[Tensor]]] = {}
        for tensors in slots_of(situation):
            slots.setdefault(mix_of(tensors), []).append(tensors)
        self.parts = [Part(mix, own) for mix, own in slots.items()]
        self.bytes_moved = sum(part.bytes_moved for part in self.parts)

    def rate(self) -> float:
        """Bytes a second of streaming everything once."""
        return self.bytes_moved / device_seconds(self.launch, host_seconds=2e-4)

    def launch(self) -> None:
        for part in self.parts:
            part.launch()


def slots_of(situation: Plain) -> Iterator[list[Tensor]]:
    """Each parameter that is not empty, its gradient and what is kept of it."""
    states = [dict(optimizer.state) for optimizer in situation.optimizers]
    for param, grad in zip(situation.params, situation.grads, strict=True):
        state = next((own[param] for own in states if param in own), {})
        param, grad = tensors_in([param.detach(), grad])
        kept = tensors_in(state)
        numel = param.numel()
        if numel:
            whole = [t for t in kept if t.dim() and t.nbytes // numel in (1, 2, 4, 8)]
            yield [param, grad, *whole]


def mix_of(tensors: list[Tensor]) -> Mix:
    """What is packed with a few scales behind it counts as what it is nearly all of."""
    return tuple(tensor.nbytes // tensors[0].numel() for tensor in tensors)


class Part:
    """The slots of one mix: one launch."""

    def __init__(self, mix: Mix, slots: list[list[Tensor]]) -> None:
        self.core = _device_library(mix)
        self.slots = slots  # whose memory is to stay
        numels = [tensors[0].numel() for tensors in slots]
        pointers = torch.tensor([[t.data_ptr() for t in tensors] for tensors in slots])
        self.pointers = pointers.cuda()
        self.chunks = chunks_of(numels, DEVICE_CHUNK).cuda()
        self.bytes_moved = sum(numels) * (2 * sum(mix) - mix[1])
        self.multiprocessors = torch.cuda.get_device_properties().multi_processor_count

    def launch(self) -> None:
        error = self.core.stream(
            *addresses(self.pointers, *self.chunks),
            ctypes.c_int64(self.chunks.shape[1]),
            ctypes.c_int64(self.multiprocessors),
            ctypes.c_uint32(0),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error:
            raise RuntimeError(f"CUDA did not launch the ceiling: {error.decode()}")
