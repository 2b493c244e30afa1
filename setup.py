"""Builds fastopt._C with CMake and ninja; all metadata is in pyproject.toml."""

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

        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            sys.exit("fastopt needs a C++17 compiler to build: apt install g++ (or dnf, brew ...)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = (ROOT / self.build_temp).resolve()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)


setup(ext_modules=[Extension("fastopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
