"""Host memory for what a device has no room for.

Of a GPU it is pinned, so that copies run at the bus's own speed. torch rounds every pinned
allocation up to a power of two. So tensors are cut out of slabs that are one.
"""

import warnings
from functools import cache
from math import prod

import torch
from torch import Tensor

_SLAB = 1 << 30
_ALIGNED = 512


class Slabs:
    """Where tensors of some bytes come to lie in slabs: each in the first that has room."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._used: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Number of the slab, and offset in it; a slab may be new."""
        size = -(-size // _ALIGNED) * _ALIGNED
        for number, used in enumerate(self._used):
            if used + size <= self.sizes[number]:
                break
        else:
            number, used = len(self.sizes), 0
            self.sizes.append(max(_SLAB, size))
            self._used.append(0)
        self._used[number] = used + size
        return number, used


@cache
def slab_bytes(sizes: tuple[int, ...]) -> int:
    """Bytes of all slabs for tensors of these sizes in bytes."""
    slabs = Slabs()
    for size in sizes:
        slabs.place(size)
    return sum(slabs.sizes)


class HostMemory:
    """Memory that stays until this object and all of its tensors are gone."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._slabs, self._memory = Slabs(), list[Tensor]()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the host."""
        size = prod(shape) * dtype.itemsize
        number, offset = self._slabs.place(size)
        if number == len(self._memory):
            self._memory.append(self._allocated(self._slabs.sizes[number]))
        return self._memory[number][offset : offset + size].view(dtype).view(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the host."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def _allocated(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            if not self._pinned:
                raise
            self._pinned = False
            warnings.warn(
                f"host memory cannot be pinned ({error}): copies to the device will be slower",
                stacklevel=2,
            )
            return torch.empty(size, dtype=torch.uint8)
