"""Packing: the hook by which a kernel keeps weights in a layout of its own."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_linear, reference
from pvrt_kernels.dispatch import PackedKernel, registry
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_linear, aqlm_packed_rows
from tests.fixtures.toy import random_layer

pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for cpu")


class Transposed(NamedTuple):
    codes: Tensor
    codebooks: Tensor
    scales: Tensor


def transpose(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> Transposed:
    return Transposed(codes.transpose(0, 1).contiguous(), codebooks, scales)


def back(packed: Transposed, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    return packed.codes.transpose(0, 1), packed.codebooks, packed.scales


def multiply(x: Tensor, packed: Transposed, bias: Tensor | None, sizes: list[int]) -> Tensor:
    return reference.linear(x, *back(packed, 0), bias, sizes)


KERNEL = PackedKernel(
    "transposed", lambda problem: problem.in_group_size == 8, Transposed, transpose, back, multiply
)


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    with registry.using(KERNEL):
        yield


def packed(seed: int = 0) -> tuple[PackedWeight, tuple[Tensor, Tensor, Tensor]]:
    layer = random_layer(Scheme.parse("2x8g8"), 16, 32, seed=seed)
    tensors = layer.codes, layer.codebooks, layer.scales
    weight = aqlm_pack(*tensors, torch.float32)
    assert weight is not None
    return weight, tensors


def test_a_packed_weight_multiplies_and_unpacks_like_its_source() -> None:
    weight, tensors = packed()
    x, bias = torch.randn(2, 3, 32), torch.randn(16)
    torch.testing.assert_close(
        aqlm_packed_linear(x, weight, bias), aqlm_linear(x, *tensors, bias), rtol=0, atol=0
    )
    assert torch.equal(weight.dequantize(), aqlm_dequantize(*tensors))
    codes, codebooks, scales = weight.unpack()
    assert torch.equal(codes, tensors[0])
    assert torch.equal(codebooks[0], tensors[1])
    assert torch.equal(scales, tensors[2])


def test_rows_come_by_their_numbers_from_any_layout() -> None:
    weight, tensors = packed()
    rows = torch.tensor([[15, 0], [3, 15]], dtype=torch.int32)
    found = aqlm_packed_rows(weight, rows, torch.float16)
    assert torch.equal(found, aqlm_dequantize(*tensors)[rows.long()].half())
    with pytest.raises(IndexError, match="there is no row 16: the weight has rows 0 to 15"):
        aqlm_packed_rows(weight, torch.tensor([16, 40]), torch.float32)


def test_gradients_reach_x_and_bias() -> None:
    weight, tensors = packed()
    grads = []
    for use_packed in (True, False):
        torch.manual_seed(0)
        x, bias = torch.randn(5, 32, requires_grad=True), torch.randn(16, requires_grad=True)
        y = aqlm_packed_linear(x, weight, bias) if use_packed else aqlm_linear(x, *tensors, bias)
        grads.append(torch.autograd.grad(y.sin().sum(), (x, bias)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck_accepts_the_packed_ops() -> None:
    weight, _ = packed()
    x, bias = torch.randn(4, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    op = torch.ops.pvrt.aqlm_packed_linear.default
    torch.library.opcheck(op, (x, list(weight.tensors), bias, [16], "transposed"))
    rows = torch.tensor([[1], [15]])
    op = torch.ops.pvrt.aqlm_packed_rows.default
    torch.library.opcheck(op, (rows, list(weight.tensors), [16], 32, torch.float16, "transposed"))


def test_the_packed_op_survives_torch_compile_with_changing_batch() -> None:
    weight, tensors = packed()

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return aqlm_packed_linear(x, weight) + 1

    for batch in (1, 3, 7):
        x = torch.randn(batch, 32)
        torch.testing.assert_close(run(x), aqlm_linear(x, *tensors) + 1)


def test_rows_survive_torch_compile_with_changing_batch() -> None:
    weight, tensors = packed()

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def run(rows: Tensor) -> Tensor:
        return aqlm_packed_rows(weight, rows, torch.float32) + 1

    for batch in (1, 3, 7):
        rows = torch.randint(0, 16, (batch,))
        torch.testing.assert_close(run(rows), aqlm_dequantize(*tensors)[rows] + 1)


def test_nothing_is_packed_where_no_kernel_wants_it() -> None:
    layer = random_layer(Scheme.parse("1x16g16"), 16, 32)
    assert aqlm_pack(layer.codes, layer.codebooks, layer.scales, torch.float32) is None


def test_names_are_taken_once_and_wrong_widths_are_refused() -> None:
    weight, _ = packed()
    with pytest.raises(ValueError, match="x has 40 features, the weight takes 32"):
        aqlm_packed_linear(torch.zeros(1, 40), weight)
    with pytest.raises(ValueError, match="already registered"):
        registry.add(KERNEL)
