"""What the layers of one model in vLLM share: all that they know of its configuration."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.layers import Layers

_logger = logging.getLogger("vllm.pvrt")  # printed by the handlers of vLLM's logger


class DecodingNotice:
    """Says once per model what decoding its weights at load costs."""

    def __init__(self) -> None:
        self._given = False

    def give(
        self, scheme: Scheme, prefix: str, weights: Sequence[Tensor], packed: Sequence[Tensor]
    ) -> None:
        """Log a warning about the decoded weights of layer `prefix`, unless one was logged."""
        if self._given:
            return
        self._given = True
        _logger.warning(
            "no CPU kernel for %s: decoding all such weights once, to %s. %s takes %d bytes "
            "instead of %d.",
            scheme,
            weights[0].dtype,
            prefix,
            sum(tensor.nbytes for tensor in weights),
            sum(tensor.nbytes for tensor in packed),
        )


@dataclass(frozen=True)
class Context:
    """One model: what its checkpoint says of each layer, and which layers vLLM fuses.

    `fused` has the names of the source layers of a fused layer ("qkv_proj": "q_proj", ...), as the
    model itself declares them. `notice` is one object for all layers.
    """

    layers: Layers
    fused: Mapping[str, Sequence[str]]
    notice: DecodingNotice
