"""What is built, from which files, and what a user reads where it cannot be built or loaded."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import fastopt
from fastopt import _C
from test_vectors import AVX2, one_by_one

ROOT = Path(__file__).parents[1]
MEGABYTE = 10**6


def run(*command: str | Path, **options) -> str:
    """What it prints; an exit code other than 0 is an error that shows all of it."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# The built extension.


def test_extension_links_neither_torch_nor_cuda():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", _C.__file__))
    assert "libgomp.so.1" in needed  # as in torch's wheels: one runtime serves both
    of_the_system = {"libstdc++", "libgcc_s", "libgomp", "libc", "libm", "libpthread", "ld-linux"}
    assert {re.split(r"-x86|-aarch|\.so", library)[0] for library in needed} <= of_the_system


def test_extension_exports_no_function_but_its_own():
    exported = run("nm", "--dynamic", "--defined-only", _C.__file__)
    assert re.findall(r" [TWi] (\w+)", exported) == ["PyInit__C"]


def test_extension_is_small():
    """As a wheel, of which it is nearly all, has it: compressed. Loops that differ in their formats
    alone, as this code's do, compress to a part of their size, which nobody downloads."""
    with_cuda = not _C.build["cuda"].startswith("none")
    compressed = zlib.compress(Path(_C.__file__).read_bytes())
    assert len(compressed) < (8 if with_cuda else 2) * MEGABYTE


@pytest.mark.nvcc
def test_cuda_kernels_are_built_where_nvcc_is_found():
    assert re.fullmatch(r"1\d\.\d+ for [\d ]+ and later", _C.build["cuda"])


# Packages.


def test_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == fastopt.__version__


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory):
    """A folder of what setup.py needs, and no torch; skips where no package index is at hand."""
    folder = tmp_path_factory.mktemp("build_tools")
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", folder]
    tools = ["setuptools>=77", "pybind11>=3.0", "cmake", "ninja"]
    done = subprocess.run([*install, *tools], capture_output=True)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.decode()}")
    return folder


@pytest.fixture(scope="module")
def sources():
    """The files of the working tree that git knows or would take."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def copied(sources, folder: Path) -> Path:
    for name in sources:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def checkout(sources, tmp_path):
    return copied(sources, tmp_path / "checkout")


@pytest.fixture
def built_checkout(sources, tmp_path_factory, worker_id):
    """One for all that build it, in whichever process: what takes minutes to compile stays."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "built"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            copied(sources, folder)
        yield folder


@pytest.fixture
def venv(tmp_path):
    """Of a user who has torch, and nothing of ours: the environment in which its programs run."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Of the one that runs this, only the packages: a .pth file in there, as of -e, is not read.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "FASTOPT_CUDA": "OFF"}


@pytest.mark.network
@pytest.mark.timeout(900)
def test_wheel_builds_in_isolation_and_works_where_nothing_can_be_built(
    built_checkout, build_tools, venv, tmp_path
):
    """pip's isolated environment has what pyproject.toml names and nothing else, the user's no
    program but Python."""
    python = [sys.executable, "-m"]
    run(*python, "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, built_checkout, env=venv)
    (built,) = tmp_path.glob("fastopt-*.whl")
    repair = ["auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", tmp_path / "dist", built]
    run(*python, *repair, env={"PATH": f"{Path(sys.executable).parent}"})
    (wheel,) = (tmp_path / "dist").iterdir()
    run(*python, "twine", "check", "--strict", wheel)
    assert "-manylinux_2_" in wheel.name
    assert wheel.stat().st_size < 2 * MEGABYTE
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_file).decode())
    folders = {name.split("/")[0] for name in names}
    assert folders == {"fastopt", metadata_file.split("/")[0]}  # and so no library beside it
    assert {"fastopt/py.typed", "fastopt/_C.pyi", "fastopt/__main__.py"} <= set(names)
    assert any(re.fullmatch(r"fastopt/_C\..*\.so", name) for name in names)
    assert any(name.endswith("/LICENSE") for name in names)
    assert metadata["Version"] == fastopt.__version__
    always = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert always == ["torch>=2.10"]

    # The tests' own installation, which the venv sees too, is not it.
    install = ["pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", wheel]
    run("python", "-m", *install, env=venv)
    bare = {"PATH": f"{tmp_path / 'venv' / 'bin'}", "OMP_WAIT_POLICY": "passive"}
    elsewhere = {"cwd": tmp_path, "env": bare}
    says = "from fastopt import _C; print(_C.build['cuda'], _C.why_not_cuda(), sep=chr(10))"
    reason = "FASTOPT_CUDA=OFF asked for none"
    python = tmp_path / "venv" / "bin" / "python"
    assert run(python, "-c", says, **elsewhere).splitlines() == [
        f"none: {reason}",
        f"this build has no CUDA kernels: {reason}",
    ]
    assert run(python, "-m", "fastopt", **elsewhere).endswith("healthy\n")
    parity = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "AdamW-default or SGD-momentum"]
    said = run(python, *parity, ROOT / "tests" / "test_parity.py", **elsewhere)
    assert re.search(r"^\d+ passed", said, re.MULTILINE)

    # A function the compiler leaves for the linker to share, such as one of the standard library,
    # might be taken from the AVX-512 copy and run where there is no AVX-512.
    copies = list(built_checkout.rglob("apply.cpp.o"))
    assert copies
    for copy in copies:
        assert not re.findall(r" [WVu] .*", run("nm", "-C", "--defined-only", copy))
        if "cpu_avx2.dir" in copy.parts:
            assert one_by_one("objdump", copy, AVX2) == []


@pytest.mark.network
def test_sdist_holds_all_that_a_build_needs(checkout, build_tools, sources, tmp_path):
    program = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(build_tools)}
    run(sys.executable, "-c", program, tmp_path, cwd=checkout, env=environment)
    (sdist,) = tmp_path.glob("fastopt-*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    wanted |= {name for name in sources if name.startswith(("csrc/", "fastopt/"))}
    assert wanted <= packed


@pytest.fixture
def said_instead_of_building(checkout, build_tools, tmp_path):
    """What a user reads, in one line, where a build cannot be; of a shell with these variables."""

    def build(**environment):
        tools = f"{build_tools}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext"],
            cwd=checkout,
            env={"PATH": tools, "PYTHONPATH": str(build_tools), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())  # CMake breaks lines

    return build


@pytest.mark.network
def test_missing_compiler_is_said_in_one_sentence(said_instead_of_building, tmp_path):
    said = said_instead_of_building(PATH=str(tmp_path), CXX=str(tmp_path / "c++"))
    assert "fastopt needs a C++17 compiler to build; install g++ or clang++, or set CXX" in said


@pytest.mark.network
def test_missing_tools_are_said_in_one_sentence(said_instead_of_building, tmp_path):
    (tmp_path / "g++").touch(mode=0o755)
    said = said_instead_of_building(PATH=str(tmp_path))
    assert "fastopt's build needs cmake, ninja; pip install cmake ninja" in said


@pytest.mark.network
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXXFLAGS": "-O2 -ffast-math"}, "take -ffast-math out of CXXFLAGS"),
        ({"CMAKE_ARGS": "-DPython_INCLUDE_DIR=/none"}, "comes without its headers (Python.h)"),
        (
            {"FASTOPT_CUDA_TUNE": "THREADS=512;WARPS=3"},
            "FASTOPT_CUDA_TUNE has no WARPS=3; csrc/cuda/tuning.h says what it has",
        ),
    ],
    ids=["bits would be others", "no headers", "no such choice"],
)
def test_what_keeps_from_building_is_said(environment, why, said_instead_of_building):
    assert why in said_instead_of_building(**environment)


@pytest.mark.network
@pytest.mark.timeout(900)
def test_readme_installs_a_clone_that_works_in_its_own_folder(built_checkout, venv):
    _, _, install = (ROOT / "README.md").read_text().partition("\n## Install\n")
    commands = install.split("```sh\n")[1].split("```")[0]
    assert "pip install" in commands
    said = run("sh", "-ec", commands, cwd=built_checkout, env=venv)
    assert said.endswith("healthy\n")
    where = run(
        "python", "-c", "import fastopt; print(fastopt.__file__)", cwd=built_checkout, env=venv
    )
    assert where == f"{built_checkout}/fastopt/__init__.py\n"


OLD_NVCC = "echo release 12.3, V12.3.107"
NVCC_FOR_ANOTHER_COMPILER = """
case $1 in
  --version) echo release 13.0, V13.0.88 ;;
  --list-gpu-code) echo sm_80 ;;
  *) echo '#error -- unsupported GNU version!' >&2; exit 1 ;;
esac
"""


@pytest.mark.network
@pytest.mark.parametrize(
    ("nvcc", "why"),
    [
        (OLD_NVCC, "is of CUDA 12.3, the oldest that will do is 12.4"),
        (NVCC_FOR_ANOTHER_COMPILER, "#error -- unsupported GNU version!"),
    ],
    ids=["old", "for another compiler"],
)
def test_cuda_that_is_demanded_and_cannot_be_built_is_an_error(
    nvcc, why, said_instead_of_building, tmp_path
):
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{nvcc}")
    program.chmod(0o755)
    said = said_instead_of_building(CUDA_HOME=str(tmp_path), FASTOPT_CUDA="ON")
    assert "FASTOPT_CUDA=ON, but there is no way to build it" in said
    assert why in said


@pytest.mark.network
def test_core_builds_without_openmp(checkout, build_tools, tmp_path):
    """On one thread, and without a compiler's warning."""
    says = "import pybind11; print(pybind11.get_cmake_dir())"
    environment = {**os.environ, "PYTHONPATH": str(build_tools)}
    pybind11 = run(sys.executable, "-c", says, env=environment).strip()
    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        "CMAKE_DISABLE_FIND_PACKAGE_OpenMP": "ON",
        "FASTOPT_CUDA": "OFF",
        "FASTOPT_WERROR": "ON",
    }
    cmake = build_tools / "bin" / "cmake"
    build = tmp_path / "build"
    defines = [f"-D{name}={value}" for name, value in options.items()]
    said = run(cmake, "-S", checkout, "-B", build, "-G", "Ninja", *defines, env=environment)
    assert "fastopt without OpenMP" in said
    objects = [
        "CMakeFiles/cpu_baseline.dir/csrc/cpu/norm.cpp.o",
        "CMakeFiles/_C.dir/csrc/cpu/dispatch.cpp.o",
    ]
    run(cmake, "--build", build, "--target", *objects, env=environment)
    for name in objects:
        assert "GOMP" not in run("nm", build / name)


# Loading.


def test_torch_that_is_too_old_is_said_in_one_sentence():
    program = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
try:
    import fastopt
except ImportError as error:
    print(error)
"""
    said = run(sys.executable, "-c", program)
    assert said == "fastopt needs torch >= 2.10; pip install -U torch\n"


def test_import_loads_nothing_but_fastopt_beyond_torch():
    """Above all not torch._dynamo, sympy and triton, which take as long as torch itself."""
    program = """
import sys
import torch
loaded_by_torch = set(sys.modules)
import fastopt
print(*set(sys.modules) - loaded_by_torch)
"""
    packages = {module.split(".")[0] for module in run(sys.executable, "-c", program).split()}
    assert "fastopt" in packages
    assert packages - sys.stdlib_module_names == {"fastopt"}


@pytest.mark.parametrize("command", [["-c", "import fastopt"], ["-m", "fastopt"]])
def test_clone_that_hides_what_is_installed_says_what_to_do(command, checkout):
    done = subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {checkout}/fastopt has no native core for this Python; if it is part of a "
        "clone, run `pip install -e .` there, or start Python elsewhere to import what is installed"
    )
