"""What the memory allows: the time to stream the arrays of a step without its arithmetic."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

CHUNK = 16384  # elements a thread takes in a row, as in csrc/cpu/apply.cpp


@functools.cache
def _library() -> ctypes.CDLL:
    library = Path(tempfile.mkdtemp()) / "ceiling.so"
    source = Path(__file__).with_suffix(".cpp")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Ceiling:
    """Arrays of the shapes that a step on ``shapes`` reads and writes: parameter, gradient, states.

    Args:
        shapes: of the parameters.
        states: arrays the optimizer keeps per parameter, 0 to 2.
    """

    def __init__(self, shapes: list[tuple[int, ...]], states: int) -> None:
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
