"""What the launches of one process share: zeroed workspaces, and what is compiled already."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Shared:
    """Workspaces by device, and the kernels that were warmed up."""

    def __init__(self) -> None:
        self._workspaces: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._warm: set[tuple[object, ...]] = set()

    def workspace(self, device: torch.device, sums: int, tiles: int) -> tuple[Tensor, Tensor]:
        """Zeros of a device: float32 for partial sums, int32 for arrivals, at least so many.

        Grows outside of launches that can be captured (packing asks for what a layer can need);
        old ones are kept, since captured graphs may hold their addresses. Raises RuntimeError if it
        had to grow while a graph is captured.
        """
        owned = self._workspaces.setdefault(device, [])
        if not owned or owned[-1][0].numel() < sums or owned[-1][1].numel() < tiles:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph was captured before pvrt_kernels packed its weights"
                )
            have = [tensor.numel() for tensor in owned[-1]] if owned else [0, 0]
            owned.append(
                (
                    torch.zeros(max(sums, have[0]), dtype=torch.float32, device=device),
                    torch.zeros(max(tiles, have[1]), dtype=torch.int32, device=device),
                )
            )
        return owned[-1]

    def is_new(self, *key: object) -> bool:
        """Whether a kernel was not yet warmed up in this process; true once."""
        known = key in self._warm
        self._warm.add(key)
        return not known

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """As in a new process, until the context ends. For tests."""
        before = dict(vars(self))
        vars(self).update(vars(Shared()))
        try:
            yield
        finally:
            vars(self).update(before)


shared = Shared()
