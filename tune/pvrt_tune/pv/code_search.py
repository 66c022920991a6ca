"""New codes of groups: of their present sums and those that lie nearest to the values wanted."""

from typing import NamedTuple

import torch
from torch import Tensor

from pvrt_kernels.cpu import nearest, pv_step
from pvrt_tune.fit.nearest_sums import search_codes, values_of


class Choice(NamedTuple):
    """Codes [n, M] int64, their sums [n, g], whether the codes are new [n], and by how much less
    the value wanted is away from that sum than from the next, halved [n] (0 where a draw chose the
    second).
    """

    codes: Tensor
    values: Tensor
    moves: Tensor
    bounds: Tensor


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
    if nearest.can_search(codebooks, 2):
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
