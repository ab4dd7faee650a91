"""Builds engine._C and the CUDA kernels with CMake; everything else about the package is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class CMakeBuild(build_ext):
    """Compiles what CMakeLists.txt lists. Without a compiler the package installs all the same and says so."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            *("cmake", "--fresh", "-S", ".", "-B", self.build_temp, "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build = ["cmake", "--build", self.build_temp]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{error}\nengine._C needs a C++17 compiler and the Python headers.") from error
        if subprocess.run([*build, "--target", "cuda_kernels", "--", "-k", "0"], check=False).returncode != 0:
            self.warn("nvcc could not compile every csrc/*.cu; CuPy compiles what is missing at first use")
        self._copy_fatbins(Path(self.build_temp), output)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self._copy_fatbins(Path(self.build_lib, "engine"), Path("engine"))

    def _copy_fatbins(self, source: Path, target: Path) -> None:
        shutil.rmtree(target / "fatbins", ignore_errors=True)
        for fatbin in sorted(source.glob("fatbins/*.fatbin")):
            self.mkpath(str(target / "fatbins"))
            shutil.copy(fatbin, target / "fatbins")


setup(ext_modules=[Extension("engine._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
