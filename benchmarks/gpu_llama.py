"""One decoding step of a Llama-shaped model with random weights, packed or dense, for gpu.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.tools.bench_kernels import random_packed
from pvrt_kernels.gpu.choose import Shape
from pvrt_kernels.packed import aqlm_packed_linear


@dataclass(frozen=True)
class Llama:
    """Shapes of a model: widths in features, heads of 128 (or `head`) features."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head: int = 128

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the fused linear layers of a block: qkv, o, gate and up, down."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head
        width = self.heads * self.head
        return [
            *((qkv, self.hidden), (self.hidden, width)),
            *((2 * self.inner, self.hidden), (self.hidden, self.inner)),
        ]


LLAMA2_7B = Llama("Llama-2-7B shape", 4096, 11008, 32, 32, 32, 32000)
LLAMA3_8B = Llama("Llama-3-8B shape", 4096, 14336, 32, 32, 8, 128256)
TINY = Llama("tiny shape", 64, 128, 2, 2, 1, 96, head=32)

Linear = Callable[[Tensor], Tensor]


class DecodeStep:
    """Batch 1, `context` tokens in the KV cache; `bytes` is all that a step must read.

    linears, head: codebooks, codewords and group of the blocks' layers and of the output head; None
    for dense weights.
    """

    def __init__(
        self,
        llama: Llama,
        linears: tuple[int, int, int] | None,
        head: tuple[int, int, int] | None,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.llama, self.bytes = llama, 0
        self._dtype, self._device = dtype, device
        self.blocks = [
            [self._linear(linears, *shape) for shape in llama.linears] for _ in range(llama.layers)
        ]
        self.head = self._linear(head, llama.vocabulary, llama.hidden)
        self.norm = torch.ones(llama.hidden, dtype=dtype, device=device)
        kv = (2, llama.layers, 1, llama.kv_heads, context, llama.head)
        self.cache = torch.randn(kv, device=device).to(dtype)
        self.bytes += self.cache.nbytes
        self.angles = torch.randn(llama.head // 2, device=device)
        self.hidden = torch.randn(1, llama.hidden, device=device).to(dtype)
        self.fuse(torch.compile if device.type == "cuda" else lambda function: function)

    def fuse(self, compiler: Any) -> None:
        """What is left between the products, fused as vLLM's own kernels or Inductor fuse it."""
        self._glue = [compiler(function) for function in (_add_norm, _rotate, _gate)]

    def _linear(self, scheme: tuple[int, int, int] | None, out: int, inputs: int) -> Linear:
        if scheme is None:
            weight = torch.randn(out, inputs, dtype=self._dtype, device=self._device)
            self.bytes += weight.nbytes
            return lambda x: F.linear(x, weight)
        packed = random_packed(Shape(*scheme, out, inputs), self._dtype, self._device)
        packed.warm_up(self._dtype, False)
        self.bytes += sum(tensor.nbytes for tensor in packed.tensors)
        return lambda x: aqlm_packed_linear(x, packed)

    def __call__(self) -> Tensor:
        """Logits [1, vocabulary] of one token."""
        llama, (add_norm, rotate, gate) = self.llama, self._glue
        residual, update = self.hidden, torch.zeros_like(self.hidden)
        widths = [llama.heads * llama.head, *2 * [llama.kv_heads * llama.head]]
        for layer, (qkv, o, gate_up, down) in enumerate(self.blocks):
            residual, x = add_norm(residual, update, self.norm)
            q, k, v = torch.split(qkv(x), widths, dim=-1)
            keys, values = self.cache[0, layer], self.cache[1, layer]
            keys[:, :, -1] = rotate(k.view(1, llama.kv_heads, llama.head), self.angles)
            values[:, :, -1] = v.view(1, llama.kv_heads, llama.head)
            q = rotate(q.view(1, llama.heads, llama.head), self.angles)
            seen = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)
            residual, x = add_norm(residual, o(seen.reshape(1, -1)), self.norm)
            update = down(gate(gate_up(x)))
        _, x = add_norm(residual, update, self.norm)
        return self.head(x)


def _add_norm(residual: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = residual + update
    return residual, F.rms_norm(residual, weight.shape, weight)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
