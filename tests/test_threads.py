"""Steps from several Python threads, inside backward, beside other threads and across a fork."""

import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import fastopt
from cases import BFLOAT16, FLOAT32, IN_TORCH, PARALLEL, Case
from helpers import assert_equal, every_optimizer, native_only, snapshot, tensors_of, train

pytestmark = native_only

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


@pytest.fixture
def threads():
    """Sets torch's thread count, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_optimizer
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("layout", ["sizes", "transposed_grad"])
def test_number_of_threads_changes_no_bit(name, dtypes, layout, threads):
    case = Case(name, "everything", dtypes, layout)

    def trained(count):
        threads(count)
        optimizer = case.make_optimizer(case.parameters(), fastopt)
        train(case, optimizer, range(3))
        return snapshot(optimizer)

    assert_equal(trained(2), trained(1))
    assert_equal(trained(5), trained(1))


# Floating-point mode: every thread has its own, and torch sets the calling thread's only.


FLUSHES = """
import torch, fastopt
torch.set_num_threads(2)


def zeros(tensor):  # of their bits: a thread that flushes takes denormals for zeros
    return (tensor.view(torch.int32) & 0x7FFFFFFF == 0).sum().item()


def stepped(threads):
    param = torch.nn.Parameter(torch.zeros(1 << 18))
    param.grad = torch.full_like(param, 1.5e-38)
    torch.set_num_threads(threads)
    fastopt.SGD([param], lr=0.125).step()
    torch.set_num_threads(2)
    return param.detach()


def multiplied():
    return torch.full((1 << 18,), 1.5e-38).mul_(0.125)
"""


def run_program(program: str) -> str:
    """What it prints. It finds what tests share beside it."""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def flush_denormal():
    """Sets the calling thread's mode, and sets it back."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormals")
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("workers", [True, False])
def test_denormals_are_flushed_as_the_caller_has_it(workers, flush_denormal):
    """Threads start with the mode of the thread that starts them."""
    program = f"""{FLUSHES}
torch.set_flush_denormal({workers})
multiplied()
for caller in (True, False):
    for threads in [2] * 20 + [1, 5]:
        torch.set_flush_denormal(caller)
        print(caller, zeros(stepped(threads)))
"""
    said = set(run_program(program).splitlines())
    assert said == {f"True {1 << 18}", "False 0"}


@pytest.mark.parametrize("workers", [True, False])
def test_worker_threads_get_their_mode_back(workers, flush_denormal):
    """Seen in an operation of torch's, half of which the caller computes and half the other."""
    program = f"""{FLUSHES}
torch.set_flush_denormal({workers})
multiplied()
for _ in range(20):
    torch.set_flush_denormal({not workers})
    stepped(2)
    print(zeros(multiplied()))
"""
    assert set(run_program(program).split()) == {str(1 << 17)}


@every_optimizer
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=str)
def test_number_of_threads_changes_no_bit_of_denormals(name, dtypes, threads, flush_denormal):
    case = Case(name, "everything", dtypes, "large")

    def trained(count):
        threads(count)
        optimizer = case.make_optimizer(case.parameters(), fastopt, lr=0.125)
        (param,) = optimizer.param_groups[0]["params"]
        param.data.mul_(2.0**-126)
        for step in range(3):
            case.set_gradients([param], step)
            param.grad.mul_(2.0**-124)
            flush_denormal(True)
            optimizer.step()
            flush_denormal(False)
        return snapshot(optimizer)

    alone = trained(1)
    for count in [2, 5] * 3:
        assert_equal(trained(count), alone)


# Python's threads.


@every_optimizer
def test_optimizers_step_from_several_threads_at_once(name):
    case = Case(name, "everything", FLOAT32, "sizes")
    start = threading.Barrier(4)

    def trained(_):
        optimizer = case.make_optimizer(case.parameters(), fastopt)
        start.wait()
        train(case, optimizer, range(20))
        return snapshot(optimizer)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(trained, range(4)))
    alone = case.make_optimizer(case.parameters(), fastopt)
    train(case, alone, range(20))
    for one in together:
        assert_equal(one, snapshot(alone))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(32, PARALLEL // 32), torch.nn.ReLU(), torch.nn.Linear(PARALLEL // 32, 8)
    )


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
    return model(inputs).square().mean()


def step_in_backward(model: torch.nn.Module, name: str) -> None:
    """One optimizer a parameter; each steps and frees its gradient as soon as that is ready."""
    for param in model.parameters():
        optimizer = getattr(fastopt, name)([param], lr=0.1)

        def step(param, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        param.register_post_accumulate_grad_hook(step)


@every_optimizer
def test_optimizer_in_backward_is_the_plain_training_loop(name):
    def in_backward(_):
        model = make_model()
        step_in_backward(model, name)
        for step in range(5):
            loss_of(model, step).backward()
        assert all(param.grad is None for param in model.parameters())
        return [param.detach() for param in model.parameters()]

    plain = make_model()
    optimizer = getattr(fastopt, name)(plain.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    expected = [param.detach() for param in plain.parameters()]

    assert_equal(in_backward(None), expected)
    # make_model seeds torch's global generator, so models are made one after another.
    models = [make_model() for _ in range(3)]
    for model in models:
        step_in_backward(model, name)

    def backward(model):
        for step in range(5):
            loss_of(model, step).backward()
        return [param.detach() for param in model.parameters()]

    with ThreadPoolExecutor(len(models)) as pool:
        for trained in pool.map(backward, models):
            assert_equal(trained, expected)


def test_other_python_threads_run_while_a_step_computes():
    param = Parameter(torch.zeros(1 << 24))
    param.grad = torch.ones_like(param)
    optimizer = fastopt.AdamW([param])
    optimizer.step()  # makes the states, so that the steps watched do nothing but compute
    ticks = []
    done = threading.Event()

    def tick():
        while not done.wait(0.0005):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    inside = 0
    try:
        for _ in range(10):
            begin = time.perf_counter()
            optimizer.step()
            took = time.perf_counter() - begin
            # Taking the GIL and giving it back happens at the ends of a step, not in its middle.
            middle = begin + 0.25 * took, begin + 0.75 * took
            inside += sum(middle[0] < moment < middle[1] for moment in ticks)
    finally:
        done.set()
        ticker.join()
    assert inside > 0


@only_linux
def test_one_openmp_runtime_is_mapped():
    program = """
import re, torch, fastopt
param = torch.nn.Parameter(torch.ones(1 << 20))
param.grad = torch.ones_like(param)
torch.set_num_threads(2)
fastopt.AdamW([param]).step()
for line in open("/proc/self/maps"):
    if re.search(r"/lib[gi]?omp[^/]*$", line):
        print(line.split()[-1])
"""
    runtimes = set(run_program(program).split())
    assert len(runtimes) == 1, runtimes


# Across a fork.


FORKED = Case("AdamW", "everything", FLOAT32, "large")


def numbers_after_two_steps(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Read without torch: its own threads do not survive a fork, and operations wait for them."""
    optimizer.step()
    optimizer.step()
    return [
        tensor.detach().numpy().tolist()
        for tensors in tensors_of(optimizer)
        for tensor in tensors.values()
    ]


@only_linux
@pytest.mark.parametrize("count", [1, 2])
def test_forked_process_steps_after_its_parent_has(count, threads):
    threads(count)
    optimizer = FORKED.make_optimizer(FORKED.parameters(), fastopt)
    train(FORKED, optimizer, range(1))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: sender.send(numbers_after_two_steps(optimizer)))
    worker.start()
    try:
        assert receiver.poll(20), "the forked process hangs"
        of_the_worker = receiver.recv()
    finally:
        worker.kill()
        worker.join()
    assert of_the_worker == numbers_after_two_steps(optimizer)


FORKS = """
import hashlib, os, signal, sys, torch
import torch._dynamo  # an optimizer's first, and takes a second


def steps_after_a_fork(name):
    import fastopt  # not before: it knows whether its process has forked since
    from helpers import make

    param = torch.nn.Parameter(torch.zeros(PARALLEL * 4))
    param.grad = torch.ones_like(param)
    optimizer = make(fastopt, name, [param])
    torch.set_num_threads(1)
    optimizer.step()
    torch.set_num_threads(2)
    torch.ones(1 << 22).add_(1)

    def digest():
        optimizer.step()
        return hashlib.sha256(param.detach().numpy()).digest()

    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it if it hangs
        os.write(sender, digest())
        os._exit(0)
    os.close(sender)
    assert os.waitpid(child, 0)[1] == 0, "the forked process hangs"
    assert os.read(receiver, 32) == digest()
    print(name, flush=True)


for name in NAMES:
    process = os.fork()
    if process == 0:
        try:
            steps_after_a_fork(name)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
"""


@only_linux
def test_forked_process_steps_after_torch_alone_used_threads():
    said = run_program(f"PARALLEL, NAMES = {PARALLEL}, {IN_TORCH}\n{FORKS}")
    assert said.split() == IN_TORCH


class Inputs(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((32,), float(index))


@only_linux
@every_optimizer
def test_training_from_forked_data_loader_workers(name):
    def losses(workers):
        model = make_model()
        optimizer = getattr(fastopt, name)(model.parameters(), lr=0.1)
        history = []
        for _ in range(2):
            loader = torch.utils.data.DataLoader(
                Inputs(),
                batch_size=4,
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
                timeout=60 if workers else 0,
            )
            for inputs in loader:
                optimizer.zero_grad()
                loss = model(inputs).square().mean()
                loss.backward()
                optimizer.step()
                history.append(loss.item())
        return history

    assert losses(workers=2) == losses(workers=0)
