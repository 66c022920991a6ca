"""One table of many rows, an embedding or output head, in additive codebooks.

A vocabulary has more rows than codebooks need to be fitted, and than fit into memory with all that
a fit holds. So codebooks and codes are fitted on some rows; the others get codes and scales for
these codebooks, a part at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.scheme import Scheme
from pvrt_tune.fit.additive import AdditiveFit, LayerFit, fit_layer
from pvrt_tune.settings import FitSettings

#: Rows that codebooks are fitted on, and that are fitted at once.
ROWS = 1 << 13


def fit_table(
    weight: Tensor,
    second_moment: Tensor,
    scheme: Scheme,
    settings: FitSettings,
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerFit:
    """Quantise weight [rows, width] given H [width, width], rounded to the weight's own type.

    `progress(done, total)` counts parts. Raises ValueError when the scheme does not divide the
    weight.
    """
    rows, dtype = len(weight), weight.dtype
    parts = -(-rows // ROWS)
    chosen = torch.randperm(rows, generator=generator)[:ROWS].to(weight.device)
    start = fit_layer(weight[chosen].float(), second_moment, scheme, settings, generator)
    progress(1, parts + 1)
    codebooks = start.codebooks.to(dtype)
    codes, scales, error, power = [], [], 0.0, 0.0
    for number, part in enumerate(torch.split(weight, ROWS)):
        fit = AdditiveFit(part.float(), second_moment, scheme, settings, generator)
        fit.codebooks = codebooks.float()
        fit.assign_with_feedback()
        if settings.rounds > 1:
            fit.fit_scales()
            fit.sweep()
        found = fit.result(dtype)
        codes.append(found.layer.codes)
        scales.append(found.layer.scales)
        error += found.relative_error * fit.objective.power
        power += fit.objective.power
        progress(number + 2, parts + 1)
    layer = QuantizedLayer(torch.cat(codes), codebooks.unsqueeze(2), torch.cat(scales))
    return LayerFit(layer, error / max(power, 1e-30))
