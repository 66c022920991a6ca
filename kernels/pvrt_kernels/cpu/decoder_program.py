"""Programs for the CPU: one call of the C library turns tokens into the next ones' logits.

A program is a list of operations over fp32 vectors that the caller owns (decoder_program.c), with
one row per sequence: weights are read once for all sequences of a run. It knows no models; who
builds one decides what it computes. Tensors are kept alive by the program, and must not be resized
or replaced while it lives.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvrt_kernels.cpu import layouts, library
from pvrt_kernels.packed import PackedWeight

_NAMES = ("embed", "tiled", "plain", "dense", "attend", "gate", "screen", "decode", "screen_tiled")
_KINDS = {name: kind for kind, name in enumerate(_NAMES)}  # as in cpu.h
_ROUNDED_AT_ONCE = 4096  # rows
MOST_ROWS = 64  # of one run, as in decoder_program.c
_ATTEND_ROWS = 4  # query heads that attend together, as in cpu.h
_LONG, _VOID = ctypes.c_int64, ctypes.c_void_p


class Operation(ctypes.Structure):
    """`operation` of cpu.h."""

    _fields_ = [
        *((name, _LONG) for name in ("kind", "inputs", "out", "stride", "dtype", "accumulate")),
        *((name, _VOID) for name in ("x", "y", "norm", "weight", "bias")),
        ("epsilon", ctypes.c_double),
        *((name, _VOID) for name in ("cosine", "sine", "query_norm", "key_norm")),
        *((name, _LONG) for name in ("heads", "kv_heads", "dim", "rotary", "layer")),
        ("scale", ctypes.c_double),
        *((name, _VOID) for name in ("bytes", "bounds", "plain")),
    ]


class _Sequence(ctypes.Structure):
    """`sequence` of cpu.h."""

    _fields_ = [("cache", _VOID), *((name, _LONG) for name in ("capacity", "token", "position"))]


class Step(NamedTuple):
    """A token for one sequence, at a position whose predecessors are all in its cache.

    cache [layers, 2 (keys, values), kv_heads, capacity, dim], fp32 and contiguous.
    """

    token: int
    position: int
    cache: Tensor


class Program:
    """Operations in order, for up to `rows` sequences at once.

    Vectors x, y [rows, n] are fp32 with rows of stride 1; norms and biases [n] are contiguous.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._kept: list[Any] = []
        self._arrays: list[Any] = []
        self._tails: list[Operation] = []
        self._room = torch.empty(0)
        self._rows = 1
        self._vocabulary = 0
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

    def embed(
        self,
        weight: PackedWeight | Tensor,
        y: Tensor,
        scale: float = 1.0,
        in_scales: Tensor | None = None,
    ) -> None:
        """y = scale * row `token` of weight [vocabulary, n], dense (any of three types) or packed.

        The rows of y lie side by side. in_scales [n] fp32 multiply the columns of a packed weight.
        """
        assert y.is_contiguous()
        self._rows = y.shape[0]
        fields: dict[str, Any] = {"out": y.shape[1], "stride": y.stride(0), "y": y, "scale": scale}
        if isinstance(weight, Tensor):
            assert in_scales is None
            fields["inputs"] = self._vocabulary = weight.shape[0]
            self._add("embed", weight=weight, dtype=library.TYPES[weight.dtype], **fields)
            return
        packed = weight.tensors
        assert isinstance(packed, layouts.CpuTiles | layouts.CpuWords), weight.kernel
        fields["inputs"] = self._vocabulary = packed.fp32_scales.shape[0]
        view = layouts.plain_view(packed, weight.in_features)
        self._kept += [weight, view]
        columns = {} if in_scales is None else {"norm": in_scales}
        self._add("decode", weight=ctypes.addressof(view), **columns, **fields)

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
            "inputs": x.shape[1],
            "out": y.shape[1],
            "stride": y.stride(0),
            "bias": bias,
            "norm": norm,
            "epsilon": epsilon,
            "accumulate": accumulate,
        }
        self._longest = max(self._longest, x.shape[1])
        if isinstance(weight, Tensor):
            self.bytes_read += weight.nbytes
            self._add("dense", weight=weight, dtype=library.TYPES[weight.dtype], **fields)
            return
        view: library.TiledWeight | library.PlainWeight
        packed = weight.tensors
        if isinstance(packed, layouts.CpuTiles):
            kind, view = "tiled", layouts.tiled_view(packed, weight.in_features)
            self.bytes_read += packed.tables.nbytes
        else:
            assert isinstance(packed, layouts.CpuWords), weight.kernel
            kind, view = "plain", layouts.plain_view(packed, weight.in_features)
        self.bytes_read += packed.codes.nbytes + packed.fp32_scales.nbytes
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
        """Causal attention; x [rows, (heads + 2 kv_heads) dim] is overwritten.

        Queries and keys pass the norms, are rotated (`rotate`), and keys and values join those of
        earlier positions in the caches. y [rows, heads dim]. The first call is for layer 0.
        """
        layer = sum(op.kind == _KINDS["attend"] for op in self._operations)
        self._add(
            "attend",
            x=x,
            y=y,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            layer=layer,
            scale=scale,
            query_norm=query_norm,
            key_norm=key_norm,
            epsilon=epsilon,
        )

    def gate(self, x: Tensor, y: Tensor) -> None:
        """y [rows, n] = silu(x[:, :n]) * x[:, n:]."""
        self._add("gate", x=x, y=y, out=y.shape[1])

    def logits(
        self,
        x: Tensor,
        y: Tensor,
        weight: PackedWeight | Tensor,
        norm: Tensor,
        epsilon: float,
        scores: "Rounded | None" = None,
    ) -> None:
        """y [rows, vocabulary] = weight norm(x), always last; or, if asked, what has its argmax.

        If it is asked, weights are first multiplied roughly, and again exactly where rounding
        leaves a chance that they give the largest logit: those of a dense weight in int8, if there
        are `scores` (a half of the memory to read), those of a packed one, at its own width in any
        case, by rough lookup tables where the instruction set has them.
        """
        self.linear(x, y, weight, norm=norm, epsilon=epsilon)
        exact = self._operations.pop()
        screen = Operation.from_buffer_copy(exact)
        if scores is not None:
            assert isinstance(weight, Tensor)
            self._kept.append(scores)
            self.bytes_read += scores.nbytes(*weight.shape) - weight.nbytes
            screen.kind = _KINDS["screen"]
            screen.bytes, screen.bounds = scores.rows.data_ptr(), scores.bounds.data_ptr()
        elif (
            isinstance(weight, PackedWeight)
            and isinstance(weight.tensors, layouts.CpuTiles)
            and len(weight.partition_sizes) == 1
        ):
            view = layouts.plain_view(weight.tensors, weight.in_features)
            self._kept.append(view)
            screen.kind, screen.plain = _KINDS["screen_tiled"], ctypes.addressof(view)
        self._tails = [exact, screen]

    def rotate(self, cosine: Tensor, sine: Tensor) -> None:
        """Rotate queries and keys of all attentions by these angles [positions, rotary], fp32.

        There must be a row for every position that is run. Replaces what was used before.
        """
        for op in self._operations:
            if op.kind == _KINDS["attend"]:
                op.cosine, op.sine = cosine.data_ptr(), sine.data_ptr()
                op.inputs, op.rotary = cosine.shape
        self._angles = (cosine, sine)
        self._arrays = []

    def run(self, steps: Sequence[Step], argmax_only: bool = False) -> None:
        """Run everything for the next token of each sequence; results are in the first rows of y.

        With argmax_only the logits are right in their largest one, and no other reaches it.
        Raises IndexError for a token that the embedding does not have, and for a position beyond a
        cache or the angles.
        """
        threads, rows = torch.get_num_threads(), len(steps)
        assert 0 < rows <= min(self._rows, MOST_ROWS)
        if not self._arrays:
            count = len(self._operations) + 1
            self._arrays = [(Operation * count)(*self._operations, tail) for tail in self._tails]
        scores = max(step.position for step in steps) + 1
        floats = -(-max(rows * (2 * self._longest + 1), _ATTEND_ROWS * scores) // 16) * 16
        if self._room.numel() == 0 or self._room.shape[0] < threads or self._room.shape[1] < floats:
            # Doubled, because it grows with every position.
            self._room = torch.empty(threads, max(floats, 2 * _ATTEND_ROWS * scores))
        sequences = (_Sequence * rows)(
            *(_Sequence(s.cache.data_ptr(), s.cache.shape[3], s.token, s.position) for s in steps)
        )
        wrong = library.library().pvrt_run_program(
            self._arrays[argmax_only],
            len(self._operations) + 1,
            sequences,
            rows,
            self._room.data_ptr(),
            self._room.shape[1],
            threads,
        )
        if wrong >= 0:
            token, position, _ = steps[wrong]
            if self._vocabulary and not 0 <= token < self._vocabulary:
                most = self._vocabulary - 1
                raise IndexError(f"there is no token {token}: the vocabulary has 0 to {most}")
            raise IndexError(f"there is no position {position} in a cache or among the angles")


class Rounded:
    """Rows [n, in] of a dense weight rounded to int8, and what that loses at most.

    bounds [n, 3]: the scale of a row, the norm of its rounding error, the norm of the rounded row.
    """

    @staticmethod
    def nbytes(count: int, inputs: int) -> int:
        """What rows [count, inputs] and their bounds take."""
        return count * (inputs + 3 * 4)

    def __init__(self, weight: Tensor) -> None:
        count, inputs = weight.shape
        self.rows = torch.empty(count, inputs, dtype=torch.int8)
        library.huge_pages(self.rows)
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
