"""Programs for the CPU: one call of the C library turns a token into the next one's logits.

A program is a list of operations over fp32 vectors that the caller owns (cpu_program.c). It knows
no models; who builds one decides what it computes. Tensors are kept alive by the program, and must
not be resized or replaced while it lives.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from pvrt_kernels import cpu
from pvrt_kernels.packed import PackedWeight

_KINDS = {"embed": 0, "tiled": 1, "plain": 2, "dense": 3, "attend": 4, "gate": 5, "screen": 6}
_ROUNDED_AT_ONCE = 4096  # rows
_LONG, _VOID = ctypes.c_int64, ctypes.c_void_p


class Operation(ctypes.Structure):
    """`operation` of cpu_program.c."""

    _fields_ = [
        *((name, _LONG) for name in ("kind", "inputs", "out", "dtype", "accumulate")),
        *((name, _VOID) for name in ("x", "y", "norm", "weight", "bias")),
        ("epsilon", ctypes.c_double),
        *((name, _VOID) for name in ("keys", "values", "cosine", "sine", "query_norm", "key_norm")),
        *((name, _LONG) for name in ("heads", "kv_heads", "dim", "rotary", "capacity", "window")),
        ("scale", ctypes.c_double),
        *((name, _VOID) for name in ("bytes", "bounds")),
    ]


class Program:
    """Operations in order. Vectors are fp32 and contiguous; so are norms and biases."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._kept: list[Any] = []
        self._arrays: list[Any] = []
        self._tails: list[Operation] = []
        self._room = torch.empty(0)
        self._longest = 0
        self.bytes_read = 0  # of weights, in one run with argmax_only

    def _add(self, kind: str, **fields: Any) -> None:
        values = {}
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr()
            values[name] = value
        self._operations.append(Operation(kind=_KINDS[kind], **values))
        self._arrays = []

    def embed(self, weight: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """y = scale * row `token` of weight [vocabulary, n] (fp32, fp16 or bf16)."""
        self._add(
            "embed", weight=weight, y=y, out=y.numel(), dtype=cpu.TYPES[weight.dtype], scale=scale
        )

    def linear(
        self,
        x: Tensor,
        y: Tensor,
        weight: PackedWeight | Tensor,
        bias: Tensor | None = None,
        *,
        norm: Tensor | None = None,
        epsilon: float = 0.0,
        accumulate: bool = False,
    ) -> None:
        """y = W norm(x) + bias, or y += that; a dense weight is [out, in] of any of three types."""
        fields: dict[str, Any] = {
            "x": x,
            "y": y,
            "inputs": x.numel(),
            "out": y.numel(),
            "bias": bias,
            "norm": norm,
            "epsilon": epsilon,
            "accumulate": accumulate,
        }
        self._longest = max(self._longest, x.numel())
        if isinstance(weight, Tensor):
            self.bytes_read += weight.nbytes
            self._add("dense", weight=weight, dtype=cpu.TYPES[weight.dtype], **fields)
            return
        codes, _, _, scales, _, tables = weight.tensors
        self.bytes_read += codes.nbytes + scales.nbytes + tables.nbytes
        kind, view = cpu.view(weight.tensors, weight.in_features)
        self._kept += [weight, view]
        self._add(kind, weight=ctypes.addressof(view), **fields)

    def attend(
        self,
        x: Tensor,
        y: Tensor,
        *,
        heads: int,
        kv_heads: int,
        dim: int,
        scale: float,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> None:
        """Causal attention of the token at `position`; x [heads + 2 kv_heads, dim] is overwritten.

        Queries and keys pass the norms, are rotated, and keys and values join those of earlier
        positions (`use_cache`). y [heads, dim].
        """
        self._add(
            "attend",
            x=x,
            y=y,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            scale=scale,
            query_norm=query_norm,
            key_norm=key_norm,
            epsilon=epsilon,
        )

    def gate(self, x: Tensor, y: Tensor) -> None:
        """y [n] = silu(x[:n]) * x[n:]."""
        self._add("gate", x=x, y=y, out=y.numel())

    def logits(
        self, x: Tensor, y: Tensor, weight: Tensor, norm: Tensor, epsilon: float, scores: "Rounded"
    ) -> None:
        """y [vocabulary] = weight norm(x), always last; or, if asked, what has the same argmax.

        Then rows are first multiplied in int8 (a half of the memory to read), and again exactly
        where rounding leaves a chance that they give the largest logit.
        """
        self.linear(x, y, weight, norm=norm, epsilon=epsilon)
        exact = self._operations.pop()
        self._kept.append(scores)
        self.bytes_read += scores.rows.nbytes + scores.bounds.nbytes - weight.nbytes
        copy = Operation.from_buffer_copy(exact)
        copy.kind = _KINDS["screen"]
        copy.bytes, copy.bounds = scores.rows.data_ptr(), scores.bounds.data_ptr()
        self._tails = [exact, copy]

    def use_cache(self, cache: Tensor, cosine: Tensor, sine: Tensor) -> None:
        """Point all attentions, in order, at cache [layers, 2, kv_heads, capacity, dim], fp32.

        cosine and sine [capacity, rotary]. Replaces what was used before.
        """
        attentions = [op for op in self._operations if op.kind == _KINDS["attend"]]
        for op, layer in zip(attentions, cache, strict=True):
            op.keys, op.values = layer[0].data_ptr(), layer[1].data_ptr()
            op.cosine, op.sine = cosine.data_ptr(), sine.data_ptr()
            op.rotary, op.capacity = cosine.shape[1], cache.shape[3]
        self._cache = (cache, cosine, sine)
        self._room = torch.empty(0)
        self._arrays = []

    def run(self, token: int, position: int, argmax_only: bool = False) -> None:
        """Run everything for a token at a position whose predecessors are all in the cache.

        With argmax_only the logits are right in their largest one, and no other reaches it.
        """
        threads = torch.get_num_threads()
        if not self._arrays:
            count = len(self._operations) + 1
            self._arrays = [(Operation * count)(*self._operations, tail) for tail in self._tails]
        if self._room.numel() == 0 or self._room.shape[0] < threads:
            floats = max(2 * self._longest, self._cache[0].shape[3])
            self._room = torch.empty(threads, -(-floats // 16) * 16)
        cpu.library().pvrt_run_program(
            self._arrays[argmax_only],
            len(self._operations) + 1,
            token,
            position,
            self._room.data_ptr(),
            self._room.shape[1],
            threads,
        )


class Rounded:
    """Rows [n, in] of a dense weight rounded to int8, and what that loses at most.

    bounds [n, 3]: the scale of a row, the norm of its rounding error, the norm of the rounded row.
    """

    def __init__(self, weight: Tensor) -> None:
        count, inputs = weight.shape
        self.rows = torch.empty(count, inputs, dtype=torch.int8)
        self.bounds = torch.empty(count, 3)
        for first in range(0, count, _ROUNDED_AT_ONCE):
            part = slice(first, first + _ROUNDED_AT_ONCE)
            exact = weight[part].float()
            scale = exact.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            rows = (exact / scale).round_()
            self.rows[part] = rows
            rounded = rows.mul_(scale)
            error = (exact - rounded).norm(dim=1, keepdim=True)
            norm = rounded.norm(dim=1, keepdim=True)
            self.bounds[part] = torch.cat([scale, error * 1.001, norm * 1.001], 1)
