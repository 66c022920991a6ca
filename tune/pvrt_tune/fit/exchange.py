"""Codes of groups, exchanged one codebook after the other (arXiv 2401.06118, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pvrt_tune.fit.code_search import Cells, lowest, squared_distance
from pvrt_tune.fit.nearest_sums import values_of

#: Of every joint choice in a beam, how many continuations compete for the next beam.
CONTINUATIONS = 2


@dataclass(frozen=True)
class Exchange:
    """A search from given codes on, that keeps the `beam` best joint choices.

    probes, cells: how large codebooks are searched (see `Cells`); None for small ones.
    """

    beam: int
    probes: int
    cells: Sequence[Cells | None]

    def search(self, codes: Tensor, wanted: Tensor, books: Tensor, order: Sequence[int]) -> Tensor:
        """Codes [out, 1, M] of sums near to values [out, g], from codes [out, 1, M] on.

        Visits the books [M, K, g] once, in a given order.
        """
        value = values_of(books, codes)
        for m in order:
            left = (wanted.unsqueeze(1) - value + books[m][codes[..., m]]).flatten(0, 1)
            count = 1 if m == order[-1] else self.beam
            # From several choices on, the best continuations of each are enough.
            each = count if codes.shape[1] == 1 else min(count, CONTINUATIONS)
            found = self._nearest(m, books[m], left, each)
            codes = codes.repeat_interleave(found.shape[1], 1)
            codes[..., m] = found.reshape(len(wanted), -1)
            codes, value = nearest_choices(codes, wanted, books, count)
        return codes

    def _nearest(self, m: int, book: Tensor, wanted: Tensor, count: int) -> Tensor:
        """The `count` codewords of book m nearest to every value, [n, count]."""
        cells = self.cells[m]
        if cells is not None:
            return cells.lowest(wanted, book, squared_distance, (self.probes, count))
        return lowest(wanted, *squared_distance(book), count)


def nearest_choices(
    choices: Tensor, wanted: Tensor, books: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` joint choices of [out, n, M] nearest to values [out, g], and their sums."""
    value = values_of(books, choices)
    if choices.shape[1] <= count:
        return choices, value
    loss = (value - wanted.unsqueeze(1)).square().sum(2)
    best = loss.topk(count, 1, largest=False).indices.unsqueeze(2)
    kept = choices.gather(1, best.expand(-1, -1, choices.shape[2]))
    return kept, value.gather(1, best.expand(-1, -1, value.shape[2]))
