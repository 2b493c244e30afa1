"""Every instruction set gives the same bits, and 16-bit numbers are rounded as torch rounds them.

Run as a script it prints the digests of all cases; FASTOPT_ISA says by which instruction set.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastopt
from cases import CASES, OPTIONS, contiguous
from fastopt import _C
from helpers import make, snapshot, train

# From the least: a processor that has one of them has those before it.
SETS = ["baseline", "avx2", "avx512"]
AVAILABLE = SETS[: SETS.index(_C.build["instruction_set"]) + 1]

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
in_16_bit = pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=["bfloat16", "float16"])


def digests() -> dict[str, str]:
    """Of parameters and states after training, by case; and of all that is rounded to 16 bit."""
    results = {}
    for case in CASES:
        optimizer = case.make_optimizer(case.parameters(), fastopt)
        train(case, optimizer, range(3))
        results[str(case)] = digest(*snapshot(optimizer).values())
    for dtype in SIXTEEN_BIT:
        results[f"kept {dtype}"] = digest(kept(patterns(dtype)))
        results[f"rounded {dtype}"] = digest(rounded(floats_around(dtype), dtype))
    for name in OPTIONS:
        for flush in (True, False):
            results[f"{name} flush={flush}"] = digest(*stepped_at_the_bottom(name, flush))
    return results


def stepped_at_the_bottom(name: str, flush: bool) -> list[Tensor]:
    """Parameters and states around the least normal number, where a step may flush denormals."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.tensor([2.0**k for k in range(-8, 9)])

    def tiny(exponent: int) -> Tensor:  # by operations that every processor rounds alike
        spread = powers[torch.randint(len(powers), (1 << 14,), generator=generator)]
        values = torch.randn(1 << 14, dtype=torch.float64, generator=generator)
        return (values * spread * 2.0**exponent).float()

    param = tiny(-126).requires_grad_()
    optimizer = make(fastopt, name, [param], lr=0.125)
    for exponent in (-124, -63, -140):  # a square of the second is at the bottom, too
        param.grad = tiny(exponent)
        torch.set_flush_denormal(flush)
        optimizer.step()
        torch.set_flush_denormal(False)
    return list(snapshot(optimizer).values())


def digest(*tensors: Tensor) -> str:
    """Of all bits; every NaN counts as the same one."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
        sha.update(contiguous(tensor).view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_bits_do_not_depend_on_the_instruction_set(instruction_set, digests_here):
    script = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "FASTOPT_ISA": instruction_set},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(script.stdout)
    assert printed["instruction_set"] == instruction_set
    assert printed["digests"] == digests_here


@pytest.fixture(scope="module")
def digests_here():
    return digests()


# Rounding.


def patterns(dtype: torch.dtype) -> Tensor:
    """Every 16-bit number there is."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def kept(values: Tensor) -> Tensor:
    """The values after a step that moves nothing: widened to float32, and rounded back."""
    param = values.clone().requires_grad_()
    param.grad = torch.zeros_like(values)
    fastopt.SGD([param], lr=0.0).step()
    return param.detach()


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values as a step from zero stores them."""
    param = torch.zeros(values.shape, dtype=dtype, requires_grad=True)
    param.grad_dtype = torch.float32
    param.grad = -values
    fastopt.SGD([param], lr=1.0).step()
    return param.detach()


def floats_around(dtype: torch.dtype) -> Tensor:
    """float32 where rounding to `dtype` turns: its numbers, the points halfway between neighbours,
    the floats next to either, and random bits."""
    numbers = patterns(dtype).float()
    finite = numbers[numbers.isfinite()].unique()
    turns = torch.cat([finite, (finite[1:].double() + finite[:-1]).div(2).float()])
    neighbours = [turns.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    generator = torch.Generator().manual_seed(0)
    random_bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator)
    return torch.cat([numbers, turns, *neighbours, random_bits.to(torch.int32).view(torch.float32)])


@in_16_bit
def test_every_16_bit_number_survives_a_step_that_moves_nothing(dtype):
    before = patterns(dtype)
    after = kept(before)
    is_nan = before.isnan()
    assert torch.equal(after.isnan(), is_nan)
    assert torch.equal(after.view(torch.int16)[~is_nan], before.view(torch.int16)[~is_nan])


@in_16_bit
def test_rounding_to_16_bit_is_torchs(dtype):
    values = floats_around(dtype)
    torch.testing.assert_close(
        rounded(values, dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
    )


if __name__ == "__main__":
    print(json.dumps({"instruction_set": _C.build["instruction_set"], "digests": digests()}))
