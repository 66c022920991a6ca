"""What a tuning run is asked to do: the recipe, its presets by effort, and the job."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pvrt.format.scheme import Scheme, parse_scheme
from pvrt_tune.calibrate.block_tuning import FinetuneSettings
from pvrt_tune.fit.additive import FitSettings
from pvrt_tune.pv.optimizer import PVSettings
from pvrt_tune.pv.trainer import TrainSettings
from pvrt_tune.setting_types import Count, settings


def _tunable(scheme: str) -> str:
    """The text of a scheme that layers can be fitted in; ValueError for any other."""
    parsed = parse_scheme(scheme)
    if isinstance(parsed, Scheme) and parsed.out_group_size != 1:
        alone = replace(parsed, out_group_size=1)
        raise ValueError(
            f"{scheme} has groups that span {parsed.out_group_size} outputs, which pvrt reads but "
            f"does not make; give {alone}, say"
        )
    return scheme


@settings
class Recipe:
    """Everything that decides the result besides model and text. Stored with the run.

    targets: what a block's fine-tuning aims at. "quantised": the dense block's outputs on the
    outputs of the quantised blocks before it. "original": the original model's own activations
    after that block, so that a block also mends what earlier ones broke (a second set of hidden
    states is kept for it). pv: PV-Tuning after calibration, or None.
    """

    scheme: Annotated[str, AfterValidator(_tunable)] = "2x8g8"
    samples: Count = 64
    length: Annotated[int, Field(strict=True, ge=8)] = 512
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    fit: FitSettings = Field(default_factory=FitSettings)
    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings)
    targets: Literal["quantised", "original"] = "quantised"
    pv: TrainSettings | None = None

    @property
    def windows(self) -> int:
        """Windows of text in all: the held-out ones of PV-Tuning come first."""
        if self.pv is None:
            return self.samples
        return self.pv.held_out + max(self.samples, self.pv.windows)

    @property
    def calibration(self) -> slice:
        """Which of the windows calibrate the layers; never held-out ones."""
        first = 0 if self.pv is None else self.pv.held_out
        return slice(first, first + self.samples)


#: Presets by effort: calibration windows, and how long layers are fitted and blocks tuned.
EFFORTS: dict[str, Recipe] = {
    "quick": Recipe(
        samples=48,
        length=256,
        fit=FitSettings(rounds=1, kmeans_iterations=12, beam=4),
        finetune=FinetuneSettings(epochs=2),
    ),
    "standard": Recipe(pv=TrainSettings()),
    "best": Recipe(
        samples=256,
        length=1024,
        fit=FitSettings(rounds=12, kmeans_iterations=60, kmeans_momentum=0.88, beam=16),
        finetune=FinetuneSettings(epochs=8),
        pv=TrainSettings(
            windows=4096,
            steps=2000,
            batch=16,
            held_out=16,
            evaluate_every=50,
            pv=PVSettings(code_learning_rate=1e-2),
        ),
    ),
}


@dataclass(frozen=True)
class TuneJob:
    """One call of `tune`: what to compress, with what text, to where, and how to start.

    activations: where hidden states are kept, "memory" or "disk" ("auto": memory if they fit).
    force: start although the plan says that it does not fit.
    seconds: time limit in all; the best checkpoint by then is left, and the same job goes on later.
    """

    model: str
    out: Path
    recipe: Recipe
    data: str | None = None
    device: str = "cpu"
    activations: Literal["auto", "memory", "disk"] = "auto"
    seconds: float | None = None
    resume: bool = False
    restart: bool = False
    force: bool = False
