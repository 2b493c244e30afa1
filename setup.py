"""Builds fastopt._C with CMake and ninja; all metadata is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# CMake's options that the environment sets: see CMakeLists.txt and csrc/cuda/CMakeLists.txt.
OPTIONS = (
    "FASTOPT_CUDA",
    "FASTOPT_CUDA_ARCHITECTURES",
    "FASTOPT_CUDA_ON_HOST",
    "FASTOPT_SANITIZE",
    "FASTOPT_WERROR",
)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            sys.exit("fastopt needs a C++17 compiler to build; install g++ or clang++, or set CXX")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        chosen = {name: os.environ[name] for name in OPTIONS if name in os.environ}
        # CMake remembers options and compiler in its folder: other ones get another.
        kind = {**chosen, "CXX": os.environ.get("CXX", "")}
        folder = re.sub(r"[^\w.]+", "-", "-".join(map("=".join, kind.items())))
        build = (ROOT / self.build_temp / folder).resolve()
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_INSTALL_PREFIX": target,
            # Remembered, too, but pip's isolated environment is another each time.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            **chosen,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        for command in (
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines],
            ["cmake", "--build", build, "--target", "install"],
        ):
            if subprocess.run(command).returncode:
                sys.exit("fastopt's native core did not build; what failed stands above")


setup(ext_modules=[Extension("fastopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
