"""Builds fastopt._C with CMake and ninja; all metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            sys.exit("fastopt needs a C++17 compiler to build; install g++ or clang++, or set CXX")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        sanitize = os.environ.get("FASTOPT_SANITIZE", "OFF")
        build = (ROOT / self.build_temp / f"sanitize-{sanitize}").resolve()
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_INSTALL_PREFIX": target,
            "FASTOPT_SANITIZE": sanitize,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        for command in (
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines],
            ["cmake", "--build", build, "--target", "install"],
        ):
            if subprocess.run(command).returncode:
                sys.exit("fastopt's native core did not build; what failed stands above")


setup(ext_modules=[Extension("fastopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
