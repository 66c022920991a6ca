"""The one table that decides which kernel multiplies by a quantised weight.

A kernel registers with what it supports; the first match in registration order wins. A problem
that nobody supports runs on the reference, with one warning per device and scheme that says what
this costs.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvrt_kernels import reference

LinearFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, list[int]], Tensor]


@dataclass(frozen=True)
class Problem:
    """What dispatch may look at: shapes and types only, so that a choice never syncs a device.

    `tokens` is the number of rows of x after flattening its leading dimensions.
    """

    device_type: str
    dtype: torch.dtype
    num_codebooks: int
    codebook_size: int
    out_group_size: int
    in_group_size: int
    tokens: int


@dataclass(frozen=True)
class Kernel:
    """One implementation of `pvrt::aqlm_linear` and the problems that it takes."""

    name: str
    supports: Callable[[Problem], bool]
    linear: LinearFn


FEW_TOKENS = 64
REFERENCE = Kernel("reference", lambda problem: True, reference.linear)
_kernels: list[Kernel] = []
_warned: set[tuple[str, int, int, int]] = set()


def register(kernel: Kernel) -> None:
    """Append a kernel to the table. Raises ValueError if the name is taken."""
    if any(other.name == kernel.name for other in [REFERENCE, *_kernels]):
        raise ValueError(f"a kernel named {kernel.name!r} is already registered")
    _kernels.append(kernel)


def unregister(name: str) -> None:
    """Remove a kernel by name."""
    _kernels[:] = [kernel for kernel in _kernels if kernel.name != name]


def select(problem: Problem) -> Kernel:
    """The kernel for a problem; the reference (with one warning) when there is none."""
    for kernel in _kernels:
        if kernel.supports(problem):
            return kernel
    if problem.tokens <= FEW_TOKENS:  # with more, decoding the weight once is a fair price
        _warn_reference(problem)
    return REFERENCE


def has_fast_kernel(
    device_type: str, num_codebooks: int, nbits: int, in_group_size: int, out_group_size: int = 1
) -> bool:
    """Whether single-token decoding of a scheme on a device has a kernel of its own.

    Backends ask this once, at load: without one it is better to decode the weights once than at
    every call.
    """
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return any(
        kernel.supports(
            Problem(device_type, dtype, num_codebooks, 1 << nbits, out_group_size, in_group_size, 1)
        )
        for kernel in _kernels
        for dtype in dtypes
    )


def _warn_reference(problem: Problem) -> None:
    size = problem.codebook_size
    key = (problem.device_type, problem.num_codebooks, size, problem.in_group_size)
    if key in _warned:
        return
    _warned.add(key)
    scheme = f"{problem.num_codebooks}x{size.bit_length() - 1}g{problem.in_group_size}"
    warnings.warn(
        f"no {scheme} kernel for {problem.device_type}: using the reference, which decodes the "
        "whole weight at every call (many times slower than a dense layer). "
        "Decode once with pvrt.load(path, dense=True) where memory allows.",
        stacklevel=2,
    )
