"""Noise with the shape of a quantiser's error.

A fit with error feedback leaves E = R D^-1 U, where R is the rounding error of every weight given
those before it, U the factor of H^-1 = U^T U and D its diagonal: what a weight misses, later ones
make up for (fit/objective.py). Rounding errors of one row have the size of the row. So noise is
drawn as R, carried through D^-1 U and scaled to a relative error tr(E H E^T) / tr(W H W^T).
Plain noise would put most of its loss where inputs are large, where the quantiser puts little.
"""

import torch
from torch import Tensor

from pvrt_tune.fit.objective import Objective


def shaped(weight: Tensor, moment: Tensor, damping: float, generator: torch.Generator) -> Tensor:
    """E [out, in] of relative error 1 for a weight [out, in] and H [in, in], all float32.

    damping: as for a fit; the generator is the CPU's.
    """
    objective = Objective(weight, moment)
    order = _order(moment)
    factor = objective.feedback(damping, order)
    error = torch.empty_like(objective.weight)
    error[:, order] = rows_like(weight, generator) @ (factor / factor.diagonal().unsqueeze(1))
    return error.div_(objective.relative_error(weight - error) ** 0.5)


def coarsest(weight: Tensor, moment: Tensor, damping: float) -> float:
    """Relative error of E before it is scaled: of rounding errors as large as the weights.

    What a scheme leaves is about a fixed share of it, whichever rows are looked at.
    """
    objective = Objective(weight, moment)
    conditional = objective.feedback(damping, _order(moment)).diagonal().square().reciprocal()
    return float(weight.square().mean(1).sum() * conditional.sum()) / objective.power


def _order(moment: Tensor) -> Tensor:
    """Inputs as a fit takes them: those of high variance first."""
    return moment.diagonal().argsort(descending=True, stable=True)


def rows_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Independent noise [out, in], every row with the root mean square of the weight's."""
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return noise * weight.square().mean(1, keepdim=True).sqrt()
