"""From the options of a command to a recipe: preset, then file, then what was typed."""

import re
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path

from pvrt.errors import RunError
from pvrt.format.grid import open_checkpoint
from pvrt_tune.progress import Report
from pvrt_tune.settings.files import from_file
from pvrt_tune.settings.recipe import EFFORTS, Recipe, TrainSettings


@dataclass(frozen=True)
class Changes:
    """Options that override the preset and the file; None leaves a setting alone. start: the
    checkpoint to begin with, whose scheme is the recipe's, instead of calibration.
    """

    scheme: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    pv: bool = True
    embeddings: str | None = None
    bits: float | None = None
    start: Path | None = None


def build(
    effort: str,
    config: Path | None,
    changes: Changes,
    limit: float | None = None,
    report: Report = print,
) -> Recipe:
    """The recipe of a run, which may have a time limit in seconds.

    A limit asks for PV-Tuning at any effort. `report` gets notices about the file. Raises RunError
    with one sentence for what cannot be.
    """
    if changes.bits is not None and changes.scheme is not None:
        raise RunError(
            "--bits chooses schemes layer by layer, --scheme is one for all; give either"
        )
    recipe = EFFORTS[effort] if config is None else from_file(config, EFFORTS[effort], report)
    named = {field.name: getattr(changes, field.name) for field in fields(changes)}
    del named["pv"], named["start"]  # no settings
    typed = {name: value for name, value in named.items() if value is not None}
    if changes.scheme is not None:
        typed["bits"] = None
    try:
        recipe = replace(recipe, **typed)
    except RunError as error:  # an option has the name of its setting
        raise RunError(f"--{error}") from error
    if changes.start is not None:
        recipe = replace(recipe, scheme=_scheme_of(changes.start, changes), bits=None)
    if limit is not None and not 0 <= limit < inf:
        raise RunError(f"--for is {limit:g} seconds, which no run can take")
    if limit is not None and not changes.pv:
        raise RunError("--for limits PV-Tuning, which --no-pv leaves out; give one of them")
    if limit is not None or changes.start is not None:
        recipe = replace(recipe, training=recipe.training or TrainSettings())
    elif not changes.pv:
        recipe = replace(recipe, training=None)
    return recipe


def _scheme_of(start: Path, changes: Changes) -> str:
    """The scheme of a checkpoint that is tuned on. Raises RunError for options about what it has
    settled, and CheckpointError where there is none.
    """
    given = {
        "--scheme": changes.scheme,
        "--bits": changes.bits,
        "--keep-embeddings": changes.embeddings,
        "--samples": changes.samples,
        "--no-pv": None if changes.pv else True,
    }
    for name, value in given.items():
        if value is not None:
            raise RunError(f"--from tunes the codes of a checkpoint; leave {name} out")
    return str(open_checkpoint(start).schemes[0])


def seconds(text: str) -> float:
    """A time like 90s, 40m or 2h30m in seconds; RunError for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if match is None or not any(match.groups()):
        raise RunError(f"--for {text} is not a time; write it like 40m or 2h30m")
    parts = [int(part or 0) for part in match.groups()]
    return float(3600 * parts[0] + 60 * parts[1] + parts[2])
