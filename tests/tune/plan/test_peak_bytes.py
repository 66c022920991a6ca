"""What every stage states of its memory bounds what it allocates, and is not far above that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvrt.format.scheme import Scheme, parse_scheme
from pvrt_tune import write_checkpoint
from pvrt_tune.calibrate import block_tuning, ends, stage
from pvrt_tune.calibrate.block_tuning import Examples, finetune_block
from pvrt_tune.data import sampled
from pvrt_tune.data.activations import Activations, in_memory, store_bytes
from pvrt_tune.data.source_model import load_skeleton, load_source
from pvrt_tune.data.text import CalibrationData, Windows
from pvrt_tune.fit import layer, table
from pvrt_tune.fit.layer import empty_like, quantize_linear
from pvrt_tune.fit.objective import feedback_bytes
from pvrt_tune.model_blocks import batch_size, find_blocks, linears, observe, observe_bytes
from pvrt_tune.model_calls import record_inputs
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.skeleton import model_shape
from pvrt_tune.run import Run
from pvrt_tune.settings import (
    FinetuneSettings,
    Recipe,
    TrainSettings,
    TuneJob,
)
from pvrt_tune.shapes import TableShape
from pvrt_tune.store import RUN_FOLDER, Store
from tests.fixtures.memory import LiveTensors
from tests.fixtures.peaks import CPU, DEVICE, LEAST, check, llama, peak, toy
from tests.fixtures.toy import toy_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for")
# ---- calibration ----


@pytest.mark.parametrize("place", [CPU, DEVICE])
@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("2x8g8", (256, 768)),
        ("2x8g8", (768, 256)),
        ("4x8g8", (768, 256)),
        ("2x4g8", (768, 256)),
        ("1x12g8", (512, 256)),
        ("w2g64", (256, 768)),
        ("w4g64s", (768, 256)),
    ],
)
def test_a_layer_fit(place: str, scheme: str, shape: tuple[int, int]) -> None:
    out, inputs = shape
    recipe = Recipe(scheme=scheme, fit=LEAST)

    def make(device: str) -> tuple[nn.Linear, Tensor]:
        linear = nn.Linear(inputs, out, bias=False).requires_grad_(False).to(device)
        x = torch.randn(2 * inputs, inputs).to(device)
        return linear, x.T @ x / len(x)

    def work(made: tuple[nn.Linear, Tensor]) -> None:
        quantize_linear(*made, recipe, torch.Generator().manual_seed(0), torch.bfloat16)

    given = 4 * inputs * (inputs + out)
    form = parse_scheme(scheme)
    stated = layer.peak_bytes(shape, form, LEAST, place)
    # The simulated device does not see cuSOLVER's workspace.
    decided = feedback_bytes(inputs, place) > layer.peak_bytes(shape, form, LEAST, CPU)
    check(stated, peak(place, make, work) - given, most=1.4 if decided else 1.25)


@pytest.mark.parametrize("place", [CPU, DEVICE])
@pytest.mark.parametrize("scheme", ["4x8g8", "2x8g4"])
def test_a_table_fit(place: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of its rows; codebooks are fitted on some of them."""
    for module in (table, ends):
        monkeypatch.setattr(module, "ROWS", 512)
    monkeypatch.setattr(table, "FITTED_ON", 256)
    rows, width = 1536, 256
    recipe = Recipe(scheme=scheme, fit=LEAST)

    def make(device: str) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, width).bfloat16().to(device), torch.eye(width).to(device)

    def work(made: tuple[Tensor, Tensor]) -> None:
        table.fit_table(*made, recipe, torch.Generator().manual_seed(0))

    shape = TableShape(rows, width, Scheme.parse(scheme))
    check(ends.peak_bytes(shape, LEAST, 2, place), peak(place, make, work))


@dataclass
class Block:
    """A block at work: its inputs, the outputs wanted, and its other arguments."""

    block: nn.Module
    hidden: Activations
    targets: Activations
    arguments: list[dict[str, Any]]


def block_at_work(changes: dict[str, Any], tokens: int, device: str) -> Block:
    """The first block of a toy, and hidden states of two batches of four windows."""
    model = llama(**changes)
    samples, length = 8, tokens // 4
    shape = samples, length, model.config.hidden_size
    hidden = Activations(in_memory(shape), 4, device)
    ids = torch.randint(0, 256, (samples, length))
    model = model.to(device)
    arguments = record_inputs(model, find_blocks(model), ids, 4, hidden)
    targets = Activations(torch.randn(shape), 4, device)
    block = find_blocks(model).blocks[0].requires_grad_(False)
    return Block(block, hidden, targets, arguments[0])


MORE_KEYS = {"num_key_value_heads": 4}
ATTENTIVE = {"intermediate_size": 128}
WIDE = {"intermediate_size": 1024}
# The simulated device has no fused attention: there windows are short.
BLOCKS = [(CPU, 64), (CPU, 512), (DEVICE, 32)]
SHAPES = [{}, ATTENTIVE, WIDE]
SCHEMES = ["2x8g8", "1x12g8", "w2g64"]
# Every two of place, shape and scheme meet once.
SQUARE = [
    (*BLOCKS[row], SHAPES[column], SCHEMES[(row + column) % 3])
    for row in range(3)
    for column in range(3)
]
# Rotary tables of the longest windows here, which blocks share.
TABLES = 2 * 4 * 128 * 32


@pytest.mark.parametrize(("place", "tokens"), BLOCKS)
@pytest.mark.parametrize("changes", SHAPES, ids=["usual", "attentive", "wide"])
def test_second_moments(place: str, tokens: int, changes: dict[str, Any]) -> None:
    shape = model_shape(toy(**changes), Recipe())

    def work(made: Block) -> None:
        observe(made.block, made.hidden, made.arguments, made.targets)

    measured = peak(place, lambda device: block_at_work(changes, tokens, device), work)
    streams = 2 * store_bytes((8, tokens // 4, shape.width)) * (place == CPU)
    check(observe_bytes(shape.blocks[0], tokens, shape.width), measured - streams - TABLES)


@pytest.mark.parametrize(("place", "tokens", "changes", "scheme"), SQUARE)
@pytest.mark.parametrize("move_codes", [True, False], ids=["codes", "floats"])
def test_block_tuning(
    place: str, tokens: int, changes: dict[str, Any], scheme: str, move_codes: bool
) -> None:
    settings = FinetuneSettings(epochs=2, move_codes=move_codes)
    recipe = Recipe(scheme=scheme, finetune=settings)
    shape = model_shape(toy(**changes), recipe)

    def make(device: str) -> Block:
        made = block_at_work(changes, tokens, device)
        for name, linear in list(linears(made.block)):
            quantised = empty_like(linear, recipe.parsed_scheme, torch.float32)
            made.block.set_submodule(name, quantised.to(device))
        return made

    def work(made: Block) -> None:
        examples = Examples(made.hidden, made.targets, made.arguments)
        generator = torch.Generator().manual_seed(0)
        finetune_block(made.block, examples, settings, torch.float32, generator)

    measured = peak(place, make, work)
    streams = 2 * store_bytes((8, tokens // 4, shape.width)) * (place == CPU)
    predicted = block_tuning.peak_bytes(shape, recipe, tokens, 4, place)
    # The plan counts a search of as many groups as may move, and few do here.
    check(predicted, measured - streams - TABLES, most=1.85 if move_codes else 1.6)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    llama().to(torch.bfloat16).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def a_run(dense: Path, out: Path, recipe: Recipe, device: str) -> Run:
    """A run at its beginning, with random text."""
    source = load_source(str(dense))
    tokens = torch.randint(0, 256, (recipe.windows, recipe.length))
    data = CalibrationData(tokens, "random")
    job = TuneJob(str(dense), out, recipe, device=device)
    store = Store(out / RUN_FOLDER, writes=False)
    return Run(job, source, find_blocks(source.model), data, store, lambda line: None)


@pytest.mark.parametrize("length", [8, 256])
def test_the_start(dense: Path, tmp_path: Path, length: int) -> None:
    recipe = Recipe(samples=8, length=length)
    shape = model_shape(load_skeleton(str(dense)), recipe)

    def make(device: str) -> Run:
        return a_run(dense, tmp_path, recipe, device)

    batch = batch_size(recipe.samples, length) * length
    check(stage.start_bytes(shape, batch), peak(DEVICE, make, stage._start))


@pytest.mark.parametrize(
    ("place", "windows", "length", "changes"),
    [
        (CPU, 4, 16, {}),
        (CPU, 32, 96, {}),
        (CPU, 64, 16, {"vocab_size": 4096}),
        # Without fused attention keys are copied for all heads that share them.
        (DEVICE, 32, 96, MORE_KEYS),
    ],
)
def test_sampling(place: str, windows: int, length: int, changes: dict[str, Any]) -> None:
    wanted, model = Windows(windows, length, 0), toy(**changes)
    measured = peak(
        place,
        lambda device: llama(**changes).to(device),
        lambda made: sampled.from_model(made, wanted),
    )
    parameters = model_shape(model, Recipe()).parameters
    check(sampled.peak_bytes(model.config, wanted, parameters, 4), measured)


# ---- the checkpoint ----


TRAINING = TrainSettings(windows=8, steps=2, batch=4, microbatch=2, held_out=2, compute="float32")


@pytest.mark.parametrize(("scheme", "training"), [("w2g64", None), ("1x12g8", TRAINING)])
def test_writing(
    dense: Path,
    tmp_path: Path,
    scheme: str,
    training: TrainSettings | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = FinetuneSettings(epochs=1)
    recipe = Recipe(scheme, samples=4, length=16, fit=LEAST, finetune=quick, training=training)
    peaks: list[int] = []

    def watched(*arguments: Any) -> None:
        with LiveTensors(mapped=False) as live:
            write_checkpoint.write(*arguments)
        peaks.append(live.peak)

    monkeypatch.setattr("pvrt_tune.pipeline.write", watched)
    tune(TuneJob(str(dense), tmp_path, recipe), lambda line: None)
    shape = model_shape(load_skeleton(str(dense)), recipe)
    check(write_checkpoint.peak_bytes(shape, recipe), max(peaks), most=1.5)
