"""Streamed weights: a student that its device never holds learns the same, bit by bit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pvrt.errors import RunError
from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune import parallel
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil.loss import Teacher
from pvrt_tune.distil.student import Student
from pvrt_tune.distil.trainer import Trainer
from pvrt_tune.parallel import Rows
from pvrt_tune.plan.skeleton import model_shape
from pvrt_tune.pv import host_memory, optimizer
from pvrt_tune.pv.host_memory import HostMemory, Slabs, slab_bytes
from pvrt_tune.pv.representation import represent
from pvrt_tune.pv.streamed import StreamedLinear, StreamedWeight
from pvrt_tune.settings import PVSettings, Recipe, TrainSettings
from tests.fixtures.c_library import without_c_library
from tests.fixtures.peaks import llama, toy
from tests.fixtures.toy import toy_model
from tests.tune.plan.test_training_bytes import filled
from tests.tune.plan.test_training_bytes import student as with_random_codes

TRAINING = TrainSettings(
    windows=12, steps=4, batch=4, microbatch=2, held_out=2, evaluate_every=2, compute="float32"
)
RECIPE = Recipe(length=16, training=TRAINING, pv=PVSettings(code_learning_rate=0.1, fraction=0.05))


def trainer(recipe: Recipe, device: str, *, stream: bool, architecture: str = "llama") -> Trainer:
    """One on random codes and text."""
    training = recipe.training
    assert training is not None
    tokens = torch.randint(0, 256, (14, 16), generator=torch.Generator().manual_seed(1))
    data = CalibrationData(tokens, "random")
    model = (llama() if architecture == "llama" else toy_model(architecture)).to(device)
    states = Teacher(model, data, 4, lambda number: None, lambda number, kept: None)
    torch.manual_seed(2)
    student = with_random_codes(recipe, "cpu", {}) if architecture == "llama" else None
    if student is None:
        student = toy_model(architecture, seed=5)
        for name, module in list(student.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in name:
                shape, bias = (module.in_features, module.out_features), module.bias is not None
                layer = filled(AQLMLinear(*shape, Scheme.parse("2x8g8"), bias))
                student.set_submodule(name, layer)
    compute = torch.bfloat16 if training.compute == "bfloat16" else torch.float32
    return Trainer(Student.of(student.to(device), compute, stream=stream), states, data, recipe)


def with_training(**changes: Any) -> Recipe:
    return replace(RECIPE, training=replace(TRAINING, **changes))


def state(of: Trainer) -> dict[str, Tensor]:
    """All that is trained and kept, on the host."""
    return {
        name: rows.local.detach().cpu().clone() for name, rows in of.optimizer.tensors().items()
    }


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


CASES: dict[str, Recipe] = {
    "usual": RECIPE,
    "at once": with_training(microbatch=4),
    "recomputed": with_training(recompute_activations=True),
    "bfloat16": with_training(compute="bfloat16"),
    "low memory": replace(RECIPE, pv=replace(RECIPE.pv, low_memory=True)),
    "grid": replace(RECIPE, scheme="w2g64", embeddings="keep"),
    "subspace": replace(RECIPE, pv=replace(RECIPE.pv, strategy="subspace")),
    "no codes": replace(RECIPE, pv=replace(RECIPE.pv, strategy="continuous")),
    "dense embeddings": replace(with_training(freeze_embeddings=False), embeddings="keep"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_learns_the_same(name: str) -> None:
    learn_the_same(CASES[name], "cpu", "llama")


@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
def test_layers_with_biases_and_tied_heads_learn_the_same(architecture: str) -> None:
    learn_the_same(replace(RECIPE, embeddings="keep"), "cpu", architecture)


@pytest.mark.parametrize("name", ["usual", "low memory", "recomputed"])
def test_on_a_device_it_learns_the_same(name: str, device: str) -> None:
    with without_c_library():
        learn_the_same(CASES[name], device, "llama")


def learn_the_same(recipe: Recipe, device: str, architecture: str) -> None:
    held, streamed = (
        trainer(recipe, device, stream=stream, architecture=architecture)
        for stream in (False, True)
    )
    before = state(held)
    for _ in range(3):
        ours, theirs = streamed.train_step(), held.train_step()
        for figure in ("train_kl", "gradient_norm", "changed"):
            assert ours[figure] == theirs[figure]
    assert streamed.held_out_kl() == held.held_out_kl()
    assert_same(state(streamed), state(held))
    moved = {name for name, tensor in state(held).items() if not torch.equal(tensor, before[name])}
    assert any("codebooks" in name or "scales" in name for name in moved)
    if recipe.pv.strategy != "continuous":
        assert any(name.endswith(".codes") for name in moved)


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_in_the_other_way(first: bool, device: str) -> None:
    """What one saves, the other goes on from."""
    with without_c_library():
        one = trainer(RECIPE, device, stream=first)
        other = trainer(RECIPE, device, stream=not first)
        one.train_step()
        saved = state(one)

        def fill(tensors: Mapping[str, Rows]) -> None:
            for name, rows in tensors.items():
                rows.local.copy_(saved[name])

        other.step = 1
        other.optimizer.resume(1, fill)
        assert one.train_step()["train_kl"] == other.train_step()["train_kl"]
        assert_same(state(other), state(one))


def test_a_streamed_layer_is_a_linear_layer(device: str) -> None:
    """In one dimension and in three, with inputs that need a gradient and that do not."""
    layer = filled(AQLMLinear(32, 24, Scheme.parse("2x4g8"), bias=True)).to(device)
    assert isinstance(layer, AQLMLinear) and layer.bias is not None
    weight = StreamedWeight(represent(layer), torch.float32, HostMemory(torch.device(device)))
    streamed = StreamedLinear(weight, nn.Parameter(layer.bias.detach().clone()))
    dense = layer.to_dense().requires_grad_()
    for shape, wanted in (((32,), True), ((2, 3, 32), False), ((5, 32), True)):
        x = torch.randn(*shape).to(device)
        ours, theirs = (x.clone().requires_grad_(wanted) for _ in range(2))
        y, expected = streamed(ours), dense(theirs)
        torch.testing.assert_close(y.cpu(), expected.cpu())
        y.square().sum().backward()
        expected.square().sum().backward()
        if wanted:
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad.cpu())
    # Of all three passes.
    assert weight.grad is not None and streamed.bias is not None
    torch.testing.assert_close(weight.grad.cpu(), dense.weight.grad.cpu())  # type: ignore[union-attr]
    torch.testing.assert_close(streamed.bias.grad.cpu(), dense.bias.grad.cpu())  # type: ignore[union-attr]
    weight.grad = None
    assert weight.grad is None


def test_several_processes_cannot_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(RunError, match="states: host"):
        Student.of(toy(), torch.float32, stream=True)


# ---- host memory ----


def test_tensors_fill_the_gaps_that_larger_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_SLAB", 4096)
    slabs = Slabs()
    assert [slabs.place(size) for size in (3000, 2000, 600, 5000, 500)] == [
        (0, 0),
        (1, 0),
        (0, 3072),
        (2, 0),
        (1, 2048),
    ]
    assert slab_bytes((3000, 2000, 600, 5000, 500)) == 4096 + 4096 + 5120
    host = HostMemory(torch.device("cpu"))
    made = [host.keep(torch.full((n,), float(n))) for n in (700, 500, 150, 1250, 125)]
    assert all(torch.equal(t, torch.full((len(t),), float(len(t)))) for t in made)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_host_memory_stated_is_what_is_taken(
    low_memory: bool, compute: Literal["float32", "bfloat16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_SLAB", 4096)
    recipe = replace(with_training(compute=compute), pv=PVSettings(low_memory=low_memory))
    made = trainer(recipe, "cpu", stream=True)
    hosts = {id(weight.host): weight.host for weight in made.student.streamed.values()}
    (host,) = hosts.values()
    taken = sum(memory.nbytes for memory in host._memory)
    item = 4 if compute == "float32" else 2
    assert optimizer.streamed_bytes(model_shape(toy(), recipe), recipe.pv, item) == taken
