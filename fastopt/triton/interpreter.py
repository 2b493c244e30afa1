"""What Triton's interpreter needs to yield a compiled kernel's bits, and sooner; unused without."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
from triton._C.libtriton import interpreter as native
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def _libm(name: str, c_type: Any, dtype: Any) -> Any:
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [c_type] * 3, c_type
    elementwise = np.frompyfunc(function, 3, 1)
    return lambda a, b, c: np.asarray(elementwise(a, b, c), dtype)


_FMA = {
    np.dtype(np.float32): _libm("fmaf", ctypes.c_float, np.float32),
    np.dtype(np.float64): _libm("fma", ctypes.c_double, np.float64),
}


def fma(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x * y + z rounded once, as compiled kernels do."""
    return TensorHandle(_FMA[z.data.dtype](x.data, y.data, z.data), z.dtype.scalar)


_triton_call = InterpretedFunction.__call__


def _call(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """One kernel function calls another. Triton makes triton.language the interpreter's each time,
    which is a third of a step. For our functions the launch has; its own see another module."""
    if function.fn.__module__.startswith("fastopt."):
        return function.rewrite()(*args, **kwargs)
    return _triton_call(function, *args, **kwargs)


_REPLACED: list[tuple[Any, str, Any]] = [(InterpretedFunction, "__call__", _call)]
if not hasattr(native, "fma_fp64"):
    # Triton's own rounded the product, too, up to 3.6 at least.
    _REPLACED.append((InterpreterBuilder, "create_fma", fma))


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Surrounds a launch. Overflow and NaN are results in it, nothing to warn of."""
    originals = [getattr(owner, name) for owner, name, _ in _REPLACED]
    for owner, name, ours in _REPLACED:
        setattr(owner, name, ours)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for (owner, name, _), original in zip(_REPLACED, originals, strict=True):
            setattr(owner, name, original)
