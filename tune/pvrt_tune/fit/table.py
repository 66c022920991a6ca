"""One table of many rows, an embedding or output head, in additive codebooks.

Columns of such tables are of very different sizes (SmolLM2: 0.5 to 4.7 times the mean), and all
groups of inputs share their codebooks. So the columns are scaled to one size first: `in_scales`.
At 4 bits that is worth 2 dB of error in the metric of what enters the head (dev/LOG.md).

A vocabulary has more rows than codebooks need to be fitted, and than fit into memory with all that
a fit holds. So codebooks and codes are fitted on some rows; the others get codes and scales for
these codebooks, a part at a time.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.scheme import Scheme
from pvrt_tune.fit.additive import AdditiveFit, LayerFit, fit_layer
from pvrt_tune.settings import Recipe

#: Rows that are fitted at once, and those of them that codebooks are fitted on.
ROWS, FITTED_ON = 1 << 13, 1 << 12
#: Rounds of the codebooks' fit, at least: it costs little beside the codes of all rows.
_ROUNDS = 3


def fit_table(
    weight: Tensor,
    second_moment: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerFit:
    """Quantise weight [rows, width] given H [width, width] in a recipe's scheme, of codebooks,
    rounded to the weight's own type.

    `progress(done, total)` counts parts. Raises ValueError when the scheme does not divide the
    weight.
    """
    scheme, settings = recipe.parsed_scheme, recipe.fit
    assert isinstance(scheme, Scheme)
    rows, dtype = len(weight), weight.dtype
    in_scales = column_sizes(weight).to(dtype)
    columns = in_scales.float()
    moment = columns[:, None] * second_moment * columns
    parts = -(-rows // ROWS)
    thorough = replace(settings, rounds=max(_ROUNDS, settings.rounds))
    chosen = torch.randperm(rows, generator=generator)[:FITTED_ON].to(weight.device)
    start = fit_layer(weight[chosen].float() / columns, moment, scheme, thorough, generator)
    progress(1, parts + 1)
    codebooks = start.codebooks.to(dtype)
    # A beam of 4 takes three times as long and gives 0.2 dB (4x8g8) to 0.5 dB (5x8g8).
    greedy = replace(settings, beam=1)
    codes, scales, error, power = [], [], 0.0, 0.0
    for number, part in enumerate(torch.split(weight, ROWS)):
        fit = AdditiveFit(part.float() / columns, moment, scheme, greedy, generator)
        fit.encode(codebooks.float())
        fit.assign_with_feedback()
        fit.fit_scales()
        fit.sweep()
        found = fit.result(dtype)
        codes.append(found.layer.codes)
        scales.append(found.layer.scales)
        error += found.relative_error * fit.objective.power
        power += fit.objective.power
        progress(number + 2, parts + 1)
    layer = QuantizedLayer(
        torch.cat(codes), codebooks.unsqueeze(2), torch.cat(scales), in_scales=in_scales
    )
    return LayerFit(layer, error / max(power, 1e-30))


def column_sizes(weight: Tensor) -> Tensor:
    """Root mean square of every column of a table, all rows counting alike, float32 [width]."""
    total = torch.zeros(weight.shape[1], device=weight.device)
    for part in torch.split(weight, ROWS):
        squares = part.float().square()
        total += (squares / squares.mean(1, keepdim=True).clamp_min(1e-24)).sum(0)
    return (total / len(weight)).sqrt().clamp_min(1e-4)
