"""AQLMLinear: a linear layer whose weight lives in codes, codebooks and scales."""

import torch
from torch import Tensor, nn

from pvrt.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_linear


class AQLMLinear(nn.Module):
    """y = x W^T + bias with an AQLM weight (arXiv 2401.06118, section 3).

    Parameters in checkpoint layout: codes [out/out_group, in/g, M] (int8 or int16, never trained),
    codebooks [M, 2^B, out_group, g], scales [out/out_group, 1, 1, 1], bias [out] or None.
    Raises ValueError when the scheme's groups do not divide the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not scheme.divides(out_features, in_features):
            raise ValueError(
                f"scheme {scheme} does not divide a linear layer of {out_features} x {in_features}"
            )
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        codes = torch.zeros(
            scheme.codes_shape(out_features, in_features), dtype=scheme.code_dtype, device=device
        )
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebooks = nn.Parameter(
            torch.zeros(scheme.codebooks_shape, dtype=dtype, device=device)
        )
        self.scales = nn.Parameter(
            torch.zeros(scheme.scales_shape(out_features), dtype=dtype, device=device)
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the dtype of the codebooks; differentiable."""
        return aqlm_dequantize(self.codes, self.codebooks, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return aqlm_linear(x, self.codes, self.codebooks, self.scales, self.bias)

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

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


def quantized_linears(model: nn.Module) -> dict[str, AQLMLinear]:
    """All quantised linear layers of a model by module name."""
    return {name: mod for name, mod in model.named_modules() if isinstance(mod, AQLMLinear)}


def decode_once(model: nn.Module) -> None:
    """Replace every AQLMLinear of a model by the dense layer that it stands for, in place."""
    for name, module in quantized_linears(model).items():
        model.set_submodule(name, module.to_dense())
