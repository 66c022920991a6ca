"""From the options of a command to a recipe: preset, then file, then what was typed."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pvrt.errors import RunError
from pvrt.format.grid import open_checkpoint
from pvrt_tune.progress import Report
from pvrt_tune.settings.files import from_file
from pvrt_tune.settings.recipe import EFFORTS, Recipe, TrainSettings


@dataclass(frozen=True)
class Changes:
    """Options that override the preset and the file; None leaves a setting alone."""

    scheme: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    pv: bool = True
    embeddings: str | None = None
    bits: float | None = None


def build(
    effort: str,
    config: Path | None,
    changes: Changes,
    limit: str | None = None,
    report: Report = print,
) -> tuple[Recipe, float | None]:
    """The recipe, and the time limit in seconds.

    A limit asks for PV-Tuning at any effort. `report` gets notices about the file. Raises RunError
    with one sentence for what cannot be.
    """
    if changes.bits is not None and changes.scheme is not None:
        raise RunError(
            "--bits chooses schemes layer by layer, --scheme is one for all; give either"
        )
    recipe = EFFORTS[effort] if config is None else from_file(config, EFFORTS[effort], report)
    named = {field.name: getattr(changes, field.name) for field in fields(changes)}
    typed = {name: value for name, value in named.items() if value is not None and name != "pv"}
    if changes.scheme is not None:
        typed["bits"] = None
    try:
        recipe = replace(recipe, **typed)
    except RunError as error:  # an option has the name of its setting
        raise RunError(f"--{error}") from error
    if limit is None:
        return recipe if changes.pv else replace(recipe, training=None), None
    if not changes.pv:
        raise RunError("--for limits PV-Tuning, which --no-pv leaves out; give one of them")
    return replace(recipe, training=recipe.training or TrainSettings()), seconds(limit)


@dataclass(frozen=True)
class Beginning:
    """What is tuned: a dense model, and the checkpoint of it to begin with, if not the model alone.

    Made of MODEL and --from as they are typed.
    """

    model: str
    start: Path | None = None

    @classmethod
    def of(cls, model: str, original: str | None) -> "Beginning":
        return cls(model) if original is None else cls(original, Path(model))

    def recipe(self, recipe: Recipe, changes: Changes) -> Recipe:
        """A recipe as it is for a dense model; from a checkpoint, PV-Tuning of its scheme.

        Raises RunError for options that a checkpoint leaves nothing to, and CheckpointError where
        there is none.
        """
        if self.start is None:
            return recipe
        given = (changes.scheme, changes.bits, changes.embeddings, changes.samples)
        names = ("--scheme", "--bits", "--keep-embeddings", "--samples")
        for name, value in (*zip(names, given, strict=True), ("--no-pv", not changes.pv or None)):
            if value is not None:
                raise RunError(f"--from tunes the codes of a checkpoint; leave {name} out")
        scheme = open_checkpoint(self.start).schemes[0]
        training = recipe.training or TrainSettings()
        return replace(recipe, scheme=str(scheme), bits=None, training=training)


def seconds(text: str) -> float:
    """A time like 90s, 40m or 2h30m in seconds; RunError for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if match is None or not any(match.groups()):
        raise RunError(f"--for {text} is not a time; write it like 40m or 2h30m")
    parts = [int(part or 0) for part in match.groups()]
    return float(3600 * parts[0] + 60 * parts[1] + parts[2])
