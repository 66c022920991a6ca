"""Dense products with packed weights that are decoded tile by tile, which prompts take."""

import ctypes

import pytest
import torch
from torch import Tensor

from pvrt_kernels.cpu import layouts, products, rounding
from pvrt_kernels.cpu import library as cpu
from pvrt_kernels.packed import aqlm_packed_linear
from tests.fixtures.fused import exact, fused, packed
from tests.fixtures.instruction_sets import relative

PARTITIONS = [[200], [64, 40, 130]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x8g4", "3x8g4", "3x8g16", "1x7g8", "17x8g8"])
def test_many_tokens_may_take_decoded_tiles(
    isa: str, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every instruction set decodes the weight itself, and rounds it to bfloat16 as torch does."""
    monkeypatch.setattr(products, "_PANEL_BYTES", 2 * 64 * 208)  # several panels
    eye = torch.eye(208)
    for sizes in PARTITIONS:
        layer = fused(scheme, sizes, 208, torch.float32)
        weight = packed(layer, sizes)
        tiles = layouts.CpuTiles(*weight.tensors)
        expected = weight.dequantize().to(dtype).float()
        decoded = products._by_decoded_tiles(eye, tiles, None, sizes, dtype).T
        assert torch.equal(decoded, expected)


def test_what_is_no_number_is_rounded_to_no_number(isa: str) -> None:
    layer = fused("1x8g8", [64], 64, torch.float32)
    odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-40, -0.0, 1.0])
    layer.codebooks[:], layer.scales[:] = odd, 1.0
    tiles = layouts.CpuTiles(*packed(layer, [64]).tensors)
    view, books = layouts.tiled_view(tiles, 64), tiles.tables.mT.contiguous()
    decoded = torch.empty(64, 64, dtype=torch.bfloat16)
    cpu.library().pvrt_decode_tiles(
        ctypes.byref(view), books.data_ptr(), 0, 1, decoded.data_ptr(), True, 1
    )
    expected = odd.bfloat16().repeat(64, 8)
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert torch.equal(decoded.nan_to_num(7), expected.nan_to_num(7))


def test_prompts_are_rounded_to_bfloat16_only_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp32 stays fp32 unless torch was told otherwise; all within the error of their type."""
    sizes, layer = [640, 130], fused("3x8g4", [640, 130], 208, torch.bfloat16)
    assert layer.bias is not None
    weight, dense = packed(layer, sizes), exact(layer, sizes)
    tiles = layouts.CpuTiles(*weight.tensors)
    assert products._decoding_pays(128, tiles, torch.float32)
    assert not products._decoding_pays(8, tiles, torch.bfloat16)
    x = torch.randn(128, 208)
    expected = x.double() @ dense.T + layer.bias.double()

    def error(x: Tensor) -> float:
        y = aqlm_packed_linear(x, weight, layer.bias)
        assert y.dtype == x.dtype
        return relative(y, expected)

    rounds = torch.finfo(torch.bfloat16).eps
    for fast in (False, True):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda fast=fast: fast)
        assert error(x) < rounding.FP32_RELATIVE
        assert 1e-4 < error(x.bfloat16()) < rounds
        assert 1e-5 < error(x.half()) < torch.finfo(torch.float16).eps
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        assert (1e-4 < error(x) < rounds) == fast
        monkeypatch.undo()
