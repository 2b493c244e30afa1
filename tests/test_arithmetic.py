"""csrc/rules/arithmetic.h where no optimizer shows enough of it: how near its powers are to the
truth, beside libm's."""

import ctypes
import math
import subprocess
from decimal import Decimal, localcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
#include "arithmetic.h"
extern "C" double power(double base, double exponent) { return fastopt::power(base, exponent); }
"""


@pytest.fixture(scope="module")
def power(tmp_path_factory):
    folder = tmp_path_factory.mktemp("power")
    (folder / "power.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    include = f"-I{ROOT / 'csrc' / 'rules'}"
    library = folder / "power.so"
    subprocess.run(["c++", *flags, include, folder / "power.cpp", "-o", library], check=True)
    function = ctypes.CDLL(str(library)).power
    function.argtypes, function.restype = [ctypes.c_double] * 2, ctypes.c_double
    return function


def ulps_off(result, base, exponent):
    with localcontext() as context:
        context.prec = 60
        truth = Decimal(base) ** Decimal(exponent)
        return float(abs(Decimal(result) - truth) / Decimal(math.ulp(float(truth))))


BETAS = [0.3, 0.7043, 0.9, 0.95, 0.96, 0.98, 0.999, 0.9999, 0.99999]
COUNTS = [1, 2, 3, 5, 6, 7, 10, 31, 100, 365, 999, 4e-3, 0.044, 0.5, 2.5, 17.25]


@pytest.mark.parametrize("base", BETAS)
def test_powers_of_betas(power, base):
    for exponent in COUNTS:
        truth = base**exponent
        if truth > 1e-17:  # 1 - beta^t is 1 otherwise
            limit = 0.56 if truth > 0.8 else 1.5
            assert ulps_off(power(base, exponent), base, exponent) <= limit, exponent


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.75, 1.0, -1.5])
def test_powers_of_numbers_over_one(power, exponent):
    for k in range(40):
        base = 1 + 1e-6 * 1.9**k
        assert ulps_off(power(base, exponent), base, exponent) <= 0.7, base


@pytest.mark.parametrize(
    ("base", "exponent", "expected"),
    [
        (0.0, 0.0, 1.0),
        (0.0, 3.0, 0.0),
        (1.0, 1e9, 1.0),
        (0.9, 0.0, 1.0),
        (0.5, 10.0, 0.5**10),
        (0.9, -2.0, 1 / 0.81),
        (0.25, 0.5, 0.5),
    ],
)
def test_simple_powers(power, base, exponent, expected):
    assert power(base, exponent) == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize("exponent", [1e4, 1e18, math.inf])
def test_far_powers_are_next_to_nothing_or_enormous(power, exponent):
    assert 0 <= power(0.9, exponent) < 1e-300
    assert power(0.9, -exponent) > 1e300


@pytest.mark.parametrize(("base", "exponent"), [(math.nan, 2.0), (0.9, math.nan), (-0.5, 0.5)])
def test_not_a_number(power, base, exponent):
    assert math.isnan(power(base, exponent))
