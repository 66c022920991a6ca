"""AQLMLinear: a linear layer whose weight lives in codes, codebooks and scales."""

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
