"""What only a GPU can show of the CUDA backend and of compiled Triton; `make gpu` runs it.

What needs none, the kernels' arithmetic and addressing, is tested everywhere: test_cuda_source.py
runs their source on the host, test_machine_code.py reads what the compiler made of it. There,
test_gpu_on_host.py runs these tests, too, lest a slip in one is found only on a GPU.
"""

import contextlib
import inspect
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastopt
import same_bits
from cases import FLOAT32, FLOAT64, OPTIONS, Case
from helpers import (
    LAST_DIGITS,
    assert_equal,
    assert_same_bits,
    assert_same_tensors,
    every_optimizer,
    every_rule,
    fused_in_torch,
    make,
    native_only,
    parameters,
    snapshot,
    tensors_of,
    train,
)
from oracle import SAMPLING, rms_ulp
from same_bits import *  # noqa: F403 - its tests
from test_parity import as_torch_would

pytestmark = [pytest.mark.gpu, native_only]

DEVICE = "cuda"  # but in test_gpu_on_host.py


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _tensors_of_the_shared_tests(monkeypatch):
    monkeypatch.setattr(same_bits, "DEVICE", DEVICE)


SHAPES = [(), (0,), (3,), (4097,), (64, 33), (100_000,)]


def twins(name, backend, shapes=SHAPES, **kwargs):
    """The same optimizer twice: on the GPU with a backend, and on the CPU."""
    values = [torch.randn(shape) for shape in shapes]
    optimizers = []
    for device, engine in ((DEVICE, backend), ("cpu", "cpu")):
        params = [torch.nn.Parameter(value.to(device, copy=True)) for value in values]
        placed = {k: v.to(device) if torch.is_tensor(v) else v for k, v in kwargs.items()}
        optimizers.append(make(fastopt, name, params, backend=engine, **placed))
    return optimizers


def set_gradients(*optimizers, factor=1.0):
    """Equal new gradients, in new memory."""
    for params in zip(*map(parameters, optimizers), strict=True):
        grad = torch.randn(params[0].shape) * factor
        for param in params:
            param.grad = grad.to(param.device, copy=True)


def step_both(gpu, cpu, steps=3):
    for _ in range(steps):
        set_gradients(gpu, cpu)
        gpu.step()
        cpu.step()


def captured(gpu, cpu):
    """What replays a step of the first, after some of both."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step_both(gpu, cpu)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.step()
    return graph.replay


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Numbers.


@every_optimizer
def test_same_bits_with_extreme_values(name, backend):
    gpu, cpu = twins(name, backend)
    for exponent in (-160, -45, 0, 38, 300):
        set_gradients(gpu, cpu, factor=10.0**exponent)  # in float32: 0, denormal, inf and NaN, too
        gpu.step()
        cpu.step()
        assert_same_bits(gpu, cpu)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(optimizer, options) for optimizer in OPTIONS for options in OPTIONS[optimizer]],
)
def test_near_to_the_truth(optimizer, options):
    # As near as torch's fused step on the CPU, whose bits ours are. torch's on CUDA fuses one
    # multiplication more, and before 2.13 has its moments in float64: it can be nearer.
    case = Case(optimizer, options, FLOAT32, "large")
    ours = rms_ulp(case, lambda params: case.make_optimizer(params, fastopt), DEVICE)
    torchs = rms_ulp(case, lambda params: as_torch_would(case, params), "cpu")
    assert all(ours[name] <= SAMPLING * torchs[name] for name in ours), (ours, torchs)


@fused_in_torch
def test_float64_matches_torchs_fused_step(name):
    case = Case(name, "everything", FLOAT64, "sizes")
    ours = case.make_optimizer(case.parameters(device=DEVICE), fastopt)
    torchs = case.make_optimizer(case.parameters(device=DEVICE), fused=True)
    for one in (ours, torchs):
        train(case, one, range(5))
    assert_same_tensors(ours, torchs, **LAST_DIGITS)


@every_optimizer
def test_run_continued_on_another_backend_continues_bit_identically(name):
    mixed, cpu = twins(name, "cuda")
    step_both(mixed, cpu)
    on_triton = make(fastopt, name, parameters(mixed), backend="triton")
    on_triton.load_state_dict(mixed.state_dict())
    step_both(on_triton, cpu)
    assert_same_bits(on_triton, cpu)


# Scale.


@every_optimizer
def test_many_tensors_and_groups(name):
    gpu, cpu = twins(name, "cuda", shapes=[(5,)] * 21_001)
    for optimizer in (gpu, cpu):
        group = optimizer.param_groups.pop()
        for i in range(500):
            optimizer.add_param_group(
                {**group, "params": group["params"][i::500], "lr": 1e-3 * (1 + i)}
            )
    step_both(gpu, cpu, steps=2)
    assert_same_bits(gpu, cpu)


def test_tensor_of_more_than_2_to_the_31_elements():
    numel, part = 2**31 + 5, 2**28
    if torch.cuda.mem_get_info()[0] < 16 * numel:
        pytest.skip("needs 34 GB of free memory")
    large = torch.nn.Parameter(torch.randn(part, device="cuda").bfloat16().repeat(9)[:numel])
    large.grad = torch.randn(part - 1, device="cuda").bfloat16().repeat(9)[:numel]
    small = [torch.nn.Parameter(piece.clone()) for piece in large.detach().split(part)]
    for piece, grad in zip(small, large.grad.split(part), strict=True):
        piece.grad = grad
    for params in ([large], small):
        fastopt.SGD(params, lr=0.1, backend="cuda").step()
    for piece, whole in zip(small, large.detach().split(part), strict=True):
        assert torch.equal(piece, whole)


# What a step reads on the device.

# Clipping whatever there is here, skipping and averaging.
PASSES = {"max_grad_norm": 0.5, "skip_nonfinite": True, "average": 0.75}
with_passes_or_not = pytest.mark.parametrize("passes", [{}, PASSES], ids=["plain", "passes"])


@with_passes_or_not
@every_rule
def test_steady_step_does_not_synchronise(name, backend, passes):
    gpu, cpu = twins(name, backend, lr=torch.tensor(3e-2), **passes)
    step_both(gpu, cpu)
    for step in range(3):
        set_gradients(gpu, cpu)
        gpu.param_groups[0]["lr"].fill_(0.1 / (1 + step))
        cpu.param_groups[0]["lr"].fill_(0.1 / (1 + step))
        with no_synchronisation():
            gpu.step()
        cpu.step()
    assert_same_bits(gpu, cpu)


@fused_in_torch
def test_gradscaler_unscales_and_skips_without_waiting(name, backend):
    gpu, cpu = twins(name, backend, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    scaler.scale(torch.zeros((), device=DEVICE))  # makes its tensors
    for step in range(6):
        set_gradients(gpu, cpu)
        overflows = step in (0, 3)
        for param in parameters(gpu):
            param.grad.mul_(scaler.get_scale())
        if overflows:
            parameters(gpu)[-1].grad[7] = float("inf")
        before = snapshot(gpu)
        # SGD asks once, where its buffers are new, whether the step counts.
        waits = name == "SGD" and step <= 1
        with contextlib.nullcontext() if waits else no_synchronisation():
            scaler.step(gpu)
        scaler.update()
        if overflows:
            after = snapshot(gpu)
            assert_equal({key: after[key] for key in before}, before)
        else:
            cpu.step()
            for mine, theirs in zip(parameters(gpu), parameters(cpu), strict=True):
                assert torch.equal(mine.grad.cpu(), theirs.grad)  # a power of two: exact
    assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("variant", ["", "overlap", "few", "overlap,few"])
@every_optimizer
def test_variants_and_averages_have_the_cpus_bits(name, variant, monkeypatch):
    """csrc/cuda/tuning.h"""
    monkeypatch.setenv("FASTOPT_CUDA_VARIANT", variant)
    gpu, cpu = twins(name, "cuda", average=0.75)
    step_both(gpu, cpu, steps=20)
    assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("variant", ["", "overlap"])
@every_optimizer
def test_graph_replays_what_has_changed_meanwhile(name, backend, variant, monkeypatch):
    monkeypatch.setenv("FASTOPT_CUDA_VARIANT", variant)
    gpu, cpu = twins(name, backend, lr=torch.tensor(1e-2), capturable=True)
    found_inf = gpu.found_inf = torch.zeros((), device=DEVICE)
    replay = captured(gpu, cpu)
    for step in range(5):
        rate, overflows = 0.1 / (1 + step), step == 2
        gpu.param_groups[0]["lr"].fill_(rate)
        cpu.param_groups[0]["lr"].fill_(rate)
        found_inf.fill_(overflows)
        for mine, theirs in zip(parameters(gpu), parameters(cpu), strict=True):
            theirs.grad = torch.randn_like(theirs)
            mine.grad.copy_(theirs.grad)
        replay()
        if not overflows:
            cpu.step()
        assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("kept", [{}, {"states": "8bit"}], ids=str)
@every_rule
def test_graph_replays_clipping_skipping_and_averaging(name, backend, kept):
    gpu, cpu = twins(name, backend, capturable=True, **PASSES, **kept)
    replay = captured(gpu, cpu)
    for factor in (1.0, 1e-6, torch.nan, 1e6, 1.0):
        for mine, theirs in zip(parameters(gpu), parameters(cpu), strict=True):
            theirs.grad = torch.randn_like(theirs) * factor
            mine.grad.copy_(theirs.grad)
        replay()
        cpu.step()
        assert_same_bits(gpu, cpu)
        assert_equal(float(gpu._passes.norm), float(cpu._passes.norm))
        assert gpu.skipped_steps == cpu.skipped_steps
    assert cpu.skipped_steps == 1


@every_optimizer
def test_first_step_is_not_captured(name, backend):
    """Its states would be made anew, and so be zero again, at every replay."""
    gpu, _ = twins(name, backend, capturable=True)
    set_gradients(gpu)
    before = snapshot(gpu)
    with (
        pytest.raises(RuntimeError, match="one step before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        gpu.step()
    assert_equal(snapshot(gpu), before)


def test_clip_grad_norm_has_the_cpus_bits():
    values = [torch.randn(shape) for shape in SHAPES]
    sides = [[torch.nn.Parameter(v.to(device)) for v in values] for device in (DEVICE, "cpu")]
    for limit in (1e-3, 1e6):
        for mine, theirs in zip(*sides, strict=True):
            theirs.grad = torch.randn_like(theirs)
            mine.grad = theirs.grad.to(DEVICE, copy=True)
        norms = [fastopt.clip_grad_norm_(params, limit) for params in sides]
        assert torch.equal(norms[0].cpu(), norms[1])
        for mine, theirs in zip(*sides, strict=True):
            assert torch.equal(mine.grad.cpu(), theirs.grad)


@fused_in_torch
def test_gradscaler_leaves_clipping_and_skipping_to_the_step(name, backend):
    gpu, cpu = twins(name, backend, fused=True, **PASSES)
    step_both(gpu, cpu)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    scaler.scale(torch.zeros((), device=DEVICE))
    for step in range(4):
        set_gradients(gpu, cpu)
        for param in parameters(gpu):
            param.grad.mul_(2.0**10 if step < 2 else 2.0**9)  # after the overflow the half
        if step == 1:
            parameters(gpu)[-1].grad[7] = float("inf")
        with no_synchronisation():
            scaler.step(gpu)
        scaler.update()
        if step != 1:
            cpu.step()
        assert_same_bits(gpu, cpu)


# DTensors, as FSDP2's parameters are, on one device.


@pytest.fixture
def mesh():
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kept", [{}, PASSES, {"states": "8bit"}], ids=["plain", "passes", "8bit"])
@every_rule
def test_dtensors_have_the_bits_of_the_cpus_plain_tensors(name, backend, kept, mesh):
    values = [torch.randn(shape) for shape in ((64, 33), (5, 130))]

    def sharded(value):
        return distribute_tensor(value.to(DEVICE, copy=True), mesh, [Shard(0)])

    def local(tensor):
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().cpu()

    params = [torch.nn.Parameter(sharded(value)) for value in values]
    plain = [torch.nn.Parameter(value.clone()) for value in values]
    gpu = make(fastopt, name, params, backend=backend, **kept)
    cpu = make(fastopt, name, plain, backend="cpu", **kept)
    for _ in range(3):
        for mine, theirs in zip(params, plain, strict=True):
            theirs.grad = torch.randn_like(theirs)
            mine.grad = sharded(theirs.grad)
        gpu.step()
        cpu.step()
    for mine, theirs in zip(tensors_of(gpu), tensors_of(cpu), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(local(mine[key]), theirs[key].detach()), key


# Where a step runs.


@every_optimizer
def test_step_runs_on_the_current_stream(name, backend):
    gpu, cpu = twins(name, backend)
    step_both(gpu, cpu)
    set_gradients(cpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = [param.grad.to(DEVICE) for param in parameters(cpu)]  # waits, so before the sleep
        torch.cuda._sleep(100_000_000)
        for mine, grad in zip(parameters(gpu), late, strict=True):
            mine.grad.copy_(grad)  # on any other stream the step would miss it
        gpu.step()
    side.synchronize()
    cpu.step()
    assert_same_bits(gpu, cpu)


@every_optimizer
def test_parameters_on_another_device_than_the_current_one(name, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    gpu, cpu = twins(name, backend)
    for param in parameters(gpu):
        param.data = param.data.to("cuda:1")
    with torch.cuda.device(0):
        step_both(gpu, cpu)
        assert torch.cuda.current_device() == 0
    assert_same_bits(gpu, cpu)


@every_optimizer
def test_devices_mixed_in_one_optimizer(name):
    _, cpu = twins(name, "cuda", lr=torch.tensor(3e-2))
    values = [param.detach().clone() for param in parameters(cpu)]
    params = [
        torch.nn.Parameter(value.to(DEVICE if i % 2 else "cpu")) for i, value in enumerate(values)
    ]
    mixed = make(fastopt, name, params, lr=torch.tensor(3e-2, device=DEVICE))
    step_both(mixed, cpu)
    assert_same_bits(mixed, cpu)


@every_optimizer
def test_threads_step_their_own_optimizers_on_their_own_streams(name):
    pairs = [twins(name, "cuda") for _ in range(4)]
    for gpu, cpu in pairs:
        step_both(gpu, cpu)
        set_gradients(gpu, cpu)
    torch.cuda.synchronize()

    def run(gpu):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                gpu.step()
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(gpu,)) for gpu, _ in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gpu, cpu in pairs:
        for _ in range(20):
            cpu.step()
        assert_same_bits(gpu, cpu)


# State.


@every_optimizer
def test_steps_are_counted_on_the_device_and_saved_where_stock_keeps_them(name):
    gpu, cpu = twins(name, "cuda")
    step_both(gpu, cpu)
    for tensors in tensors_of(gpu):
        assert all(tensor.is_cuda for tensor in tensors.values())
    for entry in gpu.state_dict()["state"].values():
        assert all(tensor.is_cuda == (key != "step") for key, tensor in entry.items())
    gpu.param_groups[0]["fused"] = True
    for entry in gpu.state_dict()["state"].values():
        assert all(tensor.is_cuda for tensor in entry.values())


# torch casts the numbers beside the step count of the others to the parameter's dtype.
keeping_dtypes = pytest.mark.parametrize(
    "name", [name for name in OPTIONS if name not in ("ASGD", "Lion", "NAdam")]
)

STOCK = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("way", STOCK)
@keeping_dtypes
def test_checkpoints_move_to_and_from_every_stock_engine(name, way):
    known = inspect.signature(getattr(torch.optim, name)).parameters
    if not STOCK[way].keys() <= known.keys():
        pytest.skip(f"torch's {name} has no {way}")
    values = [torch.randn(shape, device=DEVICE, dtype=torch.float64) for shape in SHAPES]

    def optimizer(module, **flags):
        return make(module, name, [torch.nn.Parameter(v.clone()) for v in values], **flags)

    def taken_over(old, new, flags):
        for mine, theirs in zip(parameters(new), parameters(old), strict=True):
            mine.data.copy_(theirs.data)
        checkpoint = old.state_dict()
        for group in checkpoint["param_groups"]:
            group.update(flags)  # they choose the engine, and where it finds its step counts
        new.load_state_dict(checkpoint)
        return new

    def train_both(one, other):
        for _ in range(2):
            for mine, theirs in zip(parameters(one), parameters(other), strict=True):
                mine.grad = torch.randn_like(mine)
                theirs.grad = mine.grad.clone()
            one.step()
            other.step()

    current, never_moved = (optimizer(torch.optim, **STOCK[way]) for _ in range(2))
    train_both(current, never_moved)
    current = taken_over(current, optimizer(fastopt), {"fused": None, "foreach": None})
    train_both(current, never_moved)
    current = taken_over(current, optimizer(torch.optim, **STOCK[way]), STOCK[way])
    train_both(current, never_moved)
    # torch's capturable takes powers of betas in float32, the others and ours in float64.
    close = {"rtol": 1e-4, "atol": 1e-6} if way == "capturable" else LAST_DIGITS
    assert_same_tensors(current, never_moved, **close)


# Memory.

STRANGE_STEPS = """
import sys, torch, fastopt
device = sys.argv[1]
every_state = {"Adam": {"amsgrad": True}, "SGD": {"momentum": 0.9}}
runs = [
    (name, dtype, every_state.get(name, {}))
    for name in fastopt.__all__
    if hasattr(getattr(fastopt, name), "step")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
]
passes = {"max_grad_norm": 1e-3, "skip_nonfinite": True, "average": 0.9}
for name in ("AdamW", "SGD"):
    own = passes | every_state.get(name, {})
    for states in (None, "bfloat16", "8bit"):
        runs.append((name, torch.float32, own | {"states": states}))
        for weights in ("split", "stochastic"):
            runs.append((name, torch.bfloat16, own | {"states": states, "weights": weights}))
for name, dtype, options in runs:
    params = []
    for size in (1, 3, 4095, 4096, 4097, 20_001):
        new = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
        params += [new(size), new(size + 1)[1:], new(3, size).t(), new(size, 2)[:, 0]]
    params = [torch.nn.Parameter(p) for p in params]
    optimizer = getattr(fastopt, name)(params, lr=1e-3, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
if device == "cuda":
    torch.cuda.synchronize()
"""


@pytest.mark.timeout(300)
def test_compute_sanitizer_finds_nothing():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    run = subprocess.run(
        [sanitizer, "--error-exitcode=9", sys.executable, "-c", STRANGE_STEPS, DEVICE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor its own memory
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
