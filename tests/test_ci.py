"""A suite that skips is green for nothing: in CI conftest.py lets only tests be skipped that need
a GPU, or another compiler (nvcc) or a package that they name where there is none."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest

def test_that_runs(): pass

@pytest.mark.skip(reason="no such library")
def test_by_mark(): pass

def test_by_call(): pytest.skip("no such file")

@pytest.fixture
def missing(): pytest.skip("no such service")

def test_by_fixture(missing): pass

@pytest.mark.parametrize("value", [])
def test_of_nothing(value): pass

@pytest.mark.gpu
def test_on_gpu(): pytest.skip("no such device")

@pytest.mark.nvcc
def test_of_machine_code(): pytest.skip("no such build")

@pytest.mark.needs("no_such_package")
def test_beside_a_library(): import no_such_package

@pytest.mark.needs("pytest")
def test_beside_one_that_is_there(): pytest.skip("no such version")

@pytest.mark.xfail
def test_of_a_bug(): raise AssertionError
"""


@pytest.fixture
def outcomes(pytester, monkeypatch):
    """Runs SUITE, and a module that skips itself whole, in an environment with CI set or not."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n  gpu\n  nvcc\n  needs")
    pytester.makepyfile(test_suite=SUITE, test_module="import pytest; pytest.importorskip('nope')")

    def run(ci, nvcc=False, workers=0):
        monkeypatch.setenv("CI", ci)
        monkeypatch.setenv("PATH", str(pytester.path))
        if nvcc:
            pytester.path.joinpath("nvcc").touch(mode=0o755)
        result = pytester.runpytest_subprocess(
            "-ra", "--continue-on-collection-errors", f"-n{workers}"
        )
        return result.parseoutcomes(), result.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_in_ci_a_skip_is_a_failure_but_for_want_of_a_gpu_nvcc_or_a_named_package(outcomes, workers):
    counts, output = outcomes(ci="true", workers=workers)
    assert counts == {"passed": 1, "xfailed": 1, "skipped": 3, "failed": 2, "errors": 4}
    for reason in ("library", "file", "service"):
        output.fnmatch_lines(
            f"*in CI only what needs a GPU, another compiler or a package*: *no such {reason}*"
        )


def test_in_ci_a_test_that_needs_nvcc_must_run_where_there_is_one(outcomes):
    counts, _ = outcomes(ci="true", nvcc=True)
    assert counts == {"passed": 1, "xfailed": 1, "skipped": 2, "failed": 3, "errors": 4}


def test_outside_ci_skips_are_skips(outcomes):
    counts, _ = outcomes(ci="")
    assert counts == {"passed": 1, "xfailed": 1, "skipped": 9}
