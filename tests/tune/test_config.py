"""Recipes in files: what is read back is what was written, and mistakes are named."""

from dataclasses import replace
from pathlib import Path

import pytest

from pvrt.errors import RunError
from pvrt_tune.config import as_yaml, from_file
from pvrt_tune.options import Changes, build
from pvrt_tune.pv import PVSettings
from pvrt_tune.recipe import EFFORTS, Recipe
from pvrt_tune.training import TrainSettings


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_setting_survives_a_file(tmp_path: Path, effort: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(EFFORTS[effort]))
    assert from_file(file, Recipe(seed=99)) == EFFORTS[effort]


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"samples": 7, "pv": {"steps": 9, "pv": {"betas": [0, 0.5]}}}')
    settings = TrainSettings(steps=9, pv=PVSettings(betas=(0.0, 0.5)))
    assert from_file(file, Recipe()) == replace(Recipe(), samples=7, pv=settings)
    file.write_text("pv: null")
    assert from_file(file, EFFORTS["best"]).pv is None


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[1, 2]", "holds no settings"),
        ("a: [", "neither YAML nor JSON"),
        ("sample: 3", "did you mean samples"),
        ("samples: many", "samples takes a value of type int, not 'many'"),
        ("samples: true", "samples takes a value of type int, not True"),
        ("fit: 3", "fit takes settings of its own"),
        ("fit: {round: 3}", "fit has no setting round; did you mean rounds"),
        ("targets: other", "it can be quantised, original"),
        ("pv: {pv: {betas: [1]}}", "takes 2 numbers"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RunError, match=sentence) as caught:
        from_file(file, Recipe())
    assert "\n" not in str(caught.value)


def test_what_is_typed_beats_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("samples: 7\nseed: 5\nscheme: 1x8g8")
    recipe, limit = build("quick", file, Changes(scheme="w4g64", length=99), "1h5m")
    assert (recipe.scheme, recipe.samples, recipe.length, recipe.seed) == ("w4g64", 7, 99, 5)
    assert recipe.fit == EFFORTS["quick"].fit
    assert recipe.pv == TrainSettings()  # a time limit asks for it
    assert limit == 3900
    assert build("standard", None, Changes(pv=False))[0].pv is None


@pytest.mark.parametrize("limit, pv", [("soon", True), ("", True), ("40", True), ("40m", False)])
def test_bad_limits_are_one_sentence(limit: str, pv: bool) -> None:
    with pytest.raises(RunError, match="--for"):
        build("standard", None, Changes(pv=pv), limit)
