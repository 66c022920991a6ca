"""Grids on disk: the layout against the compressed-tensors package, and the stock engines on it."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pvrt
from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import WEIGHTS_FILE
from pvrt.format.grid import GridCheckpoint, grid_config, pack, parse_grid_config, unpack
from pvrt.format.scheme import GridScheme
from pvrt.tools.report import describe
from pvrt_server.backend import choose_backend
from pvrt_server.capacity import Machine
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import TokenEvent
from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from tests.fixtures.greedy import assert_greedy, greedy
from tests.fixtures.toy import decoded, random_grid, write_toy_grid
from tests.fixtures.vllm_generate import Job, run_jobs

PROMPTS = [[256, 10, 20, 30], [256, 1, 2, 3, 4, 5, 6, 7, 8], [256, 99]]
MAX_TOKENS = 16
GRIDS = ("w2g64", "w2g64s", "w3g64", "w3g64s", "w4g64", "w4g64s")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


@pytest.fixture(scope="module")
def dense(folder: Path) -> dict[str, Any]:
    """The dense models of all grids, whose checkpoints it writes; one has biases."""
    return {
        scheme: write_toy_grid(folder / scheme, "qwen2" if scheme == "w4g64" else "llama", scheme)
        for scheme in GRIDS
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [1, 10, 33])
def test_what_is_packed_can_be_unpacked(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(1 << bits, (5, columns), generator=generator).to(torch.uint8)
    values[0] = (1 << bits) - 1  # sets the sign bit of a full word
    words = pack(values, bits)
    assert words.shape == (5, -(-columns // (32 // bits)))
    assert torch.equal(unpack(words, bits, columns), values)


@pytest.mark.parametrize("scheme", GRIDS)
def test_the_compressed_tensors_package_decodes_a_layer_alike(scheme: str) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form = GridScheme.parse(scheme)
    # 40 outputs fill no word of zeros exactly, whatever the bits; nor do 192 inputs with 3 bits.
    layer = random_grid(form, 40, 192, seed=0, dtype=torch.float32)
    state = {name.removeprefix("x."): t for name, t in layer.named("x", form)}
    (group,) = grid_config(form, [])["config_groups"].values()
    found = PackedQuantizationCompressor.decompress(state, QuantizationScheme(**group))
    assert torch.equal(found["weight"], decoded(layer, form))


@pytest.mark.parametrize("scheme", GRIDS)
def test_transformers_runs_the_folder_without_us(
    scheme: str, folder: Path, dense: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / scheme)
    tokens = torch.tensor([PROMPTS[1]])
    assert torch.equal(model(tokens).logits, dense[scheme](tokens).logits)


def test_our_own_loading_is_the_same(folder: Path, dense: dict[str, Any]) -> None:
    model = pvrt.load(folder / "w3g64", dense=True)
    tokens = torch.tensor([PROMPTS[1]])
    assert torch.equal(model(tokens).logits, dense["w3g64"](tokens).logits)


@pytest.mark.vllm
def test_vllm_runs_four_bits_and_no_fewer_on_a_cpu(folder: Path, dense: dict[str, Any]) -> None:
    """Its loader, fusing and packing are stock; see `provide_int4_product` for its product.

    In bfloat16, because the product has no float32. That moves each of these logits by up to 0.025,
    and two of them nearer or farther by 0.05.
    """
    pytest.importorskip("vllm")
    schemes = ("w4g64", "w4g64s", "w3g64", "w2g64s")
    jobs = [Job(str(folder / scheme), engine={"dtype": "bfloat16"}) for scheme in schemes]
    results = run_jobs(jobs, PROMPTS, max_tokens=MAX_TOKENS)
    for scheme, result in zip(schemes[:2], results, strict=False):
        assert "tokens" in result, result["error"]
        for prompt, tokens in zip(PROMPTS, result["tokens"], strict=True):
            assert_greedy(dense[scheme], prompt, tokens, margin=0.05)
    for result in results[2:]:
        assert result["error"].startswith("ValueError: Failed to find a kernel")


@pytest.mark.parametrize(
    ("scheme", "avx512", "problem"),
    [
        ("w4g64", True, None),
        ("w4g64", False, "grids on CPUs with AVX-512"),
        ("w3g64", True, "grids of 4 bits on a CPU, and w3g64 has 3"),
    ],
)
def test_serving_takes_the_engine_that_can_run_the_grid(
    scheme: str, avx512: bool, problem: str | None, folder: Path, dense: dict[str, Any]
) -> None:
    opened = open_model(folder / scheme)
    machine = Machine("cpu", 10**11, 10**11, vllm=Path("vllm"), avx512=avx512)
    decision = choose_backend(opened, ServeOptions(), machine)
    if problem is None:
        assert (decision.backend, decision.weights) == ("vllm", "packed")
        return
    assert (decision.backend, decision.weights) == ("local", "decoded")
    assert problem in decision.report("m")
    with pytest.raises(ServeError, match=f"{problem}.*; use --engine local"):
        choose_backend(opened, ServeOptions(engine="vllm"), machine)


@pytest.mark.parametrize("scheme", ["w3g64", "w4g64"])
def test_the_embedded_engine_runs_grids(scheme: str, folder: Path, dense: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with Engine.load(folder / scheme) as engine:
        events = [list(engine.generate(prompt, params)) for prompt in PROMPTS]
    answers = [[e.token_id for e in answer if isinstance(e, TokenEvent)] for answer in events]
    assert answers == greedy(dense[scheme], PROMPTS, MAX_TOKENS)


def test_a_missing_package_is_named(
    folder: Path, dense: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name == "compressed-tensors":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(CheckpointError, match="pip install 'compressed-tensors"):
        pvrt.load(folder / "w4g64")


def test_a_folder_is_described_and_verified(folder: Path, dense: dict[str, Any]) -> None:
    checkpoint = GridCheckpoint.open(folder / "w3g64")
    checkpoint.verify()
    report = describe(checkpoint)
    assert report["scheme"] == "w3g64"
    assert report["quantized_layers"] == 14
    # Three bits, a 3-bit zero and a 32-bit scale per 64 weights.
    assert report["bits_per_weight_linears"] == pytest.approx(3 + 35 / 64)
    layer = checkpoint.read_layer(LAYER)
    weight = dense["w3g64"].get_submodule(LAYER).weight
    assert torch.equal(decoded(layer, checkpoint.scheme), weight)


def changed(
    folder: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> Path:
    """A copy of w3g64 with `change` applied to its tensors and its config."""
    tensors = load_file(folder / "w3g64" / WEIGHTS_FILE)
    config = json.loads((folder / "w3g64" / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "no scale": (lambda t, c: t.pop(f"{LAYER}.weight_scale"), "needs .*weight_scale"),
    "no zeros": (lambda t, c: t.pop(f"{LAYER}.weight_zero_point"), "has no .*weight_zero_point"),
    "cut words": (
        lambda t, c: t.update(
            {f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:, 1:].clone()}
        ),
        r"is I32 \[128, 12\], scheme w3g64 needs I32 \[128, 13\]",
    ),
    "wrong shape": (
        lambda t, c: t.update({f"{LAYER}.weight_shape": torch.tensor([128, 64])}),
        r"weight_shape says \[128, 64\]",
    ),
    "not finite": (
        lambda t, c: t[f"{LAYER}.weight_scale"].fill_(float("nan")),
        "weight_scale holds values that are not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, folder: Path, dense: dict[str, Any], tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    broken = changed(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        GridCheckpoint.open(broken).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "float-quantized"}, "pvrt reads packed integer grids"),
        ({"config_groups": {}}, "exactly one entry"),
        ({"quant_method": "gptq"}, "does not say quant_method"),
    ],
)
def test_other_kinds_of_compressed_tensors_are_refused(
    change: dict[str, Any], message: str
) -> None:
    block = {**grid_config(GridScheme(4, 128), []), **change}
    with pytest.raises(CheckpointError, match=message):
        parse_grid_config(block, "config.json")


@pytest.mark.parametrize("scheme", [*GRIDS, "w8g128", "w4g32s"])
def test_the_config_says_the_scheme(scheme: str) -> None:
    form = GridScheme.parse(scheme)
    assert parse_grid_config(grid_config(form, ["lm_head"]), "config.json") == form
