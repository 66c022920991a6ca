"""The one registry that decides which kernel multiplies by a quantised weight.

A kernel is added with what it supports; the first match in registration order wins. A problem
that nobody supports runs on the reference, with one warning per device and scheme that says what
this costs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    dropped. `unpack(packed, in_features)` gives (codes, codebooks, scales) back,
    codes in the shortest type that holds them.
    `linear(x, packed, bias, partition_sizes)` takes any number of tokens;
    `dequantize(packed, partition_sizes, in_features)` decodes to the codebooks' dtype (None: by
    way of `unpack`). `warm_up(packed, partition_sizes, in_features, dtype, has_bias)` compiles what
    any number of tokens of this dtype can need, so that no call does.
    `rows(packed, numbers, partition_sizes, in_features, dtype)` decodes the rows of int64 numbers
    [n] to [n, in_features] (None: by way of `dequantize`, which decodes all).
    """

    name: str
    supports: Callable[[Problem], bool]
    layout: Callable[..., Layout]
    pack: Callable[[Tensor, Tensor, Tensor, list[int]], Layout]
    unpack: Callable[[Layout, int], tuple[Tensor, Tensor, Tensor]]
    linear: Callable[[Tensor, Layout, Tensor | None, list[int]], Tensor]
    dequantize: Callable[[Layout, list[int], int], Tensor] | None = None
    warm_up: Callable[[Layout, list[int], int, torch.dtype, bool], None] | None = None
    rows: Callable[[Layout, Tensor, list[int], int, torch.dtype], Tensor] | None = None


FEW_TOKENS = 64
REFERENCE = Kernel("reference", lambda problem: True, reference.linear)


class Registry:
    """The kernels of this process, in the order in which they are asked."""

    def __init__(self) -> None:
        self._kernels: list[Kernel] = []
        self._packed: dict[str, PackedKernel[Any]] = {}
        self._remedies: dict[str, str] = {}
        self._warned: set[tuple[str, int, int, int]] = set()

    def add(self, *kernels: Kernel | PackedKernel[Any]) -> None:
        """Append kernels. Raises ValueError if a name is taken among those of its kind."""
        for kernel in kernels:
            packs = isinstance(kernel, PackedKernel)
            others = self._packed if packs else {k.name for k in (REFERENCE, *self._kernels)}
            if kernel.name in others:
                kind = "packed kernel" if packs else "kernel"
                raise ValueError(f"a {kind} named {kernel.name!r} is already registered")
            if isinstance(kernel, PackedKernel):
                self._packed[kernel.name] = kernel
            else:
                self._kernels.append(kernel)

    def suggest(self, device_type: str, remedy: str) -> None:
        """Let the warning about the reference end with what would give a device its kernels."""
        self._remedies[device_type] = remedy

    @contextmanager
    def using(self, *kernels: Kernel | PackedKernel[Any]) -> Iterator[None]:
        """These kernels alone, and no warning given yet, until the context ends. For tests.

        Weights packed outside of the context have no kernel in it, and the reverse.
        """
        before = dict(vars(self))
        vars(self).update(vars(Registry()))
        try:
            self.add(*kernels)
            yield
        finally:
            vars(self).update(before)

    def packed(self, name: str) -> PackedKernel[Any]:
        """The packed kernel of a name. Raises KeyError when there is none."""
        return self._packed[name]

    def select_packed(self, problem: Problem) -> PackedKernel[Any] | None:
        """The first packed kernel that takes a problem, in the order of registration."""
        return next((k for k in self._packed.values() if k.supports(problem)), None)

    def select(self, problem: Problem) -> Kernel:
        """The kernel for a problem; the reference (with one warning) when there is none."""
        for kernel in self._kernels:
            if kernel.supports(problem):
                return kernel
        if problem.tokens <= FEW_TOKENS:  # with more, decoding the weight once is a fair price
            self._warn_reference(problem)
        return REFERENCE

    def has_kernel(self, problem: Problem) -> bool:
        """Whether any kernel but the reference takes a problem."""
        packed = self.select_packed(problem) is not None
        return packed or any(kernel.supports(problem) for kernel in self._kernels)

    def _warn_reference(self, problem: Problem) -> None:
        size = problem.codebook_size
        key = (problem.device_type, problem.num_codebooks, size, problem.in_group_size)
        if key in self._warned:
            return
        self._warned.add(key)
        scheme = f"{problem.num_codebooks}x{size.bit_length() - 1}g{problem.in_group_size}"
        remedy = self._remedies.get(problem.device_type, "")
        instead = f" Or {remedy}." if remedy else ""
        warnings.warn(
            f"no {scheme} kernel for {problem.device_type}: using the reference, which decodes the "
            "whole weight at every call (many times slower than a dense layer). "
            f"Decode once with pvrt.load(path, dense=True) where memory allows.{instead}",
            stacklevel=2,
        )


registry = Registry()


def has_fast_kernel(
    device_type: str, num_codebooks: int, nbits: int, in_group_size: int, out_group_size: int = 1
) -> bool:
    """Whether single-token decoding of a scheme on a device has a kernel of its own.

    Backends ask this once, at load: without one it is better to decode the weights once than at
    every call.
    """
    return any(
        registry.has_kernel(
            Problem(device_type, dtype, num_codebooks, 1 << nbits, out_group_size, in_group_size, 1)
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    )
