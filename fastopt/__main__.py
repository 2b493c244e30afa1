"""``python -m fastopt [--json]``: what was built, what is usable here, and a one-second self-test.

Exit code 0 when the self-test agrees with torch.optim and one OpenMP runtime serves both, else 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import fastopt
from fastopt import _C

# Where the default ones leave a state out.
OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}


def self_test(device: str) -> dict[str, str | None]:
    """Ten steps of each optimizer beside torch's for-loop: None where they agree, else how not."""
    results: dict[str, str | None] = {}
    for name in filter(torch.optim.__dict__.__contains__, fastopt.__all__):
        options = OPTIONS.get(name, {})
        for dtype in (torch.float32, torch.float64):
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(40_000, generator=generator, dtype=dtype).to(device)
            ours, stock = (torch.nn.Parameter(start.clone()) for _ in range(2))
            optimizers = (
                getattr(fastopt, name)([ours], lr=1e-2, **options),
                getattr(torch.optim, name)([stock], lr=1e-2, foreach=False, **options),
            )
            for _ in range(10):
                grad = torch.randn(start.shape, generator=generator, dtype=dtype).to(device)
                for p, optimizer in zip((ours, stock), optimizers, strict=True):
                    p.grad = grad.clone()
                    optimizer.step()
            difference = (ours - stock).abs().max().item()
            agrees = difference <= 100 * torch.finfo(dtype).eps
            results[f"{name} {str(dtype).removeprefix('torch.')} on {device}"] = (
                None if agrees else f"differs from torch.optim by {difference:.1e}"
            )
    return results


def devices_to_test(backends: dict[str, str | None]) -> list[str]:
    """The CPU, and the accelerator where one of its backends is usable."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = accelerator is not None and None in (backends["cuda"], backends["triton"])
    return ["cpu", accelerator.type] if accelerator is not None and usable else ["cpu"]


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes mapped into this process; None where that cannot be seen."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(filter(is_openmp_runtime, paths))


def is_openmp_runtime(path: str) -> bool:
    """Whether it is GNU's, LLVM's, Intel's or NVIDIA's; wheels put a hash into the name."""
    return bool(re.match(r"lib(gomp|omp|iomp5|nvomp)(-[0-9a-f]+)?\.so\b", Path(path).name))


def report() -> dict[str, Any]:
    runtimes = openmp_runtimes()
    backends = fastopt.backends()
    tests: dict[str, str | None] = {}
    for device in devices_to_test(backends):
        tests |= self_test(device)
    return {
        "fastopt": fastopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "built": _C.build["compiler"] + ("" if _C.build["openmp"] else " without OpenMP"),
        "cuda": _C.build["cuda"],
        "instruction_set": _C.build["instruction_set"],
        "threads": torch.get_num_threads() if _C.build["openmp"] else 1,
        "openmp": runtimes,
        "backends": backends,
        "self_test": tests,
        "healthy": not any(tests.values()) and (runtimes is None or len(runtimes) == 1),
    }


def describe(found: dict[str, Any]) -> str:
    lines = [
        f"fastopt {found['fastopt']}, torch {found['torch']}, Python {found['python']}",
        f"built with {found['built']}, CUDA {found['cuda']}",
        f"runs {found['instruction_set']} code on {found['threads']} threads",
        *(f"OpenMP: {path}" for path in found["openmp"] or ()),
        *(f"backend {name}: {why or 'usable'}" for name, why in found["backends"].items()),
        *(f"self-test {name}: {why or 'agrees'}" for name, why in found["self_test"].items()),
        "healthy" if found["healthy"] else "NOT healthy: see above",
    ]
    if found["openmp"] and len(found["openmp"]) > 1:
        lines.insert(-1, "more than one OpenMP runtime is mapped; import torch before others")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastopt", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args().json
    found = report()
    print(json.dumps(found, indent=2) if as_json else describe(found))
    return 0 if found["healthy"] else 1


if __name__ == "__main__":
    sys.exit(main())
