"""The one table that decides which kernel multiplies by a quantised weight.

A kernel registers with what it supports; the first match in registration order wins. A problem
that nobody supports runs on the reference, with one warning per device and scheme that says what
this costs.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pvrt_kernels import reference

LinearFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, list[int]], Tensor]
# A NamedTuple of tensors: what a packed kernel makes of a weight.
Layout = TypeVar("Layout", bound=tuple[Tensor, ...])


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


@dataclass(frozen=True)
class PackedKernel(Generic[Layout]):
    """A kernel that wants the weight in a layout of its own, made once at load (`packed.py`).

    `layout` is a NamedTuple of tensors, the codes first; every function below is given one.
    `supports` is asked at load, with tokens=1, and answers for every number of tokens.
    `pack(codes, codebooks, scales, partition_sizes)` takes the shapes of `pvrt::aqlm_linear` and
    returns all that the kernel needs, nothing of it shared with its arguments' codes, which are
    dropped. `unpack(packed, in_features)` gives (codes, codebooks, scales) back exactly.
    `linear(x, packed, bias, partition_sizes)` takes any number of tokens;
    `dequantize(packed, partition_sizes, in_features)` decodes to the codebooks' dtype (None: by
    way of `unpack`). `warm_up(packed, partition_sizes, in_features, dtype, has_bias)` compiles what
    any number of tokens of this dtype can need, so that no call does.
    """

    name: str
    supports: Callable[[Problem], bool]
    layout: Callable[..., Layout]
    pack: Callable[[Tensor, Tensor, Tensor, list[int]], Layout]
    unpack: Callable[[Layout, int], tuple[Tensor, Tensor, Tensor]]
    linear: Callable[[Tensor, Layout, Tensor | None, list[int]], Tensor]
    dequantize: Callable[[Layout, list[int], int], Tensor] | None = None
    warm_up: Callable[[Layout, list[int], int, torch.dtype, bool], None] | None = None


FEW_TOKENS = 64
REFERENCE = Kernel("reference", lambda problem: True, reference.linear)
_kernels: list[Kernel] = []
_packed_kernels: dict[str, PackedKernel[Any]] = {}
_warned: set[tuple[str, int, int, int]] = set()
# By device: what would give it kernels that it lacks; ends the warning about the reference.
remedies: dict[str, str] = {}


def register(kernel: Kernel) -> None:
    """Append a kernel to the table. Raises ValueError if the name is taken."""
    if any(other.name == kernel.name for other in [REFERENCE, *_kernels]):
        raise ValueError(f"a kernel named {kernel.name!r} is already registered")
    _kernels.append(kernel)


def unregister(name: str) -> None:
    """Remove a kernel by name."""
    _kernels[:] = [kernel for kernel in _kernels if kernel.name != name]


def register_packed(kernel: PackedKernel[Any]) -> None:
    """Append a kernel with a layout of its own. Raises ValueError if the name is taken."""
    if kernel.name in _packed_kernels:
        raise ValueError(f"a packed kernel named {kernel.name!r} is already registered")
    _packed_kernels[kernel.name] = kernel


def packed_kernel(name: str) -> PackedKernel[Any]:
    """The packed kernel of a name. Raises KeyError when there is none."""
    return _packed_kernels[name]


def select_packed(problem: Problem) -> PackedKernel[Any] | None:
    """The first packed kernel that takes a problem, in order of registration."""
    return next((k for k in _packed_kernels.values() if k.supports(problem)), None)


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
    problems = [
        Problem(device_type, dtype, num_codebooks, 1 << nbits, out_group_size, in_group_size, 1)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ]
    return any(
        select_packed(problem) is not None or any(k.supports(problem) for k in _kernels)
        for problem in problems
    )


def _warn_reference(problem: Problem) -> None:
    size = problem.codebook_size
    key = (problem.device_type, problem.num_codebooks, size, problem.in_group_size)
    if key in _warned:
        return
    _warned.add(key)
    scheme = f"{problem.num_codebooks}x{size.bit_length() - 1}g{problem.in_group_size}"
    remedy = remedies.get(problem.device_type, "")
    instead = f" Or {remedy}." if remedy else ""
    warnings.warn(
        f"no {scheme} kernel for {problem.device_type}: using the reference, which decodes the "
        "whole weight at every call (many times slower than a dense layer). "
        f"Decode once with pvrt.load(path, dense=True) where memory allows.{instead}",
        stacklevel=2,
    )
