"""Recipes in files: what is read back is what was written, and mistakes are named."""

import math
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.errors import RunError
from pvrt_tune.pv.optimizer import STRATEGIES
from pvrt_tune.settings import (
    EFFORTS,
    FinetuneSettings,
    FitSettings,
    PVSettings,
    Recipe,
    StrategyName,
    TrainSettings,
)
from pvrt_tune.settings.files import as_yaml, from_file
from pvrt_tune.settings.options import Changes, build, seconds


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_setting_survives_a_file(tmp_path: Path, effort: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(EFFORTS[effort]))
    assert from_file(file, Recipe(seed=99)) == EFFORTS[effort]


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"samples": 7, "training": {"steps": 9}, "pv": {"betas": [0, 0.5]}}')
    wanted = Recipe(samples=7, training=TrainSettings(steps=9), pv=PVSettings(betas=(0.0, 0.5)))
    lines: list[str] = []
    assert from_file(file, Recipe(), lines.append) == wanted
    file.write_text("training: null")
    without = replace(EFFORTS["best"], training=None)
    assert from_file(file, EFFORTS["best"], lines.append) == without
    assert lines == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pv: null", "training: null"),
        ("pv: {}", "training: {}"),
        ("pv: {steps: 9}", "training: {steps: 9}"),
        ("pv: {pv: {fraction: 0.5}}", "{training: {}, pv: {fraction: 0.5}}"),
        ("pv: {steps: 9, pv: {fraction: 0.5}}", "{training: {steps: 9}, pv: {fraction: 0.5}}"),
    ],
)
@pytest.mark.parametrize("effort", EFFORTS)
def test_the_spelling_of_version_0_1_means_the_same_and_gets_a_notice(
    tmp_path: Path, effort: str, old: str, new: str
) -> None:
    then, now = tmp_path / "old.yaml", tmp_path / "new.yaml"
    then.write_text(old)
    now.write_text(new)
    lines: list[str] = []
    recipe = from_file(then, EFFORTS[effort], lines.append)
    assert len(lines) == 1 and str(then) in lines[0] and "training" in lines[0]
    assert recipe == from_file(now, EFFORTS[effort], lines.append)
    assert len(lines) == 1


def test_of_the_settings_of_steps_only_those_taken_are_recorded() -> None:
    """Runs without PV-Tuning are the same run whatever its steps would have been."""
    assert "pv" not in replace(EFFORTS["best"], training=None).record()
    assert EFFORTS["best"].record()["pv"]["code_learning_rate"] == 1e-2


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[1, 2]", "holds no settings"),
        ("a: [", "neither YAML nor JSON"),
        ("sample: 3", "did you mean samples"),
        ("samples: many", "samples takes a value of type int, not 'many'"),
        ("samples: true", "samples takes a value of type int, not True"),
        ("fit: 3", "fit takes settings of its own"),
        ("scheme: {samples: 3}", "scheme takes a value of type str, not {'samples': 3}"),
        ("fit: {round: 3}", "fit has no setting round; did you mean rounds"),
        ("targets: other", "targets is 'other'; it can be 'quantised' or 'original'"),
        ("pv: {betas: [0.5]}", r"pv.betas takes 2 numbers, not \[0.5\]"),
        ("pv: {betas: 0.5}", r"pv.betas takes 2 numbers, not 0.5"),
        ("pv: {betas: [0, 0, 0]}", "pv.betas takes 2 numbers"),
        ("pv: {betas: [0, 1]}", "pv.betas.1 is 1; it must be at least 0 and below 1"),
        ("pv: {fractoin: 1}", "pv has no setting fractoin; did you mean fraction"),
        ("pv: {pv: {fractoin: 1}}", "pv has no setting fractoin; did you mean fraction"),
        ("{training: {}, pv: {steps: 1}}", "pv has no setting steps; it knows strategy"),
        ("pv: 3", "pv takes settings of its own"),
        ("{3: 4}", "there is no setting 3; it knows scheme, bits"),
        ("training: {3: 4}", "training has no setting 3; it knows windows"),
        ('pv: {strategy: "\\ud800x"}', "pv.strategy is .*, which is no text"),
        ('training: {states: "\\ud800x"}', "training.states is .*, which is no text"),
        ("training: {1: {2: 3}}", "training has no setting 1; it knows windows"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RunError, match=sentence) as caught:
        from_file(file, Recipe())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, changes, sentence",
    [
        (Recipe(), {"samples": 0}, "samples is 0; it must be at least 1"),
        (Recipe(), {"length": 1}, "length is 1; it must be at least 8"),
        (Recipe(), {"seed": -1}, "seed is -1; it must be at least 0 and below 9.2"),
        (Recipe(), {"seed": 2**70}, "seed is 1180591620717411303424; it must be"),
        (Recipe(), {"scheme": "2x8"}, "scheme: '2x8' is not a scheme"),
        (Recipe(), {"scheme": "2x8g8o4"}, "span 4 outputs, .*; give 2x8g8, say"),
        (Recipe(), {"scheme": "2x99g8"}, "scheme: nbits_per_codebook must be"),
        (FitSettings(), {"rounds": -1}, "rounds is -1; it must be at least 0"),
        (FitSettings(), {"kmeans_iterations": 0}, "kmeans_iterations is 0"),
        (FitSettings(), {"kmeans_momentum": 1.0}, "kmeans_momentum is 1.0; .* below 1"),
        (FitSettings(), {"beam": 0}, "beam is 0; it must be at least 1"),
        (FitSettings(), {"probes": 0}, "probes is 0; it must be at least 1"),
        (FitSettings(), {"cg_iterations": 0}, "cg_iterations is 0; it must be at least 1"),
        (FitSettings(), {"damping": 0.0}, "damping is 0.0; it must be above 0"),
        (FitSettings(), {"damping": math.inf}, "damping is inf; it must be above 0 and finite"),
        (FitSettings(), {"column_block": 0}, "column_block is 0"),
        (FinetuneSettings(), {"epochs": -1}, "epochs is -1; it must be at least 0"),
        (FinetuneSettings(), {"learning_rate": -1e-3}, "learning_rate is -0.001"),
        (FinetuneSettings(), {"held_out": 0.0}, "held_out is 0.0; .* above 0 and below 1"),
        (FinetuneSettings(), {"held_out": 1.0}, "held_out is 1.0; .* above 0 and below 1"),
        (TrainSettings(), {"windows": 0}, "windows is 0"),
        (TrainSettings(), {"steps": 0}, "steps is 0"),
        (TrainSettings(), {"batch": 0}, "batch is 0"),
        (TrainSettings(), {"microbatch": 0}, "microbatch is 0"),
        (TrainSettings(), {"held_out": 0}, "held_out is 0; it must be at least 1"),
        (TrainSettings(), {"evaluate_every": 0}, "evaluate_every is 0"),
        (TrainSettings(), {"patience": 0}, "patience is 0"),
        (TrainSettings(), {"warmup": 1.5}, "warmup is 1.5; .* at least 0 and at most 1"),
        (TrainSettings(), {"compute": "float64"}, "it can be 'auto', 'float32' or 'bfloat16'"),
        (TrainSettings(), {"freeze_embeddings": 1}, "takes a value of type bool, not 1"),
        (PVSettings(), {"strategy": "straight"}, "strategy is 'straight'; .*'straight-through'"),
        (PVSettings(), {"learning_rate": 2.0}, "learning_rate is 2.0; .* at most 1"),
        (PVSettings(), {"learning_rate": math.nan}, "learning_rate is nan"),
        (PVSettings(), {"code_learning_rate": -0.1}, "code_learning_rate is -0.1"),
        (PVSettings(), {"betas": (1.0, 0.9)}, "betas.0 is 1.0; .* below 1"),
        (PVSettings(), {"code_beta": 1.0}, "code_beta is 1.0; .* below 1"),
        (PVSettings(), {"fraction": 0.0}, "fraction is 0.0; .* above 0 and at most 1"),
        (PVSettings(), {"fraction": 1.1}, "fraction is 1.1; .* above 0 and at most 1"),
        (PVSettings(), {"gain_pool": 0}, "gain_pool is 0"),
        (PVSettings(), {"clip_norm": 0.0}, "clip_norm is 0.0; it must be above 0"),
    ],
)
def test_every_setting_has_a_range_in_code_in_files_and_in_copies(
    tmp_path: Path, settings: Any, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RunError, match=sentence):
        type(settings)(**changes)
    with pytest.raises(RunError, match=sentence) as caught:
        replace(settings, **changes)
    assert "\n" not in str(caught.value)
    place = {
        Recipe: "{}",
        FitSettings: "fit: {}",
        FinetuneSettings: "finetune: {}",
        TrainSettings: "training: {}",
        PVSettings: "pv: {}",
    }[type(settings)]
    file = tmp_path / "recipe.yaml"
    flow = yaml.safe_dump(
        {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()},
        default_flow_style=True,
    )
    file.write_text(place.format(flow.strip()))
    with pytest.raises(RunError, match=sentence) as caught:
        from_file(file, Recipe())
    assert str(caught.value).startswith(f"{file}: ")


def test_every_number_and_choice_of_the_settings_is_bounded() -> None:
    """A setting that is added later without a range is found here, not in a run."""
    for kind in (Recipe, TrainSettings, PVSettings, FitSettings, FinetuneSettings):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            parts = get_args(hint) if get_origin(hint) in (tuple, Union, UnionType) else (hint,)
            assert not {int, float, str, bool} & set(parts), f"{kind.__name__}.{name}"


def test_every_strategy_has_its_name() -> None:
    assert set(get_args(StrategyName)) == STRATEGIES.keys()


@pytest.mark.parametrize("command", ["tune", "plan"])
@pytest.mark.parametrize(
    "option, value, sentence",
    [
        ("--samples", "0", "--samples is 0; it must be at least 1"),
        ("--length", "1", "--length is 1; it must be at least 8"),
        ("--scheme", "2x8g8o4", "--scheme: 2x8g8o4 has groups that span 4 outputs"),
        ("--scheme", "2x8", "--scheme: '2x8' is not a scheme"),
    ],
)
def test_options_pass_the_same_check(
    tmp_path: Path, command: str, option: str, value: str, sentence: str
) -> None:
    out = ["-o", str(tmp_path / "out")] if command == "tune" else []
    refused = CliRunner().invoke(app, [command, str(tmp_path), option, value, *out])
    assert isinstance(refused.exception, RunError)  # main() makes it one line and exit code 2
    assert str(refused.exception).startswith(sentence)


def test_what_is_typed_beats_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("samples: 7\nseed: 5\nscheme: 1x8g8")
    recipe = build("quick", file, Changes(scheme="w4g64", length=99), seconds("1h5m"))
    assert (recipe.scheme, recipe.samples, recipe.length, recipe.seed) == ("w4g64", 7, 99, 5)
    assert recipe.fit == EFFORTS["quick"].fit
    assert recipe.training == TrainSettings()  # a time limit asks for it
    assert seconds("1h5m") == 3900
    assert build("standard", None, Changes(pv=False)).training is None


@pytest.mark.parametrize("limit, pv", [("soon", True), ("", True), ("40", True), ("40m", False)])
def test_bad_limits_are_one_sentence(limit: str, pv: bool) -> None:
    with pytest.raises(RunError, match="--for"):
        build("standard", None, Changes(pv=pv), seconds(limit))


def test_bits_and_a_scheme_exclude_each_other() -> None:
    with pytest.raises(RunError, match="give either"):
        build("quick", None, Changes(scheme="2x8g8", bits=2.5))
    recipe = build("quick", None, Changes(bits=2.5))
    assert recipe.bits == 2.5
    assert recipe.record()["bits"] == 2.5
    assert "bits" not in build("quick", None, Changes()).record()


def test_a_scheme_that_is_typed_replaces_the_bits_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("bits: 3")
    assert build("quick", file, Changes()).bits == 3.0
    assert build("quick", file, Changes(scheme="2x8g8")).bits is None


def test_bits_are_not_shared_out_over_grids() -> None:
    with pytest.raises(RunError, match="w4g128 is a grid"):
        Recipe(scheme="w4g128", bits=4.0)
