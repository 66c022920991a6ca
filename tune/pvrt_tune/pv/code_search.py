"""The codes of a group: of which codewords, one of every codebook, the sum is nearest to a value.

On CPUs in C (pvrt_kernels/cpu/pv_step.py), elsewhere in torch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_kernels.cpu import pv_step
from pvrt_tune.fit.code_search import lowest, search_bytes

# Partial sums kept from codebook to codebook.
_BEAM = 8
# Values whose candidates are held at once.
_AT_ONCE = 1 << 16


class Choice(NamedTuple):
    """Codes [n, M] int64, their sums [n, g], whether the codes are new [n], and by how much less
    the value wanted is away from that sum than from the next, halved [n] (0 where a draw chose the
    second).
    """

    codes: Tensor
    values: Tensor
    moves: Tensor
    bounds: Tensor


def values_of(codebooks: Tensor, codes: Tensor) -> Tensor:
    """codebooks [M, K, g], codes [..., M] int64 -> [..., g]."""
    total = codebooks[0][codes[..., 0]]
    for m in range(1, len(codebooks)):
        total += codebooks[m][codes[..., m]]
    return total


def search_codes(wanted: Tensor, codebooks: Tensor, count: int = 1) -> Tensor:
    """Codes whose codewords, one of every codebook, add up to nearly the values wanted.

    wanted [n, g], codebooks [M, K, g] -> [n, count, M] int64, nearest first; fewer than `count`
    where there are fewer sums. A beam search: after every codebook the partial sums count that come
    nearest with the means of the later codebooks. One codebook is searched exactly. Of two with 8
    bits, fitted to a language model's weights, the nearest of all 65,536 sums is found for 99 % of
    the values; exchanging one code at a time finds one in six of the sums that lie nearer than the
    present one (values a fifth of the root mean square away from it).
    """
    if pv_step.can_search(codebooks, count):
        return pv_step.nearest_sums(wanted, codebooks, _BEAM, count)
    return torch.cat(
        [_beam_search(part, codebooks, count) for part in torch.split(wanted, _AT_ONCE)]
    )


def _beam_search(wanted: Tensor, codebooks: Tensor, count: int) -> Tensor:
    n, g = wanted.shape
    left = wanted.unsqueeze(1)  # [n, candidates, g]
    codes = wanted.new_zeros(n, 1, 0, dtype=torch.int64)
    for m, codebook in enumerate(codebooks):
        last = m == len(codebooks) - 1
        later = codebooks[m + 1 :].mean(1).sum(0)
        aims = (left - later).reshape(-1, g)
        codewords = lowest(aims, -2 * codebook, codebook.square().sum(1), count if last else _BEAM)
        candidates = left.shape[1] * codewords.shape[1]
        left = (left.reshape(-1, 1, g) - codebook[codewords]).view(n, candidates, g)
        before = codes.repeat_interleave(codewords.shape[1], 1)
        codes = torch.cat([before, codewords.reshape(n, candidates, 1)], 2)
        kept = min(count if last else _BEAM, candidates)
        if not last and kept == candidates:  # all stay, in whatever order
            continue
        error = (left - later).square().sum(2)
        best = error.topk(kept, largest=False).indices.unsqueeze(2)
        left = left.gather(1, best.expand(-1, -1, g))
        codes = codes.gather(1, best.expand(-1, -1, m + 1))
    return codes


def new_codes(
    wanted: Tensor, present: Tensor, codebooks: Tensor, draws: Tensor | None = None
) -> Choice:
    """The codes nearest to the values wanted [n, g], of those present [n, M] int64 and the two
    nearest sums that a search finds: never a sum further away than the present one, which among
    equals stays.

    With draws [n] from [0, 1) the second of them is taken with the chance that makes rounding
    unbiased along the line between the two.
    """
    found = search_codes(wanted, codebooks, 2)
    if pv_step.can_search(codebooks, 2):
        return Choice(*pv_step.choose(wanted, present, found, codebooks, draws))
    index = torch.cat([present.unsqueeze(1), found], 1)  # [n, candidates, M]
    sums = values_of(codebooks, index)
    error = (wanted.unsqueeze(1) - sums).square().sum(2)
    # Where the present codes are among those found, they count once.
    error[:, 1:].masked_fill_((found == present.unsqueeze(1)).all(2), torch.inf)
    error, order = error.sort(dim=1, stable=True)
    row = torch.arange(len(order), device=order.device)
    root = error[:, :2].sqrt()
    bounds = (root[:, 1] - root[:, 0]) / 2 if root.shape[1] > 1 else root[:, 0] + torch.inf
    pick = order[:, 0]
    if draws is not None:
        pick = _draw(wanted, sums, order, draws)
        bounds = torch.where(pick == order[:, 0], bounds, 0)
    codes = index[row, pick]
    return Choice(codes, sums[row, pick], (codes != present).any(1), bounds)


def _draw(wanted: Tensor, sums: Tensor, order: Tensor, draws: Tensor) -> Tensor:
    """One of the two nearest candidates [n], unbiased along the line between them.

    wanted [n, g], sums [n, candidates, g], order [n, candidates] by distance, draws [n] from
    [0, 1).
    """
    row = torch.arange(len(order), device=order.device)
    first, second = sums[row, order[:, 0]], sums[row, order[:, 1]]
    between = second - first
    along = ((wanted - first) * between).sum(1)
    chance = along / between.square().sum(1).clamp_min(1e-30)
    return torch.where(draws < chance, order[:, 1], order[:, 0])


def peak_bytes(groups: int, scheme: Scheme, device: str) -> int:
    """Peak of `new_codes` for so many groups, beyond its arguments."""
    size, g = scheme.codebook_size, scheme.in_group_size
    if device == "cpu" and size <= 256:  # in C: products of all codewords with each other
        return 4 * (scheme.num_codebooks * size) ** 2
    at_once = min(groups, _AT_ONCE) * (1 if scheme.num_codebooks == 1 else _BEAM)
    # What is left of values, codewords, and their differences, for two candidates each.
    return search_bytes((at_once, g, size, 1), 0, device) + 4 * 2 * 3 * g * at_once
