"""A weight that lives in codes, codebooks and scales, and packing it for a kernel."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.format.aqlm import PARTS
from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_linear
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_linear


class _Shared:
    """Outputs that wait for the other layers of one input, which must not have changed since.

    They go when they are taken, each once, or when the input goes; it is not kept alive. Where
    torch.compile traces, only the identity of the input is asked: it can trace neither versions
    nor weak references, and no decoder writes to an input between two of its projections.
    """

    def __init__(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self._outputs = outputs
        self._input: Callable[[], Tensor | None] = lambda: x
        self._version: int | None = -1  # that no tensor has: a trace's is of no use outside it
        self._copy: list[Tensor] = []
        if torch.compiler.is_compiling():
            return
        self._version = _version(x)
        # Nothing else tells of a tensor of inference mode that was written to. A comparison would
        # make a GPU wait: there, layers of one input must be called without a write between them.
        if self._version is None and x.device.type == "cpu":
            self._copy = [x.clone()]
        self._input = weakref.ref(x, _clearing(outputs, self._copy))

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The output of a layer for x; None when it has to be computed."""
        if self._input() is not x:
            return None
        if torch.compiler.is_compiling():
            return self._outputs.pop(index, None)
        if self._version != _version(x):
            return None
        if self._copy and not torch.equal(self._copy[0], x):
            return None
        return self._outputs.pop(index, None)

    def __bool__(self) -> bool:
        """Whether any layer has yet to come."""
        return len(self._outputs) > 0


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count."""
    return None if x.is_inference() else x._version


def _clearing(*containers: dict[int, Tensor] | list[Tensor]) -> Callable[[object], None]:
    """A callback that empties them."""

    def clear(_: object) -> None:
        for container in containers:
            container.clear()

    return clear


class PackedLayers:
    """One packed weight for layers that take the same input, and who of them is which.

    dtype is that of their activations, float_types are those of codebooks and scales.

    The first layer called with an input computes them all; the others take their part of that.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        float_types: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.weight, self.bias, self.dtype, self.float_types = weight, bias, dtype, float_types
        self._shared: _Shared | None = None

    def forward(self, index: int, x: Tensor) -> Tensor:
        """Output number `index` for x [..., in]."""
        taken = None if self._shared is None else self._shared.take(index, x)
        if taken is None:
            y = aqlm_packed_linear(x, self.weight, self.bias)
            sizes = self.weight.partition_sizes
            if len(sizes) == 1:
                return y
            outputs = dict(enumerate(torch.split(y, sizes, -1)))
            taken = outputs.pop(index)
            self._shared = _Shared(x, outputs)
        elif not self._shared:  # nothing is held once the last has come
            self._shared = None
        return taken

    def stored(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, codebooks, scales) of one layer as in a checkpoint."""
        codes, codebooks, scales = self.weight.unpack()
        out_group = codebooks.shape[3]
        rows = [size // out_group for size in self.weight.partition_sizes]
        own = slice(sum(rows[:index]), sum(rows[: index + 1]))
        return codes[own], codebooks[index], scales[own]


class AQLMLayer(nn.Module):
    """An AQLM weight [out, in] (arXiv 2401.06118, section 3) and a bias; what it does is up to
    others.

    Parameters in checkpoint layout: codes [out/out_group, in/g, M] (int8 or int16, never trained),
    codebooks [M, 2^B, out_group, g], scales [out/out_group, 1, 1, 1], bias [out] or None, in_scales
    [in] or None, which multiply the weight's columns. The first three are the codes' own weight.
    Raises ValueError when the scheme's groups do not divide the weight.
    """

    #: Whether anything multiplies by the weight, which is what packing is for.
    multiplies = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        in_scales: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not scheme.divides(out_features, in_features):
            raise ValueError(
                f"scheme {scheme} does not divide a weight of {out_features} x {in_features}"
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
        self.in_scales: nn.Parameter | None
        if in_scales:
            self.in_scales = nn.Parameter(torch.ones(in_features, dtype=dtype, device=device))
        else:
            self.register_parameter("in_scales", None)
        # Set by `pack`; the three parameters are gone then.
        self.packed: PackedLayers | None = None
        self._index = 0

    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, codebooks, scales) in checkpoint layout, packed or not."""
        if self.packed is not None:
            return self.packed.stored(self._index)
        return self.codes, self.codebooks, self.scales

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.codes.device if self.packed is None else self.packed.weight.tensors[0].device

    @property
    def float_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The types of codebooks and scales, packed or not."""
        if self.packed is not None:
            return self.packed.float_types
        return self.codebooks.dtype, self.scales.dtype

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the dtype of the codebooks; differentiable unless packed."""
        weight = aqlm_dequantize(*self.stored())
        return weight if self.in_scales is None else weight * self.in_scales

    @property
    def weight(self) -> Tensor:
        """The whole weight, decoded anew: for code that asks a layer for its dtype, say."""
        return self.dequantize()

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight, plus the bias: [..., out]."""
        if self.in_scales is not None:
            x = x * self.in_scales.to(x.dtype)
        if self.packed is not None:
            return self.packed.forward(self._index, x)
        return aqlm_linear(x, self.codes, self.codebooks, self.scales, self.bias)

    def unpack(self) -> None:
        """Back to the three parameters, to be trained, say; nothing happens unless packed."""
        if self.packed is not None:
            for name, tensor in zip(PARTS, self.stored(), strict=True):
                setattr(self, name, nn.Parameter(tensor.clone(), requires_grad=False))
            self.packed = None

    def to_dense(self) -> nn.Module:
        """An ordinary module with the decoded weight, on the same device."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> "AQLMLayer":
        """`.to()` and its kin act on the checkpoint's layout; on a GPU a layer packs itself.

        Only layers that are not trained: there is no gradient for packed codebooks.
        """
        packed = self.packed is not None
        self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        arrived = packs_on_arrival(self.codes.device) and not self.codebooks.requires_grad
        if packed or (arrived and self.multiplies):
            pack([self], self.codebooks.dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, tensor in zip(PARTS, self.stored(), strict=True):
                destination[prefix + name] = tensor

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


def packs_on_arrival(device: torch.device) -> bool:
    """Whether layers that come to a device are packed at once, with nobody asking."""
    return device.type == "cuda"


def pack(layers: Sequence[AQLMLayer], dtype: torch.dtype) -> PackedLayers | None:
    """Pack layers of one input for their device's kernel, in one weight; None if it has none.

    Inference only: the parameters codes, codebooks and scales are dropped (saving still finds
    them). dtype is that of the activations to come.
    """
    first = layers[0]
    codes, codebooks, scales = (
        [getattr(layer, name).detach() for layer in layers] for name in PARTS
    )
    weight = aqlm_pack(
        torch.cat(codes) if len(codes) > 1 else codes[0],
        torch.stack(codebooks),
        torch.cat(scales),
        dtype,
        [layer.out_features for layer in layers],
    )
    if weight is None:
        return None
    bias = None
    if first.bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers if layer.bias is not None])
    packed = PackedLayers(weight, bias, dtype, first.float_types)
    for index, layer in enumerate(layers):
        for name in PARTS:
            setattr(layer, name, None)
        layer.packed, layer._index = packed, index
    weight.warm_up(dtype, bias is not None)
    return packed
