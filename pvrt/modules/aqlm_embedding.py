"""Embeddings in AQLM codes, and an output head that multiplies by the same weight."""

from typing import Any

import torch
from torch import Tensor, nn

from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_layer import AQLMLayer
from pvrt_kernels import aqlm_embedding
from pvrt_kernels.packed import aqlm_packed_rows


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a number, as Gemma's are."""

    def __init__(self, rows: int, width: int, scale: float, **factory: Any) -> None:
        super().__init__(rows, width, **factory)
        self.scalar_embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> [..., width]."""
        rows = super().forward(input)
        return rows * torch.tensor(self.scalar_embed_scale, dtype=rows.dtype)


class AQLMEmbedding(AQLMLayer):
    """Rows of an AQLM weight [vocabulary, width], looked up by token, times `scale`."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        scheme: Scheme,
        scale: float = 1.0,
        in_scales: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if scheme.out_group_size != 1:
            raise ValueError(f"scheme {scheme} spans output rows, which an embedding cannot")
        super().__init__(width, vocabulary, scheme, in_scales=in_scales, dtype=dtype, device=device)
        self.scale = scale
        self.multiplies = False  # `TiedHead` does

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> [..., width] in the dtype of the codebooks."""
        if self.packed is None:
            rows = aqlm_embedding(tokens, self.codes, self.codebooks, self.scales)
        else:
            rows = aqlm_packed_rows(self.packed.weight, tokens, self.packed.dtype)
        if self.in_scales is not None:
            rows = rows * self.in_scales.to(rows.dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def to_dense(self) -> nn.Embedding:
        """An ordinary embedding with the decoded weight, on the same device."""
        shape = self.out_features, self.in_features
        dense = nn.Embedding(*shape, device="meta")
        if self.scale != 1:
            dense = ScaledEmbedding(*shape, self.scale, device="meta")
        with torch.no_grad():
            dense.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        return dense


class TiedHead(nn.Module):
    """An output head that multiplies by an embedding's weight, which it holds no copy of."""

    def __init__(self, embedding: AQLMEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # Not a submodule: a weight has one name in a checkpoint.
        object.__setattr__(self, "embedding", embedding)
        embedding.multiplies = True
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    embedding: AQLMEmbedding

    @property
    def weight(self) -> Tensor:
        """The whole weight, decoded anew."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., vocabulary], computed where the embedding is."""
        # Of a model that is spread over devices the head, having no weight, is called on the last.
        y = self.embedding.product(x.to(self.embedding.device)).to(x.device)
        return y if self.bias is None else y + self.bias

    def to_dense(self, embedding: nn.Embedding) -> nn.Linear:
        """A linear layer on the weight of the dense embedding."""
        dense = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        dense.weight, dense.bias = embedding.weight, self.bias  # type: ignore[assignment]
        return dense


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by; None for one that does something else."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    for name in ("scalar_embed_scale", "embed_scale"):
        value = getattr(embedding, name, None)
        if isinstance(value, int | float):
            return float(value)
    return None
