"""What every test starts from: a seed, two threads, bounded hypothesis runs, a GPU if it asks.

In CI nothing but a GPU, the compilers of other processors and what a test marked `needs` names may
be missing: any other skip is a failure.
"""

import ctypes
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).parents[1]

COMPILERS = {"nvcc": "nvcc", "aarch64": "aarch64-linux-gnu-g++"}  # by the mark of what needs it

IN_CI = bool(os.environ.get("CI"))

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("dev", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("ci" if IN_CI else "dev")


def pytest_addoption(parser):
    parser.addoption(
        "--once",
        action="store_true",
        help="every property once: of each test one choice of its parameters, and nothing that is "
        "marked slow or needs a package index",
    )


def pytest_collection_modifyitems(config, items):
    """Which choice it is, a test's name says, so that among all tests all optimizers, backends and
    layouts have their turn."""
    for item in items:
        if "core_on_host" in item.fixturenames:
            item.add_marker(pytest.mark.timeout(900))  # the first of them builds it
    if not config.getoption("--once"):
        return
    choices = {}
    for item in items:
        if not (any(map(item.get_closest_marker, ("slow", "network"))) or missing(item)):
            choices.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = [found[zlib.crc32(name.encode()) % len(found)] for name, found in choices.items()]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


def pytest_collection_finish():
    """What is there by now stays: Accelerate, which collects garbage after each training, need not
    look through all of torch and every test again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def accelerator():
    """A fresh one: Accelerate keeps what it was first told for the life of the process."""
    import accelerate
    from accelerate.state import AcceleratorState

    def make(**kwargs):
        AcceleratorState._reset_state(reset_partial_state=True)
        return accelerate.Accelerator(cpu=True, **kwargs)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def core_on_host(testrun_uid):
    """A core whose CUDA kernels run on the CPU: the installed one where it is such a build."""
    from fastopt import _C

    if hasattr(ctypes.CDLL(_C.__file__), "past_launches"):
        return _C
    folder = ROOT / "build" / "cuda_on_host"
    built_by = folder / "testrun"
    # Both processes of `make test` may come to these tests at once: one of them builds.
    with FileLock(folder.with_suffix(".lock")):
        if not built_by.exists() or built_by.read_text() != testrun_uid:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
            subprocess.run(
                [*install, "--target", folder, ROOT],
                env={**os.environ, "FASTOPT_CUDA_ON_HOST": "ON"},
                check=True,
            )
            built_by.write_text(testrun_uid)
    (path,) = (folder / "fastopt").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("cuda_on_host._C", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


def missing(node):
    """What a marked test needs and this machine lacks."""
    if node.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "a CUDA device"
    for mark, compiler in COMPILERS.items():
        if node.get_closest_marker(mark) and shutil.which(compiler) is None:
            return compiler
    for marker in node.iter_markers("needs"):
        for package in marker.args:
            if importlib.util.find_spec(package) is None:
                return package
    return None


@pytest.fixture(autouse=True)
def _skip_where_something_is_missing(request):
    if what := missing(request.node):
        pytest.skip(f"needs {what}")


def _fail_in_ci_if_skipped(report, node):
    is_xfail = hasattr(report, "wasxfail")  # pytest reports those as skipped, too
    may_skip = node.get_closest_marker("gpu") or missing(node)
    if IN_CI and report.skipped and not is_xfail and not may_skip:
        _, _, why = report.longrepr
        report.outcome = "failed"
        report.longrepr = (
            "in CI only what needs a GPU, another compiler or a package it names may be skipped: "
            f"{why}"
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return _fail_in_ci_if_skipped((yield), item)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _fail_in_ci_if_skipped((yield), collector)
