"""Tuning on a device that is not the CPU: it runs, and finds what the CPU finds.

The simulated device computes with the CPU's own operations, so that what differs is the choice of
code: there the C library and the CPU's short cuts are not used, and near ties of a search may be
told apart otherwise.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pvrt
from pvrt.format.aqlm import Checkpoint
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.distil.loss import Teacher
from pvrt_tune.distil.student import Student
from pvrt_tune.distil.trainer import Trainer
from pvrt_tune.machine import Machine, compute_dtype
from pvrt_tune.pipeline import tune
from pvrt_tune.plan import speed
from pvrt_tune.plan.on_machine import plan_here
from pvrt_tune.pv.optimizer import STRATEGIES
from pvrt_tune.settings import PVSettings, Recipe, StrategyName, TrainSettings, TuneJob
from tests.fixtures import simulated_device
from tests.fixtures.c_library import without_c_library
from tests.fixtures.interrupted import interrupted_at
from tests.fixtures.toy import small_llama, toy_tokenizer
from tests.tune.test_pipeline import QUICK, silent

LOOP = TrainSettings(
    windows=12,
    steps=4,
    batch=2,
    microbatch=1,
    held_out=4,
    evaluate_every=2,
    compute="float32",
)
RECIPE = replace(
    QUICK,
    embeddings="keep",  # what three groups more or less change, moving tables would multiply
    length=24,
    training=LOOP,
    pv=PVSettings(learning_rate=5e-3, code_learning_rate=0.05, fraction=0.02),
)


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large enough to keep a GPU busy takes this device a minute."""
    monkeypatch.setattr(speed, "_GPU_SIZES", (64, 64, 64))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model of two small blocks, with logits worth learning."""
    folder = tmp_path_factory.mktemp("device") / "dense"
    model = small_llama(max_position_embeddings=128, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def run(dense: Path, out: Path, recipe: Recipe, device: str) -> list[str]:
    """Progress lines of a whole run, which samples its text from the model."""
    lines: list[str] = []
    tune(TuneJob(str(dense), out, recipe, device=device), lines.append)
    return lines


def manifest(out: Path) -> Any:
    return json.loads((out / "pvrt.json").read_text())


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


# ---- calibration ----


@pytest.mark.parametrize("scheme", ["2x8g8", "1x10g8", "1x12g8", "w2g64"])
def test_calibration_finds_what_it_finds_on_the_cpu(
    scheme: str, dense: Path, tmp_path: Path, device: str
) -> None:
    recipe = replace(RECIPE, scheme=scheme, training=None)
    for place in ("cpu", device):
        run(dense, tmp_path / place, recipe, place)
    blocks = [manifest(tmp_path / place)["blocks"] for place in ("cpu", device)]
    for ours, theirs in zip(*blocks, strict=True):
        # On a CPU sums that are nearly as near count as equal, and a toy's fit follows each choice.
        assert theirs["errors"] == pytest.approx(ours["errors"], rel=0.2)
        # Large codebooks hold all of a toy's values: what is left there is rounding.
        assert theirs["output_error"] == pytest.approx(ours["output_error"], rel=0.1, abs=1e-5)


# ---- PV-Tuning ----


@pytest.fixture(scope="module")
def calibrated(dense: Path) -> Path:
    """A student whose search is exact, so that near ties are the same on both."""
    out = dense.parent / "calibrated"
    run(dense, out, replace(RECIPE, scheme="1x8g8", training=None), "cpu")
    return out


def trainer(dense: Path, calibrated: Path, pv: PVSettings, device: str) -> Trainer:
    """One that has a past: LAMB's first step is as long in every group, so that rounding alone
    would decide which of them move.
    """
    tokens = torch.randint(0, 256, (12, 16), generator=torch.Generator().manual_seed(3))
    teacher = pvrt.load(dense, dtype="float32").to(device)
    data = CalibrationData(tokens, "random")
    states = Teacher(teacher, data, 4, lambda number: None, lambda number, kept: None)
    student = pvrt.load(calibrated, dtype="float32").to(device)
    made = Trainer(Student.of(student, torch.float32), states, data, replace(RECIPE, pv=pv))
    past = torch.Generator().manual_seed(5)
    for layer in made.optimizer.layers.values():
        for moment in layer.latent.moments.values() if layer.latent else ():
            moment.copy_(torch.rand(moment.shape, generator=past) * 1e-4)
    return made


@pytest.mark.parametrize(
    ("strategy", "low_memory"),
    [*((name, False) for name in STRATEGIES), ("straight-through", True), ("subspace", True)],
)
def test_every_strategy_takes_the_steps_that_it_takes_on_the_cpu(
    strategy: StrategyName, low_memory: bool, dense: Path, calibrated: Path, device: str
) -> None:
    rate = 0.005 if strategy == "stochastic" else 0.2
    pv = replace(RECIPE.pv, strategy=strategy, low_memory=low_memory, code_learning_rate=rate)
    with without_c_library():
        ours = trainer(dense, calibrated, pv, "cpu")
        theirs = trainer(dense, calibrated, pv, device)
        figures = [(ours.train_step(), theirs.train_step()) for _ in range(3)]
    for one, other in figures:
        assert other["train_kl"] == pytest.approx(one["train_kl"], rel=2e-3)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-2)
        assert other["changed"] == pytest.approx(one["changed"], abs=5e-4)  # 3 groups
    if strategy not in ("continuous", "linearized"):
        assert any(other["changed"] > 0 for _, other in figures)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations whose results the host must wait for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func is _aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        result = func(*args, **(kwargs or {}))
        left = func is _aten._to_copy.default and args[0].device != result.device
        self.count += masked or left or func in _WAITING
        return result


_aten = torch.ops.aten
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.bincount.default}


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_step_waits_once_for_every_layer(
    low_memory: bool, dense: Path, calibrated: Path, device: str
) -> None:
    ours = trainer(dense, calibrated, replace(RECIPE.pv, low_memory=low_memory), device)
    optimizer = ours.optimizer
    for weight in ours.student.weights().values():
        weight.grad = torch.ones_like(weight)
    with _Waits() as waits:  # type: ignore[no-untyped-call]
        optimizer.step(1.0, torch.Generator().manual_seed(0))
    draws = len(optimizer.layers) * low_memory  # seeds, from the CPU's generator
    assert waits.count <= len(optimizer.layers) + draws + 3


# ---- the whole run ----


#: Its search is exact, or its own near ties would tell the results apart; and PV-Tuning improves
#: on them.
WHOLE = replace(
    RECIPE,
    scheme="1x8g8",
    pv=replace(RECIPE.pv, learning_rate=2e-3, code_learning_rate=0.2),
)


@pytest.fixture(scope="module")
def whole(dense: Path) -> tuple[Path, list[str]]:
    """A whole run on the device, and its progress lines."""
    out = dense.parent / "whole"
    with simulated_device.simulated_device() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_GPU_SIZES", (64, 64, 64))
        return out, run(dense, out, WHOLE, name)


def test_a_whole_run_ends_where_the_cpus_does(
    dense: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run(dense, tmp_path / "cpu", WHOLE, "cpu")
    ours, theirs = manifest(tmp_path / "cpu"), manifest(whole[0])
    assert theirs["data"] == ours["data"]  # the text that the model wrote
    curve = theirs["pv"]["curves"]
    assert theirs["pv"]["step"] > 0 and curve[-1]["changed"] > 0
    assert theirs["pv"]["held_out_kl"] == pytest.approx(ours["pv"]["held_out_kl"], rel=0.05)


def test_embedding_and_head_come_out_as_on_the_cpu(
    dense: Path, tmp_path: Path, device: str
) -> None:
    recipe = replace(QUICK, length=24, training=replace(LOOP, steps=2))
    for place in ("cpu", device):
        run(dense, tmp_path / place.partition(":")[0], recipe, place)
    ours, theirs = (manifest(tmp_path / place.partition(":")[0]) for place in ("cpu", device))
    assert set(ours["ends"]) == {"model.embed_tokens", "lm_head"}
    for name, end in ours["ends"].items():
        assert theirs["ends"][name]["scheme"] == end["scheme"]
        assert theirs["ends"][name]["error"] == pytest.approx(end["error"], rel=0.1)
    Checkpoint.open(tmp_path / device.partition(":")[0]).verify()


def test_nothing_of_a_run_stays_on_the_device(dense: Path, tmp_path: Path, device: str) -> None:
    gc.collect()
    before = simulated_device.current_bytes()
    simulated_device.reset_peak()
    run(dense, tmp_path / "out", replace(RECIPE, scheme="w2g64"), device)
    gc.collect()
    assert simulated_device.current_bytes() == before
    model = pvrt.load(dense)
    assert simulated_device.peak_bytes() - before > sum(p.nbytes for p in model.parameters())


def test_a_run_that_is_stopped_in_both_stages_ends_with_the_same_bytes(
    dense: Path, whole: tuple[Path, list[str]], tmp_path: Path, device: str
) -> None:
    job = TuneJob(str(dense), tmp_path / "out", WHOLE, device=device)
    for line in ("block 1/2", "PV step 4/"):
        with interrupted_at(line) as tell:
            tune(job, tell)
    tune(job, silent)
    assert weights(tmp_path / "out") == weights(whole[0])


# ---- what a device has ----


def test_a_plan_counts_the_devices_memory_and_measures_its_rates(dense: Path, device: str) -> None:
    speed.measure.cache_clear()
    job = TuneJob(str(dense), Path(), RECIPE, device=device)
    report, problems = plan_here(job)
    assert problems == []
    assert f"measured on this {device} just now" in json.dumps(report)
    _, problems = plan_here(job, device_memory=0.001)
    assert problems and all("device memory" in problem for problem in problems)


def test_free_memory_of_a_device_is_its_own(device: str, tmp_path: Path) -> None:
    free = Machine.here(device, tmp_path).device
    kept = torch.zeros(1 << 20, device=device)
    assert free is not None
    assert Machine.here(device, tmp_path).device == free - kept.nbytes
    assert Machine.here("cpu", tmp_path).device is None


def test_auto_is_float32_on_a_device_without_bfloat16(device: str) -> None:
    assert compute_dtype("auto", device) is torch.float32
