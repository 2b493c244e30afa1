"""test_gpu.py without a GPU: the host runs the source of the CUDA kernels, and plays streams and
graphs that do everything at once.

What this shows, test_cuda_source.py shows, too; but a slip in the tests themselves is found here,
and not on a GPU that is there for minutes.
"""

import contextlib
import sys

import pytest
import torch

import test_gpu
from cases import OPTIONS
from fastopt import optimizer as engine
from helpers import native_only
from test_gpu import mesh  # noqa: F401 - a fixture

pytestmark = [native_only, pytest.mark.network]

# They are about the device itself.
ONLY_ON_A_GPU = {
    "test_tensor_of_more_than_2_to_the_31_elements",
    "test_first_step_is_not_captured",
    "test_run_continued_on_another_backend_continues_bit_identically",  # from CUDA on Triton
    "test_parameters_on_another_device_than_the_current_one",
    "test_steps_are_counted_on_the_device_and_saved_where_stock_keeps_them",
    "test_checkpoints_move_to_and_from_every_stock_engine",
    "test_compute_sanitizer_finds_nothing",
    # With one option and one optimizer, below.
    "test_near_to_the_truth",
    "test_many_tensors_and_groups",
}
OWN = {
    name: value
    for name, value in vars(test_gpu).items()
    if name.startswith("test_") and value.__module__ == test_gpu.__name__
}
globals().update({name: value for name, value in OWN.items() if name not in ONLY_ON_A_GPU})


def test_what_is_left_out_is_there():
    assert OWN.keys() > ONLY_ON_A_GPU


@pytest.mark.parametrize("name", OPTIONS)
def test_near_to_the_truth_with_one_option(name):
    test_gpu.test_near_to_the_truth(name, list(OPTIONS[name])[-1])


def test_many_tensors_and_groups_of_one_optimizer():
    test_gpu.test_many_tensors_and_groups("AdamW")


def test_what_compute_sanitizer_looks_at_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", test_gpu.DEVICE])
    exec(test_gpu.STRANGE_STEPS, {})


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def backend():
    return "cuda"


@pytest.fixture(autouse=True)
def _the_host_is_the_device(core_on_host, monkeypatch):
    monkeypatch.setattr(engine, "_C", core_on_host)
    monkeypatch.setitem(engine._WHY_NOT, "cuda", lambda: None)
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")

    def nothing(*args):
        pass

    played = {
        "Stream": Stream,
        "stream": contextlib.nullcontext,
        "current_stream": Stream,
        "synchronize": nothing,
        "set_sync_debug_mode": nothing,
        "_sleep": nothing,
    }
    for name, played_by in played.items():
        monkeypatch.setattr(torch.cuda, name, played_by)

    def captured(gpu, cpu):
        test_gpu.step_both(gpu, cpu)
        return gpu.step

    monkeypatch.setattr(test_gpu, "captured", captured)
