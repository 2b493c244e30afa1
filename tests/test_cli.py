"""`python -m fastopt`: what it reports, and by its exit code whether all is well."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastopt
import fastopt.__main__ as cli
from cases import IN_TORCH


def run(*arguments: str) -> str:
    """What it prints, as a user's shell runs it; an exit code other than 0 is an error."""
    command = [sys.executable, "-m", "fastopt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_report_names_every_backend_and_is_healthy():
    lines = run().splitlines()
    assert lines[-1] == "healthy"
    for backend, reason in fastopt.backends().items():
        assert f"backend {backend}: {reason or 'usable'}" in lines
    tests = [line for line in lines if line.startswith("self-test")]
    assert sum(" on cpu:" in line for line in tests) == 2 * len(IN_TORCH)
    assert all(line.endswith(": agrees") for line in tests)


def test_json_report_has_the_same_facts():
    report = json.loads(run("--json"))
    assert report["healthy"] is True
    assert report["torch"] == torch.__version__
    assert report["backends"] == fastopt.backends()
    assert report["threads"] > 0
    assert len(report["openmp"]) == 1
    for name in IN_TORCH:
        for dtype in ("float32", "float64"):
            assert report["self_test"][f"{name} {dtype} on cpu"] is None
    described = {"fastopt", "python", "built", "cuda", "instruction_set"}
    assert all(isinstance(report[key], str) for key in described)


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs main() in this process, with the one OpenMP runtime that a fresh process has."""
    monkeypatch.setattr(sys, "argv", ["fastopt"])
    monkeypatch.setattr(cli, "openmp_runtimes", lambda: ["/lib/libgomp.so.1"])

    def run_main():
        return cli.main(), capsys.readouterr().out

    return run_main


def test_healthy_is_exit_code_0(main):
    code, printed = main()
    assert code == 0
    assert "NOT healthy" not in printed


def test_build_without_openmp_says_that_it_has_one_thread(main, monkeypatch):
    monkeypatch.setitem(cli._C.build, "openmp", False)
    code, printed = main()
    assert code == 0
    assert f"built with {cli._C.build['compiler']} without OpenMP" in printed
    assert f"runs {cli._C.build['instruction_set']} code on 1 threads" in printed


def test_optimizer_that_disagrees_with_torch_is_exit_code_1(main, monkeypatch):
    def of_twice_the_rate(params, lr, **options):
        return torch.optim.AdamW(params, lr=2 * lr, **options)

    monkeypatch.setattr(fastopt, "AdamW", of_twice_the_rate)
    code, printed = main()
    assert code == 1
    assert "self-test AdamW float32 on cpu: differs from torch.optim by" in printed
    assert "self-test Adam float32 on cpu: agrees" in printed
    assert printed.endswith("NOT healthy: see above\n")


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0", True),
        ("/v/torch/lib/libgomp-24e2ab19.so.1", True),
        ("/v/scikit_learn.libs/libgomp-a34b3233.so.1.0.0", True),
        ("/usr/lib/llvm-14/lib/libomp.so.5", True),
        ("/opt/conda/lib/libomp.so (deleted)", True),
        ("/v/faiss.libs/libomp-0d6ed8f9.so.5", True),
        ("/opt/intel/lib/libiomp5.so", True),
        ("/opt/nvidia/hpc_sdk/compilers/lib/libnvomp.so", True),
        ("/usr/lib/x86_64-linux-gnu/libnvidia-ptxjitcompiler.so.580.95.05", False),
        ("/usr/lib/x86_64-linux-gnu/libXcomposite.so.1.0.0", False),
        ("/usr/lib/x86_64-linux-gnu/libcomposefs.so.1", False),
        ("/usr/lib/x86_64-linux-gnu/libcomps.so.0", False),
        ("/usr/lib/x86_64-linux-gnu/libompl.so.16", False),
        ("/usr/lib/llvm-14/lib/libomptarget.so.14", False),
        ("/usr/lib/llvm-14/lib/libompd.so", False),
        ("/usr/lib/gcc/x86_64-linux-gnu/12/libgomp-plugin-nvptx.so.1", False),
        ("/opt/intel/lib/libiompstubs5.so", False),
        ("/opt/mkl/lib/libmkl_gnu_thread.so.2", False),
        ("/v/torch/_C/compiled.cpython-311-x86_64-linux-gnu.so", False),
        ("/home/libgomp.so.1/libz.so.1", False),
    ],
)
def test_openmp_runtimes_are_known_by_name(path, is_one, tmp_path):
    assert cli.is_openmp_runtime(path) is is_one

    before = cli.openmp_runtimes()
    library = tmp_path / Path(path).name
    library.write_bytes(b"ELF")
    with library.open() as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        mapped = cli.openmp_runtimes()
    assert set(mapped) - set(before) == ({str(library)} if is_one else set())


def test_second_openmp_runtime_is_exit_code_1(main, monkeypatch):
    monkeypatch.setattr(cli, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libomp.so"])
    code, printed = main()
    assert code == 1
    assert "more than one OpenMP runtime" in printed
