"""Builds the CPU kernels: one plain shared library that every Python and torch can load.

Everything else about the package is in pyproject.toml. Without a working C compiler the package
installs all the same, and runs on the reference in torch (`pvrt doctor` says so).
"""

import os
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

SOURCES = (
    *("products.c", "rows.c", "decoder_program.c", "nearest.c", "pv_step.c"),
    *("portable.c", "avx2.c", "avx512.c"),
)
HEADERS = ("cpu.h", "attention.h", "tiles.h", "nearest.h", "pv_step.h")
FLAGS = "-std=c11 -O3 -fno-math-errno -fvisibility=hidden -Wall -Wextra -Wno-psabi"


class BuildLibrary(build_ext):
    """A library for ctypes: no Python in its name, no module to export."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extensions(self) -> None:
        """Without the folder of this machine's Python, which is nothing to the library."""
        linker = self.compiler.linker_so
        self.compiler.linker_so = [x for x in linker if not x.startswith(("-L", "-Wl,-rpath"))]
        super().build_extensions()

    def copy_file(self, infile: str, outfile: str, *args: Any, **kwargs: Any) -> tuple[str, bool]:
        """In one step: who loads the library meanwhile finds the old one or the new one, whole."""
        fresh = f"{outfile}.new"
        super().copy_file(infile, fresh, *args, **kwargs)
        os.replace(fresh, outfile)
        return outfile, True


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM: the library depends on the machine and on nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "pvrt_kernels.cpu.libpvrt_cpu",
            [f"kernels/pvrt_kernels/cpu/csrc/{name}" for name in SOURCES],
            depends=[f"kernels/pvrt_kernels/cpu/csrc/{name}" for name in HEADERS],
            extra_compile_args=FLAGS.split(),
            libraries=["m"],
            optional=True,
        )
    ],
)
