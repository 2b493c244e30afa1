"""On what, and with what, a figure was measured; how much memory there is and is used."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def device_name(device: str) -> str:
    """`AMD EPYC, 2 threads` or `NVIDIA H100 80GB HBM3`; of no other kind more than that it is."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return device
    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else []
    return f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """Of the sources, with -dirty where what is measured was edited since; FASTOPT_COMMIT of the
    environment where they are no git checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTOPT_COMMIT", "unknown")
    edited = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "csrc", "fastopt"]).returncode
    return head.stdout.strip() + ("-dirty" if edited else "")


def facts(device: str) -> dict[str, str]:
    """What every row of a CSV says of where it comes from."""
    return {
        "machine": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return 1024 * _status("MemAvailable", Path("/proc/meminfo"))


@functools.cache
def peak_bandwidth(device: str) -> float | None:
    """Bytes a second between a GPU and its memory, by its memory's clock (which has two edges) and
    the width of its bus; None where the driver tells neither, and for a CPU."""
    if device != "cuda":
        return None
    driver = ctypes.CDLL("libcuda.so.1")
    number = torch.cuda.current_device()
    clock, width = (
        _attribute(driver, attribute, number) for attribute in (MEMORY_CLOCK_RATE, MEMORY_BUS_WIDTH)
    )
    return 2 * 1e3 * clock * width / 8 or None


# Of CUdevice_attribute; in kilohertz and bits.
MEMORY_CLOCK_RATE, MEMORY_BUS_WIDTH = 36, 37


def _attribute(driver: ctypes.CDLL, attribute: int, number: int) -> int:
    """Of the device of this number, or 0."""
    handle, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), number):
        return 0
    if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
        return 0
    return value.value


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, looked for where the build looks for nvcc; it may also lie
    beside nvcc, which can be a link."""
    folders = [f"{os.environ[v]}/bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    folders += [*os.get_exec_path(), "/usr/local/cuda/bin"]
    folders += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is not None:
        folders.append(str(Path(nvcc).resolve().parent))
    return shutil.which(name, path=os.pathsep.join(folders))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def extra_bytes(call: Callable[[], None], device: str) -> int:
    """The most memory that ``call`` has in use beyond what was in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else call could use freed memory that still counts
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    call()
    return 1024 * max(0, _status("VmHWM") - before)


def _status(key: str, file: Path = Path("/proc/self/status")) -> int:
    """In kibibytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{file} has no {key}")
    return int(match[1])
