"""Hidden states of all calibration windows, in host memory or in a file of the run folder.

They are float32 in both places, so that where they are kept never changes a result.
"""

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pvrt.errors import RunError
from pvrt.format.folder import is_finite


class Activations:
    """[samples, length, width] float32, handed out batch by batch on the computing device."""

    def __init__(self, store: Tensor, batch: int, device: str) -> None:
        self._parts = torch.split(store, batch)
        self._device = device

    @property
    def windows(self) -> int:
        """Number of windows in all batches."""
        return sum(len(part) for part in self._parts)

    def keep(self, count: int) -> None:
        """Forget all batches but the first ones."""
        self._parts = self._parts[:count]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._parts)

    def __getitem__(self, index: int) -> Tensor:
        """One batch [batch, length, width] on the device; on a CPU it is the store itself."""
        return self._parts[index].to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (part.to(self._device) for part in self._parts)

    def __setitem__(self, index: int, value: Tensor) -> None:
        """Raises RunError for values that are not finite."""
        if not is_finite(value):
            raise RunError(
                f"hidden states of batch {index} are not finite: the model's weights are damaged, "
                "or too large for float32"
            )
        self._parts[index].copy_(value)

    def copy_(self, other: "Activations") -> None:
        """Take over all of another store's values."""
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.copy_(theirs)


def store_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes of a store [samples, length, width], wherever it is."""
    return 4 * prod(shape)


def in_memory(shape: tuple[int, int, int]) -> Tensor:
    """An uninitialised store in host memory."""
    return torch.empty(shape, dtype=torch.float32)


def on_disk(shape: tuple[int, int, int], folder: Path) -> Tensor:
    """An uninitialised store in a file that goes when the process does.

    Raises RunError when the disk has no room: found out now, not by a fault in mid-run.
    """
    file = folder / "activations"
    size = store_bytes(shape)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.posix_fallocate(descriptor, 0, size)
            store = torch.from_file(str(file), shared=True, size=prod(shape), dtype=torch.float32)
        finally:
            os.close(descriptor)
            file.unlink()
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"cannot keep {size / 1e9:.2f} GB of activations in {folder} ({error}); free some "
            "space, lower --samples, or keep them in memory with --activations memory"
        ) from error
    return store.view(shape)
