"""What every stage states of its memory bounds what it allocates, and is not far above that.

Tensors are counted storage by storage: the host's by `LiveTensors`, a device's by the simulated
one. Sizes are large enough that weights, states and scores decide, each in some case.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from pvrt.format.scheme import parse_scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune import write_checkpoint
from pvrt_tune.calibrate import block_tuning, stage
from pvrt_tune.calibrate.block_tuning import Examples, finetune_block
from pvrt_tune.calibrate.ends import put_ends, schemes_of_ends
from pvrt_tune.data import text
from pvrt_tune.data.activations import Activations, in_memory, store_bytes
from pvrt_tune.data.source_model import load_skeleton, load_source
from pvrt_tune.data.text import CalibrationData, Windows
from pvrt_tune.fit import layer
from pvrt_tune.fit.layer import empty_like, quantize_linear
from pvrt_tune.model_blocks import find_blocks, linears, observe, observe_bytes, record_inputs
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.skeleton import model_shape
from pvrt_tune.pv import loss, trainer
from pvrt_tune.pv.loss import Teacher
from pvrt_tune.pv.trainer import Student, Trainer
from pvrt_tune.run import Run
from pvrt_tune.settings import (
    FinetuneSettings,
    FitSettings,
    PVSettings,
    Recipe,
    TrainSettings,
    TuneJob,
)
from pvrt_tune.store import RUN_FOLDER, Piece, Store
from tests.fixtures import simulated_device
from tests.fixtures.memory import LiveTensors
from tests.fixtures.toy import random_model, toy_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for")
CPU, DEVICE = "cpu", "device"
LEAST = FitSettings(rounds=1, kmeans_iterations=2, cg_iterations=1)
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@contextmanager
def counted(place: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """The device to compute on, and a function that begins to count or gives the peak so far."""
    gc.collect()
    if place == DEVICE:
        with simulated_device.simulated_device() as name:
            before = simulated_device.current_bytes()

            def device_peak() -> int:
                peak = simulated_device.peak_bytes() - before
                simulated_device.reset_peak()
                return peak

            yield name, device_peak
        return
    with LiveTensors() as live:

        def host_peak() -> int:
            peak: int = live.peak
            live.reset_peak()
            return peak

        yield "cpu", host_peak


def peak(place: str, make: Callable[[str], Any], work: Callable[[Any], object]) -> int:
    """Most bytes at once while `work` handles what `make` made on a device, with that itself."""
    with counted(place) as (device, taken):
        made = make(device)
        gc.collect()
        taken()
        work(made)
        most: int = taken()
        return most


def check(stated: int, measured: int, most: float = 1.25) -> None:
    print(f"stated {stated:,} measured {measured:,} ratio {stated / measured:.3f}")
    assert measured <= stated <= most * measured


def llama(**changes: Any) -> Any:
    return random_model(AutoConfig.for_model("llama", **(SIZES | changes)))


@cache
def toy(**changes: Any) -> Any:
    return llama(**changes)


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
    stated = layer.peak_bytes(shape, parse_scheme(scheme), LEAST, place)
    check(stated, peak(place, make, work) - given)


@dataclass
class Block:
    """A block at work: its inputs, the outputs wanted, and its other arguments."""

    block: nn.Module
    hidden: Activations
    targets: Activations
    arguments: dict[str, Any]


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
# Rotary tables of the longest windows here, which blocks share.
TABLES = 2 * 4 * 128 * 32


@pytest.mark.parametrize(("place", "tokens"), BLOCKS)
@pytest.mark.parametrize("changes", [{}, ATTENTIVE, WIDE], ids=["usual", "attentive", "wide"])
def test_second_moments(place: str, tokens: int, changes: dict[str, Any]) -> None:
    shape = model_shape(toy(**changes), Recipe())

    def work(made: Block) -> None:
        observe(made.block, made.hidden, made.arguments, made.targets)

    measured = peak(place, lambda device: block_at_work(changes, tokens, device), work)
    streams = 2 * store_bytes((8, tokens // 4, shape.width)) * (place == CPU)
    check(observe_bytes(shape.blocks[0], tokens, shape.width), measured - streams - TABLES)


@pytest.mark.parametrize(("place", "tokens"), BLOCKS)
@pytest.mark.parametrize("changes", [{}, ATTENTIVE, WIDE], ids=["usual", "attentive", "wide"])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x12g8", "w2g64"])
def test_block_tuning(place: str, tokens: int, changes: dict[str, Any], scheme: str) -> None:
    recipe = Recipe(scheme=scheme)
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
        finetune_block(made.block, examples, FinetuneSettings(epochs=2), generator)

    measured = peak(place, make, work)
    streams = 2 * store_bytes((8, tokens // 4, shape.width)) * (place == CPU)
    check(block_tuning.peak_bytes(shape.blocks[0], tokens), measured - streams, most=1.6)


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

    check(stage.start_bytes(shape, 4 * length), peak(DEVICE, make, stage._start))


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
        lambda made: text.from_model(made, wanted),
    )
    parameters = model_shape(model, Recipe()).parameters
    check(text.peak_bytes(model.config, wanted, parameters, 4), measured)


# ---- PV-Tuning ----


def filled(layer: nn.Module) -> nn.Module:
    """A quantised layer with random codes, codebooks and scales."""
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, 0.1, 0.05)
        else:
            parameter.data.random_(0, 4)
    return layer


def tables(model: Any, recipe: Recipe) -> Piece:
    """Embedding and output head in random codes."""
    tensors, report = {}, {}
    for name, scheme in schemes_of_ends(model, recipe).items():
        rows, width = model.get_submodule(name).weight.shape
        state = filled(AQLMLinear(width, rows, scheme, in_scales=True)).state_dict()
        tensors.update({f"{name}.{part}": tensor for part, tensor in state.items()})
        report[name] = {"scheme": str(scheme)}
    return Piece(tensors, report)


def student(recipe: Recipe, device: str, changes: dict[str, Any]) -> Any:
    """A toy with random codes, codebooks and scales."""
    model = llama(**changes)
    put_ends(model, tables(model, recipe), "cpu")
    for block in find_blocks(model).blocks:
        for name, linear in list(linears(block)):
            quantised = empty_like(linear, recipe.parsed_scheme, torch.float32)
            block.set_submodule(name, filled(quantised))
    return model.to(device)


def teacher(model: Any, windows: int, length: int) -> Teacher:
    tokens = torch.randint(0, 256, (windows, length))
    data = CalibrationData(tokens, "random")
    return Teacher(model, data, 16, lambda number: None, lambda number, kept: None)


@pytest.mark.parametrize("length", [16, 256])
def test_the_original_model_at_work(length: int) -> None:
    shape = model_shape(toy(), Recipe())
    recipe = replace(Recipe(), length=length, training=TrainSettings(windows=16, held_out=1))
    states, _ = loss.states_bytes(shape, recipe)
    measured = peak(
        CPU,
        lambda device: teacher(llama().to(device), 16, length),
        lambda made: made.prepare([0]),
    )
    check(loss.teacher_bytes(shape, length, 4, shape.parameters) + states, measured)


TRAINING = TrainSettings(windows=8, steps=2, batch=4, microbatch=2, held_out=2, compute="float32")
BASE = Recipe(length=16, embeddings="keep", training=TRAINING)


def trained(**changes: Any) -> Recipe:
    return replace(BASE, training=replace(TRAINING, **changes))


def pv(**changes: Any) -> Recipe:
    return replace(BASE, pv=PVSettings(**changes))


RECIPES = {
    "usual": BASE,
    "long windows": replace(BASE, length=256),
    "recomputed": replace(trained(recompute_activations=True), length=256),
    "embeddings": trained(freeze_embeddings=False),
    "low memory": pv(low_memory=True),
    "all groups": pv(strategy="straight-through"),
    "no codes": pv(strategy="continuous"),
    "no latent": pv(strategy="subspace"),
    "grid": replace(BASE, scheme="w2g64"),
    "large codebooks": replace(BASE, scheme="1x12g8"),
    "tables in codes": replace(BASE, embeddings="auto"),
    "streamed": trained(states="host"),
    "streamed, low memory": replace(trained(states="host"), pv=PVSettings(low_memory=True)),
    "streamed, recomputed, tables in codes": replace(
        trained(states="host", recompute_activations=True), embeddings="auto"
    ),
    "dense numbers beside tables in codes": replace(
        trained(freeze_embeddings=False), embeddings="auto"
    ),
}


@pytest.mark.parametrize("place", [CPU, DEVICE])
@pytest.mark.parametrize("name", RECIPES)
def test_training(place: str, name: str) -> None:
    recipe, changes = RECIPES[name], {"intermediate_size": 512, "num_hidden_layers": 4}
    assert recipe.training is not None
    shape = model_shape(toy(**changes), recipe)
    windows, length = recipe.windows, recipe.length
    if place == DEVICE and length > 16:
        pytest.skip("the simulated device has no fused attention")
    if place == CPU and recipe.training.states == "host":
        pytest.skip("states are where the device is")

    def make(device: str) -> Trainer:
        at_work = teacher(llama(**changes).to(device), windows, length)
        at_work.finish(lambda done, total: None)
        stream = recipe.training is not None and recipe.training.states == "host"
        made = Student.of(student(recipe, device, changes), torch.float32, stream=stream)
        return Trainer(made, at_work, at_work.data, recipe)

    def work(made: Trainer) -> None:
        for _ in range(2):
            made.train_step()

    head = 4 * shape.vocabulary * shape.width  # of the original, which its teacher keeps
    states = 2 * windows * length * shape.width * (place == CPU)
    measured = peak(place, make, work) - head - states
    check(trainer.peak_bytes(shape, recipe, 4, place), measured)


# ---- the checkpoint ----


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
