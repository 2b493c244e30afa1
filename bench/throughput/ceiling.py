"""What the memory allows: the time to move bytes without a step's arithmetic."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from .workloads import Shapes

CHUNK = 16384  # elements a thread takes in a row, as in csrc/cpu/apply.cpp
COPIED = 1 << 30  # bytes, far beyond any GPU's caches


@functools.cache
def _library() -> ctypes.CDLL:
    library = Path(tempfile.mkdtemp()) / "ceiling.so"
    source = Path(__file__).with_suffix(".cpp")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
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
        chunks = [
            (t, b, min(b + CHUNK, n)) for t, n in enumerate(numels) for b in range(0, n, CHUNK)
        ]
        self.chunks = torch.tensor(chunks, dtype=torch.int64).T.contiguous()
        self.pointers = torch.tensor([[a.data_ptr() for a in arrays] for arrays in self.tensors])
        # Everything is read, all but the gradient written.
        self.bytes_moved = 4 * sum(numels) * (3 + 2 * states)

    def seconds(self) -> float:
        """Stream everything once on torch's number of threads."""
        tensor, begin, end = (ctypes.c_void_p(row.data_ptr()) for row in self.chunks)
        start = time.perf_counter()
        _library().stream(
            ctypes.c_void_p(self.pointers.data_ptr()),
            ctypes.c_int64(self.pointers.shape[1]),
            *(tensor, begin, end, ctypes.c_int64(self.chunks.shape[1])),
            ctypes.c_int(torch.get_num_threads()),
        )
        return time.perf_counter() - start


class Copy:
    """On a GPU: a copy from one end of its memory to another."""

    def __init__(self) -> None:
        self.source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
        self.target = torch.empty_like(self.source)
        self.bytes_moved = 2 * COPIED

    def seconds(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.target.copy_(self.source)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
