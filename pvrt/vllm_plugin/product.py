"""A weight after loading: in which layout a layer keeps it, and what multiplies by it."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from pvrt.format.aqlm import PARTS
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.context import DecodingNotice
from pvrt.vllm_plugin.weights import register_packed
from pvrt_kernels import aqlm_dequantize, aqlm_embedding, aqlm_linear
from pvrt_kernels.dispatch import registry
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_linear, aqlm_packed_rows


@dataclass(frozen=True)
class Product:
    """A weight [sum(sizes), in] that a layer holds in parameters of these names.

    One name: it is decoded. `packed`: the layout of a kernel, its tensors looked up by name at
    every call, since vLLM may move parameters (offloading, sleep mode). Else: as in the checkpoint,
    with a codebook set for each of `sizes`.
    """

    names: tuple[str, ...]
    sizes: list[int]
    packed: PackedWeight | None = None

    @classmethod
    def as_stored(cls, sizes: list[int], suffix: str = "") -> "Product":
        """A weight in the layout of the checkpoint; the names of its parameters end alike."""
        return cls(tuple(f"{part}{suffix}" for part in PARTS), sizes)

    def prepared(self, layer: Any, name: str, scheme: Scheme, notice: DecodingNotice) -> "Product":
        """The same weight in the layout that the device's kernels multiply by best.

        On a CPU without any kernel for the scheme it is decoded. Leaves the parameters that this
        product is made from to the caller (`drop`). `name` is the layer's, for the notice.
        """
        codes, codebooks, scales = parts = [getattr(layer, name).data for name in self.names]
        device, suffix = codes.device.type, self.names[0].removeprefix(PARTS[0])
        if device == "cpu" and not scheme.has_fast_kernel(device):
            weight = aqlm_dequantize(codes, codebooks, scales, self.sizes)
            notice.give(scheme, name, [weight], parts)
            setattr(layer, f"weight{suffix}", Parameter(weight, requires_grad=False))
            return Product((f"weight{suffix}",), self.sizes)
        packed = aqlm_pack(codes, codebooks, scales, codebooks.dtype, self.sizes)
        if packed is None:
            return self
        names = register_packed(layer, f"packed{suffix}", packed.tensors)
        packed.warm_up(codebooks.dtype, getattr(layer, "bias", None) is not None)
        return Product(tuple(names), self.sizes, replace(packed, tensors=()))

    def drop(self, layer: Any) -> None:
        """Remove the parameters from the layer."""
        for name in self.names:
            delattr(layer, name)

    @property
    def reads_rows(self) -> bool:
        """Whether single rows can be had without decoding all."""
        return self.packed is None or registry.packed(self.packed.kernel).rows is not None

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] -> [..., sum(sizes)] in the dtype of x."""
        # No branch on the shape of x here: torch.compile traces this once for all batch sizes.
        tensors = tuple([getattr(layer, name) for name in self.names])
        if len(tensors) == 1:
            return F.linear(x, tensors[0], bias)
        if self.packed is not None:
            return aqlm_packed_linear(x, replace(self.packed, tensors=tensors), bias)
        codes, codebooks, scales = tensors
        return aqlm_linear(x, codes, codebooks, scales, bias, self.sizes)

    def rows(self, layer: Any, tokens: Tensor) -> Tensor:
        """Rows [..., in] of tokens [...], in the model's dtype. The weight has one codebook set."""
        tensors = tuple([getattr(layer, name) for name in self.names])
        if len(tensors) == 1:
            return F.embedding(tokens, tensors[0])
        if self.packed is not None:
            packed = replace(self.packed, tensors=tensors)
            return aqlm_packed_rows(packed, tokens, layer.params_dtype)
        codes, codebooks, scales = tensors
        return aqlm_embedding(tokens, codes, codebooks[0], scales)
