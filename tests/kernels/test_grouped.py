"""Products with a weight per row, against one dense product per row."""

import pytest
import torch
from torch import Tensor

from pvrt_kernels import aqlm_dequantize, grouped
from pvrt_kernels.cpu import rounding
from pvrt_kernels.dispatch import registry
from pvrt_kernels.grouped import GroupedWeight, Plain, aqlm_grouped_linear, aqlm_pack_group
from tests.fixtures.instruction_sets import relative

EXPERTS, IN, SIZES = 5, 64, [24, 40]


def stacks(scheme: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    books, bits, group, out_group = scheme
    generator = torch.Generator().manual_seed(0)
    rows = sum(SIZES) // out_group
    shape = EXPERTS, rows, IN // group, books
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    tables = torch.randn(EXPERTS, 2, books, 1 << bits, out_group, group, generator=generator)
    scales = torch.rand(EXPERTS, rows, 1, 1, 1, generator=generator) + 0.5
    return codes.to(torch.int8 if bits <= 8 else torch.int16), tables, scales


def expected(x: Tensor, index: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    dense = [
        aqlm_dequantize(weight[0][e], weight[1][e], weight[2][e], SIZES) for e in range(EXPERTS)
    ]
    zero = torch.zeros(sum(SIZES), IN)
    chosen = [dense[e] if e >= 0 else zero for e in index.tolist()]
    return torch.einsum("noi,ni->no", torch.stack(chosen), x)


SCHEMES = [(2, 8, 8, 1), (1, 12, 8, 1), (2, 8, 8, 4)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 7])
def test_every_row_meets_its_own_weight(
    isa: str, scheme: tuple[int, int, int, int], rows: int
) -> None:
    weight = stacks(scheme)
    packed = aqlm_pack_group(*weight, torch.float32, SIZES)
    x, index = torch.randn(rows, IN), torch.randint(-1, EXPERTS, (rows,))
    y = aqlm_grouped_linear(x, index, packed)
    assert relative(y, expected(x, index, weight)) < rounding.relative_error()
    assert aqlm_grouped_linear(x[:0], index[:0], packed).shape == (0, sum(SIZES))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 7])  # fewer and more than where all weights are read
def test_without_looking_at_the_index_values_are_the_same(
    isa: str, scheme: tuple[int, int, int, int], rows: int
) -> None:
    weight = stacks(scheme)
    packed = aqlm_pack_group(*weight, torch.float32, SIZES)
    x, index = torch.randn(rows, IN), torch.randint(-1, EXPERTS, (rows,))
    linear = grouped._linear_of(packed.kernel, SIZES)
    zero = torch.zeros(rows, sum(SIZES))
    y = grouped._without_host(x, index, list(packed.tensors), zero, linear)
    assert relative(y, expected(x, index, weight)) < rounding.relative_error()


def test_a_rank_without_experts_adds_nothing() -> None:
    """vLLM gives a rank none where there are more ranks than experts."""
    none = [tensor[:0] for tensor in stacks((2, 8, 8, 1))]
    packed = aqlm_pack_group(none[0], none[1], none[2], torch.float32, SIZES)
    y = aqlm_grouped_linear(torch.randn(3, IN), torch.full((3,), -1), packed)
    assert torch.equal(y, torch.zeros(3, sum(SIZES)))


def test_the_checkpoints_layout_can_be_multiplied_too() -> None:
    weight = stacks((2, 8, 8, 1))
    x, index = torch.randn(6, IN), torch.arange(6) % EXPERTS
    plain = GroupedWeight("plain", Plain(*weight), SIZES)
    torch.testing.assert_close(aqlm_grouped_linear(x, index, plain), expected(x, index, weight))


def test_without_a_kernel_weights_are_decoded() -> None:
    with registry.using():
        packed = aqlm_pack_group(*stacks((2, 8, 8, 1)), torch.bfloat16, SIZES)
    assert [tensor.shape for tensor in packed.tensors] == [(EXPERTS, sum(SIZES), IN)]
    assert packed.tensors[0].dtype == torch.bfloat16
    assert packed.decoded


def test_the_op_keeps_the_rules_of_torch_library() -> None:
    packed = aqlm_pack_group(*stacks((2, 8, 8, 1)), torch.float32, SIZES)
    x, index = torch.randn(3, IN), torch.tensor([2, -1, 0])
    torch.library.opcheck(
        torch.ops.pvrt.aqlm_grouped_linear.default,
        (x, index, list(packed.tensors), SIZES, packed.kernel),
    )
