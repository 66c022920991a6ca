"""Which groups cannot have nearer codes, without searching for them.

If all other admissible values are at least 2 r away from a group's value, none of them is nearest
to a target closer than r (triangle inequality). A search that found the two nearest values tells
such an r, which then shrinks by as much as codebooks move. Targets move by a few percent of a value
per step, so that most groups need no search for many steps. Nor can a draw round a target closer
than r to the other of its two nearest values, where it falls above the target's distance over 2 r:
that value is 2 r away at least.
"""

import torch
from torch import Tensor

# Limits are kept in bfloat16, whose 8 bits may have been rounded up.
_ROUNDED = 1 - 2**-8


class SearchBounds:
    """Bounds of all groups of one layer, unscaled: in units of codewords.

    rows, groups: of the layer (here); codebooks [M, K, g]: its codebooks now. At first no bound is
    known, so that every group may have nearer codes. Takes 2 bytes per group.
    """

    def __init__(self, rows: int, groups: int, codebooks: Tensor) -> None:
        # A group's bound is its limit less all that codebooks have moved so far.
        self.limits = torch.zeros(rows, groups, dtype=torch.bfloat16, device=codebooks.device)
        self.moved = torch.zeros(1, device=codebooks.device)
        self.codebooks = codebooks.detach().clone()

    def follow(self, codebooks: Tensor) -> None:
        """Note where the codebooks are now: no sum moved more than the farthest codewords."""
        farthest = torch.linalg.vector_norm(codebooks - self.codebooks, dim=2).amax(1)
        self.moved += farthest.sum()
        self.codebooks.copy_(codebooks)

    def exceeded(self, distance: Tensor, draws: Tensor | None = None) -> Tensor:
        """Whether targets at an unscaled distance [rows, groups] of the values may be nearer to
        others, or with draws from [0, 1) be rounded to others, as a mask of the same shape.
        """
        limits = self.limits - self.moved
        if draws is not None:
            limits = limits * (2 * draws).clamp(max=1)
        return distance > limits

    def learn(self, groups: Tensor, bound: Tensor, *, same: Tensor, known: Tensor) -> None:
        """Bounds [n] of groups by number [n], of those that are `known` [n] alone; where the value
        is the `same`, the larger holds.
        """
        limits = self.limits.view(-1)
        before, found = limits[groups], ((bound + self.moved) * _ROUNDED).bfloat16()
        found = torch.where(same, torch.maximum(found, before), found)
        limits[groups] = torch.where(known, found, before)

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name; only the limits have the layer's rows first."""
        return {"limits": self.limits, "searched_books": self.codebooks, "books_moved": self.moved}
