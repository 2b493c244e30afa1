"""Builds fastopt._C with CMake and ninja; all metadata is in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# CMake's options that the environment sets: see CMakeLists.txt and csrc/cuda/CMakeLists.txt.
OPTIONS = (
    "FASTOPT_CUDA",
    "FASTOPT_CUDA_ARCHITECTURES",
    "FASTOPT_CUDA_ON_HOST",
    "FASTOPT_CUDA_TUNE",
    "FASTOPT_SANITIZE",
    "FASTOPT_WERROR",
)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            sys.exit("fastopt needs a C++17 compiler to build; install g++ or clang++, or set CXX")
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        missing += [] if find_spec("pybind11") else ["pybind11"]
        if missing:  # with --no-build-isolation
            sys.exit(f"fastopt's build needs {', '.join(missing)}; pip install {' '.join(missing)}")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        chosen = {name: os.environ[name] for name in OPTIONS if name in os.environ}
        # What is compiled depends on these, and but for module.cpp and its like not on the Python:
        # the CUDA kernels, which take minutes, are made once for all. Where they are tuned, or the
        # host's, nothing else is made anew.
        kind = {**chosen, "CXX": os.environ.get("CXX", "")}
        for of_kernels in ("FASTOPT_CUDA_TUNE", "FASTOPT_CUDA_ON_HOST"):
            kind.pop(of_kernels, None)
        folder = re.sub(r"[^\w.]+", "-", "-".join(map("=".join, kind.items())))
        build = ROOT / "build" / f"{self.plat_name}-{folder}"
        # Objects stay. What CMake has found does not: Python, pip's isolated environment or the
        # place of this clone may be another.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_INSTALL_PREFIX": target,
            **chosen,
        }
        defines = shlex.split(os.environ.get("CMAKE_ARGS", ""))  # as packagers set it
        defines += [f"-D{name}={value}" for name, value in options.items()]
        for command in (
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines],
            ["cmake", "--build", build, "--target", "install"],
        ):
            if subprocess.run(command).returncode:
                sys.exit("fastopt's native core did not build; what failed stands above")


setup(ext_modules=[Extension("fastopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
