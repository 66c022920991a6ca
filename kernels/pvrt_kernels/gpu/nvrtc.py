"""Compile CUDA sources at run time.

NVRTC and NVIDIA's bindings for Python (`cuda.bindings`) come with the CUDA builds of torch. Where
they are missing, `missing` says what, and Triton's kernels take over.
"""

import logging
from functools import lru_cache
from importlib.resources import files
from typing import Any

HEADER = "common.cuh"  # of all sources
_log = logging.getLogger("pvrt")


@lru_cache(maxsize=16)
def missing(capability: tuple[int, int]) -> str | None:
    """What is missing to compile kernels for a GPU, in words, logged once; None if nothing is."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        if capability[0] * 10 + capability[1] not in checked(nvrtc.nvrtcGetSupportedArchs()):
            raise RuntimeError("this NVRTC is older than the GPU")
    except Exception as error:  # a library that is not there raises RuntimeError
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        _log.warning(
            "slower Triton kernels are used: cuda-bindings or a fitting NVRTC is missing (%s)",
            reason,
        )
        return reason
    return None


def compile_source(name: str, defined: dict[str, int], architecture: str) -> bytes:
    """The machine code of a file in csrc/ for an architecture like sm_90, with constants defined.

    Raises RuntimeError with NVRTC's words.
    """
    from cuda.bindings import nvrtc

    folder = files("pvrt_kernels.gpu") / "csrc"
    header = (folder / HEADER).read_bytes()
    arguments = ((folder / name).read_bytes(), name.encode(), 1, [header], [HEADER.encode()])
    program = checked(nvrtc.nvrtcCreateProgram(*arguments))
    options = [f"-D{constant}={value}" for constant, value in defined.items()]
    options += [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device"]  # lambdas
    done = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(done[0]):
        log = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{name} does not compile: {log.decode(errors='replace')}")
    code = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returns behind its code. Raises RuntimeError for an error."""
    code, *values = result
    if int(code):
        raise RuntimeError(f"CUDA: {code.name}")
    return values[0] if values else None
