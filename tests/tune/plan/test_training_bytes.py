"""What PV-Tuning states of its memory bounds what it allocates, and is not far above that."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.calibrate.ends import put_ends, schemes_of_ends
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil import loss, trainer
from pvrt_tune.distil.loss import Teacher
from pvrt_tune.distil.student import Student
from pvrt_tune.distil.trainer import Trainer
from pvrt_tune.fit.layer import empty_like
from pvrt_tune.model_blocks import find_blocks, linears
from pvrt_tune.plan.skeleton import model_shape
from pvrt_tune.settings import (
    PVSettings,
    Recipe,
    TrainSettings,
)
from pvrt_tune.store import Piece
from tests.fixtures.peaks import CPU, DEVICE, check, llama, peak, toy

pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for")


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
