"""AQLMLinear: a linear layer whose weight lives in codes, codebooks and scales."""

from typing import Any

import torch
from torch import Tensor, nn

from pvrt.modules.aqlm_layer import AQLMLayer


class AQLMLinear(AQLMLayer):
    """y = x W^T + bias with an AQLM weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.product(x)

    def to_dense(self) -> nn.Linear:
        """An ordinary linear layer with the decoded weight, on the same device."""
        with torch.no_grad():
            weight = self.dequantize()
        dense = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return dense


class AQLMConv1D(AQLMLinear):
    """The same in the place of transformers' Conv1D, whose weight lies transposed."""

    @property
    def weight(self) -> Tensor:
        """The whole weight [in, out], decoded anew."""
        return self.dequantize().T

    def to_dense(self) -> Any:
        """A Conv1D with the decoded weight, on the same device."""
        from transformers.pytorch_utils import Conv1D

        linear = super().to_dense()
        with torch.device("meta"):
            dense: nn.Module = Conv1D(self.out_features, self.in_features)
        weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
        dense.weight, dense.bias = weight, linear.bias
        return dense
