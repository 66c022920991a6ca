"""`pvrt bench kernels`, as far as it goes without a GPU."""

from pathlib import Path

import pytest
import torch

from pvrt.errors import RunError
from pvrt.format.aqlm import Checkpoint
from pvrt.tools import bench_kernels
from pvrt.tools.bench_kernels import Clock
from pvrt_kernels.gpu import choose
from pvrt_kernels.gpu.choose import DENSE, Gpu, LaunchConfig, Shape
from tests.fixtures import aot
from tests.fixtures.command_line import run
from tests.fixtures.toy import write_toy

ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128)
SQUARE = Shape(2, 256, 8, 4096, 4096)


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = run("bench", "kernels", "--tune")
    assert done.returncode == 2
    assert done.stderr == (
        "pvrt: pvrt bench kernels measures an NVIDIA GPU, and torch finds none here\n"
    )


def test_options_may_still_come_before_the_folder() -> None:
    done = run("bench", "--new-tokens", "4", "nowhere")
    assert (done.returncode, "nowhere is not a folder" in done.stderr) == (2, True)


def test_layers_are_measured_as_backends_fuse_them(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama")  # 128 wide, 4 heads of 32, 2 of them for k and v
    shapes = bench_kernels.fused_layers(Checkpoint.open(tmp_path))
    sizes = {(shape.out_features, shape.in_features) for shape in shapes}
    assert sizes == {(256, 128), (128, 128)}
    assert {shape.scheme for shape in shapes} == {"2x8g8"}


def test_a_malformed_scheme_is_refused_in_words() -> None:
    with pytest.raises(RunError, match="'2x9' is not a scheme"):
        bench_kernels.common_layers("2x9")


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 64, 512])
def test_candidates_are_few_and_include_the_shipped_choice(tokens: int) -> None:
    for scheme in ((2, 256, 8), (1, 65536, 8), (4, 256, 16)):
        shape = Shape(*scheme, 4096, 4096)
        found = bench_kernels.candidates(ADA, shape, tokens)
        assert 1 <= len(found) <= 12
        if tokens in (1, 8):
            assert choose.choose(ADA, shape, tokens, torch.float16, False) in found
        if shape.width == "16bit":
            assert not any(config.kernel.startswith("lut") for config in found)


def test_tuned_rules_decide_and_other_layers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choose.rules.cache_clear()
    other = Shape(2, 256, 8, 1024, 4096)
    fast, small = LaunchConfig("direct", 1, 128, 4, 7), LaunchConfig("lut", 1, 512, 4, 3)
    bench_kernels.store(ADA, {(other, 1): small})
    file = bench_kernels.store(ADA, {(SQUARE, 1): fast, (SQUARE, 16): DENSE})
    assert [path.name for path in file.parent.iterdir()] == ["nvidia-geforce-rtx-4090.json"]

    def config(shape: Shape, tokens: int) -> LaunchConfig:
        return choose.choose(ADA, shape, tokens, torch.float16, False)

    assert config(SQUARE, 1) == fast
    assert config(SQUARE, 9) == DENSE
    assert config(other, 1) == small
    bench_kernels.store(ADA, {(SQUARE, 1): small})
    choose.rules.cache_clear()
    assert config(SQUARE, 1) == small


def test_the_clock_counts_per_call() -> None:
    calls: list[int] = []
    seconds = Clock(torch.device("cpu")).time([lambda: calls.append(1)] * 4)
    assert len(calls) == 4
    assert 0 < seconds < 0.1


@pytest.mark.slow
def test_every_candidate_compiles_without_spills_where_it_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shipped = {(v.config.kernel, v.config.tokens, v.config.rows) for v in aot.shipped_variants()}
    for config in bench_kernels.candidates(ADA, SQUARE, 1):
        if config != DENSE and (config.kernel, config.tokens, config.rows) not in shipped:
            variant = aot.Variant(config, 2, 256, 8, parts=3, has_bias=True)
            assert not aot.complaints(variant, 89, aot.compile_variant(variant, 89)), variant.name


def test_a_cache_that_cannot_be_written_is_named_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"cannot write the card's table to .*file"):
        bench_kernels.check_table(ADA)
