"""The packed kernels of NVIDIA GPUs: pack at load, then pick and launch Triton kernels.

Triton's kernels count in powers of two, so three codebooks become four, of which the last is zero:
`THREE` packs them so, and is `KERNEL` in all else. Up to 4 tokens go to table lookups or direct
decoding, up to the crossover of the card's table to tiles on tensor cores, more to a decoded
scratch and cuBLAS (`choose.py`).

Programs that share rows add up in a workspace of the device, which is zero between launches. So
the products of one device must run in one order: on one stream, or on streams that wait for each
other, as in vLLM and transformers. Nothing is compiled, measured or synchronised behind the
caller's back once `warm_up` has seen the layers, so that CUDA graphs can be captured.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt_kernels.dispatch import PackedKernel, Problem, registry
from pvrt_kernels.gpu import choose
from pvrt_kernels.gpu.choose import Gpu, LaunchConfig, Shape
from pvrt_kernels.gpu.layout import pack_codes, unpack_codes
from pvrt_kernels.gpu.shared import shared

SCRATCH_BYTES = 64 << 20  # of decoded weights at a time
DECODE = LaunchConfig("decode", rows=128, warps=4)
WARM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)  # every kernel that any number of tokens can choose
_WORDS = {"direct": torch.int64}  # as what a kernel reads its 16-byte blocks; others as int32


class GpuBlocks(NamedTuple):
    """A packed weight, contiguous, on its GPU.

    codes uint8 [blocks, rows, 16] (`layout.py`), codebooks [P, M, 2^B, g] with M a power of two,
    scales [rows].
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor


def supports(problem: Problem) -> bool:
    """NVIDIA GPUs from Turing on, 1 to 4 codebooks, groups of 4, 8, 16 or 32 inputs, one output."""
    return (
        problem.device_type == "cuda"
        and _usable()
        and problem.out_group_size == 1
        and problem.num_codebooks <= 4
        and problem.in_group_size in (4, 8, 16, 32)
        and problem.dtype in (torch.float16, torch.bfloat16, torch.float32)
    )


@lru_cache(maxsize=1)
def _usable() -> bool:
    has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    return has_gpu and find_spec("triton") is not None and _gpu(_current()).capability >= (7, 5)


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def pack(codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]) -> GpuBlocks:
    """See `dispatch.PackedKernel`."""
    parts, _, size, _, g = codebooks.shape
    shared.workspace(codes.device, codes.shape[0] * 64, codes.shape[0])
    tables = codebooks.reshape(parts, -1, size, g).contiguous()
    return GpuBlocks(pack_codes(codes, size), tables, scales.reshape(-1).contiguous())


def unpack(packed: GpuBlocks, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.PackedKernel`."""
    _, count, size, g = packed.codebooks.shape
    codes = unpack_codes(packed.codes, in_features // g, count, size)
    return codes, packed.codebooks.unsqueeze(3), packed.scales.reshape(-1, 1, 1, 1)


def _pack_three(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> GpuBlocks:
    four = torch.cat([codebooks, torch.zeros_like(codebooks[:, :1])], dim=1)
    return pack(F.pad(codes, (0, 1)), four, scales, partition_sizes)


def _unpack_three(packed: GpuBlocks, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, codebooks, scales = unpack(packed, in_features)
    return codes[:, :, :3].contiguous(), codebooks[:, :3], scales


def linear(x: Tensor, packed: GpuBlocks, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """See `dispatch.PackedKernel`. Allocates the result and, for many tokens, the scratch."""
    rows, in_features = packed.codes.shape[1], x.shape[-1]
    flat = x.reshape(-1, in_features)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], rows)
    config = config_for(flat, packed)
    if len(sizes) > 3 and config.kernel != "dense":
        return _by_partition(x, packed, bias, sizes)
    if config.kernel == "dense":
        y = multiply_decoded(flat, packed, bias, sizes)
    else:
        y = launch(config, flat, packed, bias, sizes)
    return y.reshape(*x.shape[:-1], rows)


def config_for(flat: Tensor, packed: GpuBlocks) -> LaunchConfig:
    """The launch config for flat [tokens, in_features] on its device."""
    _, count, size, g = packed.codebooks.shape
    deterministic = torch.are_deterministic_algorithms_enabled()
    gpu = _gpu(flat.device)
    shape = Shape(count, size, g, packed.codes.shape[1], flat.shape[1])
    bucket = min(1 << (flat.shape[0] - 1).bit_length(), 1 << 16)
    if bucket > 64:
        bucket = flat.shape[0]
    return _choose(gpu, shape, bucket, flat.dtype, deterministic)


def launch(
    config: LaunchConfig, flat: Tensor, packed: GpuBlocks, bias: Tensor | None, sizes: list[int]
) -> Tensor:
    """Run a launch config (any but dense): flat [tokens, in_features] -> [tokens, rows]."""
    blocks, codebooks, scales = packed
    tokens, in_features = flat.shape
    rows, (parts, count, size, g) = blocks.shape[1], codebooks.shape
    flat = _aligned(flat)
    if codebooks.dtype != flat.dtype:  # tensor cores take one type
        codebooks = codebooks.to(flat.dtype)
    y = flat.new_empty(tokens, rows)
    ends = [0]
    for part in sizes:
        ends.append(ends[-1] + part)
    tiles = sum(-(-(end - start) // config.rows) for start, end in pairwise(ends))
    sums, arrived = shared.workspace(flat.device, tokens * rows if config.split > 1 else 1, tiles)
    if config.kernel == "direct":
        sums = flat.new_empty(config.split * tokens * rows, dtype=torch.float32)
    grid = (tiles, config.split, -(-tokens // config.tokens))
    end1 = ends[2] if len(ends) > 2 else rows
    with _on(flat.device):
        _kernel(config.kernel)[grid](
            flat,
            blocks.view(_WORDS.get(config.kernel, torch.int32)),
            codebooks,
            scales,
            scales if bias is None else bias,
            y,
            sums,
            arrived,
            rows,
            in_features // g,
            tokens,
            ends[1],
            end1,
            config.split,
            TOKENS=config.tokens,
            CODEBOOKS=count,
            SIZE=size,
            GROUP=g,
            PARTS=1 if parts == 1 else 3,  # two are three of which the last is empty
            HAS_BIAS=bias is not None,
            ROWS=config.rows,
            **compile_options(config),
        )
    return y


def compile_options(config: LaunchConfig) -> dict[str, Any]:
    """What Triton is told beside the arguments.

    One stage: pipelining would stage codewords in shared memory. Fused multiply-add: Triton 3.10
    no longer assumes it. A limit of registers: without one, ptxas may spill a few bytes to come
    down to 128 (seen with tiles and with direct decoding).
    """
    options = {"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": True}
    if config.kernel in ("tile", "direct"):
        options["maxnreg"] = 255
    return options


def dequantize(packed: GpuBlocks, sizes: list[int], in_features: int) -> Tensor:
    """See `dispatch.PackedKernel`."""
    weight = packed.codebooks.new_empty(packed.codes.shape[1], in_features)
    _decode(packed, sizes, 0, weight)
    return weight


def warm_up(
    packed: GpuBlocks, sizes: list[int], in_features: int, dtype: torch.dtype, has_bias: bool
) -> None:
    """Compile and run what any number of tokens can need; layers that share kernels do it once."""
    for tokens in WARM_TOKENS:
        x = torch.zeros(tokens, in_features, dtype=dtype, device=packed.codes.device)
        config = config_for(x, packed)
        if shared.is_new(
            x.device,
            config.kernel,
            config.tokens,
            config.rows,
            packed.codebooks.shape,
            dtype,
            has_bias,
        ):
            bias = x.new_zeros(packed.codes.shape[1]) if has_bias else None
            linear(x, packed, bias, sizes)
        if shared.is_new(x.device, "dense", packed.codebooks.shape[1:], dtype):
            multiply_decoded(x, packed, None, sizes)


def _by_partition(x: Tensor, packed: GpuBlocks, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """More partitions than a kernel takes as arguments: one launch for each."""
    blocks, codebooks, scales = packed
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    outputs = []
    for part, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rows = slice(start, start + size)
        one = GpuBlocks(blocks[:, rows].contiguous(), codebooks[part : part + 1], scales[rows])
        outputs.append(linear(x, one, None if bias is None else bias[rows], [size]))
    return torch.cat(outputs, dim=-1)


def multiply_decoded(
    flat: Tensor, packed: GpuBlocks, bias: Tensor | None, sizes: list[int]
) -> Tensor:
    """Decode into a scratch, some rows at a time, and multiply with cuBLAS."""
    rows, in_features = packed.codes.shape[1], flat.shape[1]
    step = max(128, SCRATCH_BYTES // (in_features * flat.element_size()) // 128 * 128)
    y = flat.new_empty(flat.shape[0], rows)
    scratch = flat.new_empty(min(step, rows), in_features)
    for start in range(0, rows, step):
        weight = scratch[: min(step, rows - start)]
        _decode(packed, sizes, start, weight)
        torch.mm(flat, weight.t(), out=y[:, start : start + weight.shape[0]])
    if bias is not None:
        y += bias
    return y


def _decode(packed: GpuBlocks, sizes: list[int], start: int, weight: Tensor) -> None:
    """Decode rows start... of a layer into weight [some rows, in_features]."""
    from pvrt_kernels.gpu.tile_gemm import decode_rows

    blocks, codebooks, scales = packed
    _, count, size, g = codebooks.shape
    end, first = start + weight.shape[0], 0
    with _on(weight.device):
        for part, length in enumerate(sizes):
            begin, stop = max(first, start), min(first + length, end)
            first += length
            if begin >= stop:
                continue
            decode_rows[(-(-(stop - begin) // DECODE.rows), blocks.shape[0])](
                blocks.view(torch.int32),
                codebooks[part],
                scales,
                weight[begin - start :],
                blocks.shape[1],
                weight.shape[1] // g,
                begin,
                stop,
                CODEBOOKS=count,
                SIZE=size,
                GROUP=g,
                ROWS=DECODE.rows,
                **compile_options(DECODE),
            )


def _aligned(flat: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, for which kernels are compiled."""
    flat = flat.contiguous()
    return flat.clone() if flat.data_ptr() % 16 else flat


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=64)
def _gpu(device: torch.device) -> Gpu:
    return choose.describe_gpu(device)


@lru_cache(maxsize=4096)
def _choose(
    gpu: Gpu, shape: Shape, tokens: int, dtype: torch.dtype, deterministic: bool
) -> LaunchConfig:
    config = choose.choose(gpu, shape, tokens, dtype, deterministic)
    if config.kernel == "lut_gluon" and not gluon_gathers():
        return LaunchConfig("lut", config.tokens, config.rows, config.warps, config.split)
    return config


def gluon_gathers() -> bool:
    """Whether this Triton's Gluon can gather from shared memory (3.7.1 and newer)."""
    from triton.experimental.gluon import language

    return hasattr(language.shared_memory_descriptor, "gather")


def _kernel(name: str) -> Any:
    """A Triton function by name; imported here because a CPU installation has no Triton."""
    if name == "lut":
        from pvrt_kernels.gpu.lut_gemv import lut_gemv

        return lut_gemv
    if name == "lut_gluon":
        from pvrt_kernels.gpu.lut_gluon import lut_gluon

        return lut_gluon
    if name == "direct":
        from pvrt_kernels.gpu.direct_gemv import direct_gemv

        return direct_gemv
    from pvrt_kernels.gpu.tile_gemm import tile_gemm

    return tile_gemm


KERNEL = PackedKernel(
    "triton",
    lambda problem: problem.num_codebooks != 3 and supports(problem),
    GpuBlocks,
    pack,
    unpack,
    linear,
    dequantize,
    warm_up,
)
THREE = dataclasses.replace(
    KERNEL,
    name="triton-3",
    supports=lambda problem: problem.num_codebooks == 3 and supports(problem),
    pack=_pack_three,
    unpack=_unpack_three,
)


def kernel_for(num_codebooks: int) -> PackedKernel[GpuBlocks]:
    """The packed kernel for a number of codebooks."""
    return THREE if num_codebooks == 3 else KERNEL


def register() -> None:
    """Add the kernels to the registry; what is not there is found out when it is asked."""
    registry.add(KERNEL, THREE)
