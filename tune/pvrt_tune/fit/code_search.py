"""Nearest-codeword search in codebooks: exact for small ones, in two levels for large ones.

The score of a codeword c is linear in a feature vector of the query: <feature, row(c)> + offset(c).
Both plain distance and k-means with a weight per coordinate have that form, so
scoring is one product and a minimum over its rows, tile by tile: the [queries, codewords] matrix is
never held. The code runs on the device of its arguments; CPUs find one codeword among few in C.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvrt_kernels.cpu import nearest

#: Rows [..., d] and offsets [...] that score codewords [..., g].
ScoreRows = Callable[[Tensor], tuple[Tensor, Tensor]]

# Scores of one tile: a cache's worth on a CPU, enough to fill a GPU.
_CPU_TILE, _GPU_TILE = 1 << 18, 1 << 26
# Queries per small product of the second level.
_CHUNK = 32
# Rows of scores from which on a GPU finds several minima faster one by one.
_MANY_ROWS = 1 << 14


def squared_distance(codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Scores |u|^2 - 2 <u, x> of codewords u; the feature is x."""
    return -2 * codewords, codewords.square().sum(-1)


def weighted(codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Scores sum_i w_i (u_i^2 - 2 u_i x_i); the feature is [w * x, w], of length 2g."""
    rows = torch.cat([-2 * codewords, codewords.square()], -1)
    return rows, codewords.new_zeros(codewords.shape[:-1])


def lowest(features: Tensor, rows: Tensor, offset: Tensor, count: int = 1) -> Tensor:
    """The `count` codewords of the lowest scores of every query, in no order for more than one.

    features [n, d], rows [K, d], offset [K] -> [n, count] int64.
    """
    if count == 1 and nearest.can_score(features, rows):
        return nearest.lowest_scores(features, rows, offset).unsqueeze(1)
    columns = rows.T.contiguous()
    count = min(count, len(rows))
    found = []
    for part in torch.split(features, max(64, _tile(features) // len(rows))):
        found.append(_fewest(torch.addmm(offset, part, columns), count))
    return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True)
class Cells:
    """A codebook cut into cells of equal size that lie close together.

    members: [cells, size] int64, the codewords of every cell.
    """

    members: Tensor

    def lowest(
        self, features: Tensor, codewords: Tensor, score: ScoreRows, effort: tuple[int, int]
    ) -> Tensor:
        """Best codewords of the best cells, for queries [n, d] -> [n, count] int64.

        effort: (probes, count). The mean of every cell is scored first, then all codewords of the
        `probes` best cells: with 8 of 256 cells of 256 codewords 1/28 of all scores. Of each cell
        its best codeword counts, so `count` codewords come from as many cells.
        """
        inside = codewords[self.members]
        rows, offset = score(inside)
        coarse, coarse_offset = score(inside.mean(1))
        columns, coarse_columns = rows.mT.contiguous(), coarse.T.contiguous()
        probes = min(effort[0], len(coarse))
        found = []
        for part in torch.split(features, max(64, _tile(features) // len(coarse))):
            cells = _smallest(torch.addmm(coarse_offset, part, coarse_columns), probes)
            scores, codeword = _inside(part, cells, columns, offset)
            best = scores.topk(min(effort[1], probes), largest=False, sorted=False).indices
            found.append(self.members[cells.gather(1, best), codeword.gather(1, best)])
        return torch.cat(found)


def _inside(
    features: Tensor, cells: Tensor, columns: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Lowest score and its codeword inside each chosen cell, [n, probes] both.

    features [n, d], cells [n, probes], columns [cells, d, size], offset [cells, size].
    (query, cell) pairs are sorted by cell and cut into chunks of one cell each, the last of a cell
    filled up, so that one batched product scores many chunks.
    """
    device = features.device
    flat = cells.reshape(-1)
    cell, order = flat.sort(stable=True)
    first_pair = torch.searchsorted(cell, torch.arange(len(columns) + 1, device=device))
    chunks = (first_pair.diff() + _CHUNK - 1) // _CHUNK
    first_slot = (chunks.cumsum(0) - chunks) * _CHUNK
    slots = first_slot[cell] + torch.arange(len(flat), device=device) - first_pair[cell]
    owners = torch.repeat_interleave(torch.arange(len(columns), device=device), chunks)
    query = flat.new_zeros(len(owners) * _CHUNK)
    query[slots] = order // cells.shape[1]
    scores = features.new_empty(len(query))
    codeword = flat.new_empty(len(query))
    size = columns.shape[2]
    step = max(1, _tile(features) // (_CHUNK * size))
    for start in range(0, len(owners), step):
        part = owners[start : start + step]
        span = slice(start * _CHUNK, (start + len(part)) * _CHUNK)
        block = features[query[span]].view(len(part), _CHUNK, -1)
        # Without a name, so that it goes before the next one comes; they are the largest of all.
        scores[span], codeword[span] = row_minima(
            torch.baddbmm(offset[part].unsqueeze(1), block, columns[part]).view(-1, size)
        )
    place = torch.empty_like(slots)
    place[order] = slots
    return scores[place].view(cells.shape), codeword[place].view(cells.shape)


def search_bytes(sizes: tuple[int, int, int, int], probes: int, device: str) -> int:
    """Peak of one search beyond its arguments, on "cpu" or a GPU.

    sizes: queries, length of a feature vector, codewords, and cells that they are cut into (1: no).
    """
    queries, width, codewords, cells = sizes
    tile = _CPU_TILE if device == "cpu" else _GPU_TILE
    # Codewords, what their rows are made of, and rows and columns.
    rows = 4 * 4 * codewords * width
    # Scores of a tile, and the codeword found with its number in the row for every query.
    if cells == 1:
        return rows + 4 * min(queries * codewords, max(64 * codewords, tile)) + 20 * queries
    part = min(queries, max(64, tile // cells))
    pairs = part * min(probes, cells)
    # Chunks of pairs are scored with copies of their features and of their cells' codewords.
    size = codewords // cells
    scored = min((pairs + _CHUNK * min(cells, pairs)) * size, tile)
    chunks = 4 * scored * (1 + width / size + width / _CHUNK)
    # Scores of cells, gone before those of codewords come; fourteen int64 of every pair, counted.
    return int(max(4 * part * cells, chunks) + 112 * pairs + rows) + 8 * queries


def halve(points: Tensor, cells: int) -> Tensor:
    """Cut points [n, g] into `cells` (a power of two dividing n) groups of equal size.

    Every group is halved at its median along its principal direction, again and again.
    Returns the points' numbers, [cells, n / cells].
    """
    members = torch.arange(len(points), device=points.device).unsqueeze(0)
    while len(members) < cells:
        inside = points[members]
        inside = inside - inside.mean(1, keepdim=True)
        direction = torch.linalg.eigh(inside.mT @ inside).eigenvectors[..., -1:]
        order = (inside @ direction).squeeze(2).argsort(dim=1, stable=True)
        members = members.gather(1, order).reshape(2 * len(members), -1)
    return members


def _tile(like: Tensor) -> int:
    return _CPU_TILE if like.device.type == "cpu" else _GPU_TILE


def _fewest(scores: Tensor, count: int) -> Tensor:
    """Columns of the `count` lowest scores in every row of [n, K], which it overwrites."""
    if scores.device.type != "cpu" or count > 8 or (count > 1 and scores.shape[1] > 256):
        return _smallest(scores, count)
    # A few vectorised minima in cache are cheaper than one scalar selection.
    found = [row_minima(scores)[1]]
    while len(found) < count:
        scores.scatter_(1, found[-1].unsqueeze(1), torch.inf)
        found.append((scores.amin(1).view(torch.int32) & 255).long())
    return torch.stack(found, 1)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """The same, with nothing counting as equal that is not."""
    many = scores.device.type != "cpu" and len(scores) >= _MANY_ROWS
    if count > 8 or (count > 1 and not many):
        return scores.topk(count, largest=False, sorted=False).indices
    # A GPU's selection takes a block of threads some ten microseconds for every row; a minimum
    # takes no longer than reading the row.
    found = [scores.min(1).indices]
    while len(found) < count:
        scores.scatter_(1, found[-1].unsqueeze(1), torch.inf)
        found.append(scores.min(1).indices)
    return torch.stack(found, 1)


def row_minima(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and its column in every row of float32 scores [n, K], which it overwrites.

    torch's min with indices is scalar code on CPU, its amin is vectorised. So up to 256 columns
    put their number into the low 8 bits of the mantissa and come out with the minimum: twice as
    fast with the product included. Scores closer than 2^-15 of their size count as equal.
    """
    columns = scores.shape[1]
    if columns > 256 or scores.device.type != "cpu":
        found = scores.min(1)
        return found.values, found.indices
    bits = scores.view(torch.int32)
    bits.bitwise_and_(-256).bitwise_or_(torch.arange(columns, dtype=torch.int32))
    lowest = scores.amin(1)
    return lowest, (lowest.view(torch.int32) & 255).long()
