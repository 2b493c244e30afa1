"""How near ours is to torch and to the mathematics, in every case of the table."""

import inspect

import pytest
import torch

import fastopt
from cases import BFLOAT16, CASES_OF_TORCH, FLOAT16, FLOAT32, OPTIONS, UNIFORM, Case
from helpers import LAST_DIGITS, assert_agrees_with_torch, tensors_of, train
from lion import Lion
from oracle import SAMPLING, Oracle, rms_ulp, wide

DOUBLE = (torch.float64, torch.complex128)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DOUBLE_CASES = [case for case in CASES_OF_TORCH if case.dtypes.param in DOUBLE]

STEPS = 4


def of(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def forloop(case, params):
    """torch's for-loop, which on the CPU has no capturable: there it changes no number."""
    optimizer = case.make_optimizer(params, fused=False, foreach=False)
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = False
    return optimizer


def as_torch_would(case, params):
    """torch's fused step; its for-loop, without what that refuses on the CPU, where it has none."""
    if "fused" in inspect.signature(getattr(torch.optim, case.optimizer, Lion)).parameters:
        return case.make_optimizer(params, fused=True)
    return forloop(case, params)


def has_forloop(case):
    """torch's for-loop wants one dtype throughout, and computes Tensor options in theirs."""
    return case.dtypes in UNIFORM and not case.options.startswith("tensor")


@of([case for case in DOUBLE_CASES if has_forloop(case)])
def test_float64_matches_forloop(case):
    optimizer = case.make_optimizer(case.parameters(), fastopt)
    reference = forloop(case, case.parameters())
    train(case, optimizer, range(STEPS))
    train(case, reference, range(STEPS))
    assert_agrees_with_torch(optimizer, reference)


def assert_follows_oracle(case, optimizer, params):
    oracle = Oracle(optimizer)
    for step in range(STEPS):
        case.set_gradients(params, step)
        oracle.step()
        optimizer.step()
    for real, truth in zip(tensors_of(optimizer), oracle.values, strict=True):
        assert real.keys() == truth.keys()
        for name in real:
            torch.testing.assert_close(wide(real[name]), truth[name], **LAST_DIGITS)


@of([case for case in DOUBLE_CASES if has_forloop(case)])
def test_oracle_follows_torchs_forloop(case):
    params = case.parameters()
    assert_follows_oracle(case, forloop(case, params), params)


@of(DOUBLE_CASES)
def test_float64_follows_oracle(case):
    params = case.parameters()
    assert_follows_oracle(case, case.make_optimizer(params, fastopt), params)


@of([case for case in CASES_OF_TORCH if case not in DOUBLE_CASES])
def test_every_step_is_computed_in_float32_and_rounded_once(case):
    """From the same state, what is stored is the exact value rounded: half an ulp in 16 bit, where
    float32 arithmetic adds next to nothing; in float32 the roundings on the way add up."""
    params = case.parameters()
    optimizer = case.make_optimizer(params, fastopt)
    for step in range(STEPS):
        case.set_gradients(params, step)
        oracle = Oracle(optimizer)
        oracle.step()
        optimizer.step()
        dtypes = {name: tensor.dtype for name, tensor in tensors_of(optimizer)[0].items()}
        for name, errors in oracle.ulp_errors().items():
            assert errors.max() < (0.51 if dtypes[name] in SIXTEEN_BIT else 64), name


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (optimizer, options)
        for optimizer in OPTIONS
        for options in OPTIONS[optimizer]
        # Of the others neither option reaches the arithmetic by another way: 5 s each.
        if optimizer in ("Adam", "AdamW", "SGD") or options not in ("capturable", "tensor_lr")
    ],
)
def test_float32_is_as_near_to_the_truth_as_torchs_fused_step(optimizer, options):
    """Or as torch's for-loop, where torch has none fused."""
    case = Case(optimizer, options, FLOAT32, "large")

    ours = rms_ulp(case, lambda params: case.make_optimizer(params, fastopt))
    torchs = rms_ulp(case, lambda params: as_torch_would(case, params))
    worse = {
        name: f"{ours[name]:.4f} ulp, torch {torchs[name]:.4f}"
        for name in ours
        if ours[name] > SAMPLING * torchs[name]
    }
    assert not worse


SAME_BITS = [
    Case(optimizer, options, dtypes, "large")
    for optimizer in ("Adam", "AdamW", "Adagrad", "SGD")
    for options in OPTIONS[optimizer]
    for dtypes in (FLOAT32, BFLOAT16, FLOAT16)
    # In 16 bit torch's SGD is wrong on the CPU (B10), its Adagrad rounds the sum before the root.
    if optimizer in ("Adam", "AdamW") or dtypes == FLOAT32
]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch's kernels use no FMA here"
)
@of(SAME_BITS)
def test_same_bits_as_torchs_fused_step(case):
    """But for the last elements of a tensor, which torch computes one by one in another way."""
    ours = case.make_optimizer(case.parameters(), fastopt)
    torchs = case.make_optimizer(case.parameters(), fused=True)
    train(case, ours, range(20))
    train(case, torchs, range(20))
    for mine, theirs in zip(tensors_of(ours), tensors_of(torchs), strict=True):
        assert mine.pop("step", None) == theirs.pop("step", None)
        for name, value in mine.items():
            vectors = value.numel() // 32 * 32
            assert torch.equal(value[:vectors], theirs[name][:vectors]), name


@pytest.mark.parametrize("steps_taken", [1, 10, 1_000, 100_000, 2**24 - 2])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.99999), (0.0, 0.0)], ids=str)
def test_bias_correction_at_any_step_count(steps_taken, betas):
    """The step count is a float32, as torch's: exact to 2**24."""

    def update(module):
        param = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = module.AdamW([param], betas=betas)
        for count in (0, steps_taken):
            if count:
                optimizer.state[param]["step"].fill_(count)
            param.data.zero_()  # so that the parameter becomes the update
            param.grad = torch.tensor([-1.0, -0.1, 0.2, 2.0], dtype=torch.float64)
            optimizer.step()
        assert optimizer.state[param]["step"] == steps_taken + 1
        return param.detach()

    torch.testing.assert_close(update(fastopt), update(torch.optim), **LAST_DIGITS)
