"""The packed kernels of NVIDIA GPUs: pack at load, then pick a kernel and launch it.

Up to 4 tokens go to table lookups (CUDA, `native.py`; Triton) or direct decoding, up to the
crossover of the card's table to tiles on tensor cores, more to a decoded scratch and cuBLAS
(`choose.py`).

Programs that share rows add up in a workspace of the device, which is zero between launches. So
the products of one device must run in one order: on one stream, or on streams that wait for each
other, as in vLLM and transformers. Nothing is compiled, measured or synchronised behind the
caller's back once `warm_up` has seen the layers, so that CUDA graphs can be captured.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvrt_kernels.dispatch import PackedKernel, Problem, registry
from pvrt_kernels.gpu import choose, native
from pvrt_kernels.gpu.choose import Gpu, LaunchConfig, Shape
from pvrt_kernels.gpu.layout import pack_codes, rest_bytes, split_codebooks, unpack_codes
from pvrt_kernels.gpu.shared import shared

SCRATCH_BYTES = 64 << 20  # of decoded weights at a time
DECODE = LaunchConfig("decode", rows=128, warps=4)
WARM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)  # every kernel that any number of tokens can choose
_WORDS = {"direct": torch.int64}  # as what a kernel reads its 16-byte blocks; others as int32


class GpuBlocks(NamedTuple):
    """A packed weight, contiguous, on its GPU.

    codes uint8 [blocks, rows, 16] and rest uint8 [blocks, rows, 0, 4 or 8] (`layout.py`), codebooks
    [P, M, 2^B, g], scales [rows].
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    rest: Tensor


def supports(problem: Problem) -> bool:
    """NVIDIA GPUs from Turing on, 1 to 6 codebooks, groups of 4, 8, 16 or 32 inputs, one output."""
    return (
        problem.device_type == "cuda"
        and _usable()
        and problem.out_group_size == 1
        and problem.num_codebooks <= 6
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
    parts, count, size, _, g = codebooks.shape
    sums = min(codes.shape[0] * choose.MOST_TOKENS, choose.MOST_SUMS)
    shared.workspace(codes.device, sums, codes.shape[0])
    tables = codebooks.reshape(parts, -1, size, g).contiguous()
    main, rest = split_codebooks(count)
    blocks = pack_codes(codes[:, :, :main], size)
    smaller = blocks.new_empty(*blocks.shape[:2], 0)
    if rest:
        smaller = pack_codes(codes[:, :, main:], size, rest_bytes(count))
    return GpuBlocks(blocks, tables, scales.reshape(-1).contiguous(), smaller)


def unpack(packed: GpuBlocks, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.PackedKernel`."""
    _, count, size, g = packed.codebooks.shape
    main, rest = split_codebooks(count)
    codes = unpack_codes(packed.codes, in_features // g, main, size)
    if rest:
        more = unpack_codes(packed.rest, in_features // g, rest, size)
        codes = torch.cat([codes, more], dim=2)
    return codes, packed.codebooks.unsqueeze(3), packed.scales.reshape(-1, 1, 1, 1)


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
    if not packed.codebooks.dtype == packed.scales.dtype == flat.dtype:  # CUDA takes one type
        gpu = replace(gpu, compiles_cuda=False)
    shape = Shape(count, size, g, packed.codes.shape[1], flat.shape[1])
    bucket = min(1 << (flat.shape[0] - 1).bit_length(), 1 << 16)
    if bucket > 64:
        bucket = flat.shape[0]
    return _choose(gpu, shape, bucket, flat.dtype, deterministic)


def launch(
    config: LaunchConfig, flat: Tensor, packed: GpuBlocks, bias: Tensor | None, sizes: list[int]
) -> Tensor:
    """Run a launch config (any but dense): flat [tokens, in_features] -> [tokens, rows]."""
    blocks, codebooks, scales, smaller = packed
    tokens, in_features = flat.shape
    rows, (parts, count, size, g) = blocks.shape[1], codebooks.shape
    main, rest = split_codebooks(count)
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
    end1 = ends[2] if len(ends) > 2 else rows
    if config.kernel in choose.CUDA:
        with _on(flat.device):
            bias = bias if bias is None else bias.to(flat.dtype)
            native.launch(config, flat, packed, bias, y, (sums, arrived), tiles, (ends[1], end1))
        return y
    grid = (tiles, config.split, -(-tokens // config.tokens))
    with _on(flat.device):
        _kernel(config.kernel)[grid](
            flat,
            blocks.view(_WORDS.get(config.kernel, torch.int32)),
            (smaller if rest else blocks).view(torch.int32),
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
            CODEBOOKS=main,
            REST=rest,
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
    blocks, codebooks, scales, smaller = packed
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    outputs = []
    for part, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rows = slice(start, start + size)
        one = GpuBlocks(
            blocks[:, rows].contiguous(),
            codebooks[part : part + 1],
            scales[rows],
            smaller[:, rows].contiguous(),
        )
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


def rows(
    packed: GpuBlocks, numbers: Tensor, sizes: list[int], in_features: int, dtype: torch.dtype
) -> Tensor:
    """See `dispatch.PackedKernel`; NaN for rows that are not there."""
    y = packed.scales.new_full((numbers.shape[0], in_features), torch.nan, dtype=dtype)
    if numbers.shape[0]:
        _decode(packed, sizes, 0, y, _aligned(numbers))
    return y


def _decode(
    packed: GpuBlocks, sizes: list[int], start: int, weight: Tensor, numbers: Tensor | None = None
) -> None:
    """Decode rows start..., or those of some numbers, into weight [some rows, in_features]."""
    from pvrt_kernels.gpu.tile_gemm import decode_rows

    blocks, codebooks, scales, smaller = packed
    _, count, size, g = codebooks.shape
    main, rest = split_codebooks(count)
    end, first = start + weight.shape[0], 0
    with _on(weight.device):
        for part, length in enumerate(sizes):
            begin, stop, results = first, first + length, weight
            first += length
            if numbers is None:
                begin, stop = max(begin, start), min(stop, end)
                results = weight[begin - start : max(begin, stop) - start]
            if begin >= stop:
                continue
            decode_rows[(-(-results.shape[0] // DECODE.rows), blocks.shape[0])](
                blocks.view(torch.int32),
                (smaller if rest else blocks).view(torch.int32),
                codebooks[part],
                scales,
                scales if numbers is None else numbers,
                results,
                blocks.shape[1],
                weight.shape[1] // g,
                begin,
                stop,
                results.shape[0],
                CODEBOOKS=main,
                REST=rest,
                SIZE=size,
                GROUP=g,
                BY_NUMBER=numbers is not None,
                ROWS=DECODE.rows,
                **compile_options(DECODE),
            )


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, for which kernels are compiled."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


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
    return choose.choose(gpu, shape, tokens, dtype, deterministic)


def _kernel(name: str) -> Any:
    """A Triton function by name; imported here because a CPU installation has no Triton."""
    if name == "lut":
        from pvrt_kernels.gpu.lut_gemv import lut_gemv

        return lut_gemv
    if name == "direct":
        from pvrt_kernels.gpu.direct_gemv import direct_gemv

        return direct_gemv
    from pvrt_kernels.gpu.tile_gemm import tile_gemm

    return tile_gemm


KERNEL = PackedKernel(
    "triton", supports, GpuBlocks, pack, unpack, linear, dequantize, warm_up, rows
)


def register() -> None:
    """Add the kernel to the registry; what is not there is found out when it is asked."""
    registry.add(KERNEL)
