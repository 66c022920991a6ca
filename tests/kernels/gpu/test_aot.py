"""Compiling GPU kernels without a GPU: no spills, wide loads, and a check that can fail.

A sample; benchmarks/kernels_aot.py compiles everything that is shipped, for every architecture.
"""

from pathlib import Path

import pytest

from pvrt_kernels.gpu.choose import LaunchConfig
from tests.fixtures import aot
from tests.fixtures.aot import Variant

pytestmark = pytest.mark.slow
LUT = Variant(LaunchConfig("lut", 1, 1024, 8), 2, 256, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("variant", "architecture"),
    [
        (LUT, 86),
        (Variant(LUT.config, 2, 256, 8, parts=3, has_bias=True, dtype="bf16"), 120),
        (Variant(LaunchConfig("direct", 1, 128, 4), 1, 65536, 8), 89),
        (Variant(LaunchConfig("tile", 16, 128, 4), 2, 256, 8), 80),
        (Variant(LaunchConfig("tile", 64, 128, 8), 1, 65536, 16), 90),
        (Variant(LaunchConfig("decode", 1, 128, 4), 2, 256, 8), 75),
    ],
    ids=lambda value: value.name if isinstance(value, Variant) else f"sm_{value}",
)
def test_kernels_fit_the_cards_they_are_for(variant: Variant, architecture: int) -> None:
    binary = aot.compile_variant(variant, architecture)
    assert aot.complaints(variant, architecture, binary) == []


def test_lookups_are_single_loads_from_shared_memory_and_nothing_is_shuffled() -> None:
    binary = aot.compile_variant(LUT, 89)
    rows_per_thread = 4
    assert binary.count(r"LDS(\.U)?$") - 16 * rows_per_thread in range(10)
    assert binary.count("SHFL") <= 1  # of the counter of arrivals
    assert binary.code_loads == 2 * rows_per_thread  # before the loop, and ahead in it
    assert binary.count("STS") - 16 in range(6)  # the table: 4096 entries by 256 threads
    assert binary.shared_bytes == 16 << 10


def test_a_binary_that_spills_is_found_out() -> None:
    variant = Variant(LaunchConfig("tile", 128, 128, 4), 2, 256, 8)  # twice what registers can hold
    binary = aot.compile_variant(variant, 89)
    assert any("spilled" in complaint for complaint in aot.complaints(variant, 89, binary))


def test_shipped_variants_cover_kernels_schemes_and_types() -> None:
    variants = aot.shipped_variants()
    assert {variant.config.kernel for variant in variants} >= {"lut", "direct", "tile", "decode"}
    schemes = {"2x8g8", "1x8g8", "1x8g4", "4x8g8", "1x16g8", "1x16g16"}
    assert {variant.scheme for variant in variants} >= schemes
    assert any(variant.dtype == "bf16" for variant in variants)
    assert any(variant.parts == 3 for variant in variants)
    assert len(variants) == len(set(variants))
