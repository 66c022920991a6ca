"""What a tuning run is asked to do: the recipe, its presets by effort, and the job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from pvrt.format.scheme import GridScheme, Scheme, parse_scheme
from pvrt_tune.settings.checks import (
    Count,
    Decay,
    Flag,
    Part,
    Positive,
    Ramp,
    Rate,
    Repeats,
    Share,
    settings,
)

#: What products are computed in; "auto" is bfloat16 where the processor multiplies that.
Compute = Literal["auto", "float32", "bfloat16"]


@settings
class FitSettings:
    """Effort of one layer's fit.

    rounds: alternations of fit and sweep. beam: joint choices kept where codebooks are searched one
    by one (four and more, and large ones). probes: cells of a large codebook that a search looks
    into (see `Cells`). damping: share of mean(diag H) added to the diagonal for the assignment's
    inverse only; the objective itself is never damped. column_block: input features whose products
    with H are updated at once.
    """

    rounds: Repeats = 6
    kmeans_iterations: Count = 24
    kmeans_momentum: Decay = 0.8
    beam: Count = 8
    probes: Count = 8
    cg_iterations: Count = 3
    damping: Positive = 0.01
    column_block: Count = 128


@settings
class FinetuneSettings:
    """P and V steps on one block, of `STEP_TOKENS` tokens each. Where codes move, learning rates
    are for 2 bits, as those of `PVSettings`.

    learning_rate: relative; a step moves a continuous tensor by about this share of its root mean
    square. move_codes: codes move too, with latent weights that `code_learning_rate` is for (see
    `PVSettings`); None leaves it to the plan, which has no room for them in blocks of very many
    experts. compute: of products in passes, and in steps that move codes. held_out: share of
    batches that only decides when to stop.
    """

    epochs: Repeats = 2
    learning_rate: Rate = 4e-3
    move_codes: Flag | None = None
    code_learning_rate: Rate = 2e-2
    compute: Compute = "auto"
    held_out: Part = 0.125


@settings
class TrainSettings:
    """The loop around the PV step.

    windows: of training text. steps: optimizer steps; batch: windows per step. held_out: windows
    that only choose the best state, looked at every `evaluate_every` steps; training ends after
    `patience` looks without a new best. warmup: share of the steps in which the learning rates
    rise; they fall to zero at the end. freeze_embeddings keeps embeddings and output head. compute:
    what the student computes in; whatever is trained or decoded stays float32 behind it, and "auto"
    is bfloat16 where the processor multiplies that.
    separate_documents: documents that share a window do not see each other.

    The rest decides memory and time. None leaves it to the plan, and where nobody plans it is what
    costs least time. microbatch: windows computed at once. recompute_activations: of a pass only
    the inputs of blocks are kept for the backward pass. teacher_first: all of the original model's
    states are computed before the student is made, so that the two are never in memory together
    (with a time limit, some for nothing). states: where latent weights, moments and gradients of
    quantised weights are. With "host" the device has one layer's at a time, and decodes a weight
    whenever it is used. snapshots: the optimizer's state is saved with every look at held-out text;
    without, PV-Tuning begins anew after a kill.
    """

    windows: Count = 256
    steps: Count = 200
    batch: Count = 4
    held_out: Count = 8
    evaluate_every: Count = 20
    patience: Count = 6
    warmup: Ramp = 0.05
    freeze_embeddings: Flag = True
    compute: Compute = "auto"
    separate_documents: Flag = False
    microbatch: Count | None = None
    recompute_activations: Flag | None = None
    teacher_first: Flag | None = None
    states: Literal["device", "host"] | None = None
    snapshots: Flag | None = None

    def factor(self, step: int, steps: int) -> float:
        """Learning-rate factor of step `step` (from 0) of `steps`: linear up, then down to zero."""
        warm = max(1, round(self.warmup * steps))
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm), 1.0)


#: Settings that a plan chooses where a recipe leaves them open: of PV-Tuning, and of blocks.
CHOICES = (
    "move_codes",
    "microbatch",
    "recompute_activations",
    "teacher_first",
    "states",
    "snapshots",
    "low_memory",
)

#: What embeddings are put in unless a recipe says otherwise: the first whose groups divide them.
EMBEDDINGS = ("4x8g8", "2x8g4")

#: What a V step does; see `STRATEGIES` of the optimizer.
StrategyName = Literal[
    "continuous",
    "linearized",
    "stochastic",
    "straight-through",
    "subspace",
    "subspace-straight-through",
]


@settings
class PVSettings:
    """Hyperparameters of a step. Learning rates are for codes of 2 bits; layers of more take
    smaller steps (`reach` of the optimizer).

    learning_rate: relative; a step moves a continuous tensor by about this share of its root mean
    square. code_learning_rate: share of its norm that B moves per step (LAMB); steps that point
    anywhere add up to its product with the root of their number, and a tenth or two is what makes
    codes of 2 bits move, so that long runs want less. fraction: share of a layer's groups that may
    change per step in the subspace strategies. gain_pool: they are chosen by the distance that new
    codes would win, among this many times as many candidates; 1 chooses by distance alone, as
    published, and moves half as many for groups that cannot move stay chosen. low_memory: B in
    bfloat16 with stochastic rounding and its second moment factored into rows and columns (arXiv
    1804.04235): 2 bytes per weight instead of 8. None leaves that to the plan.
    """

    strategy: StrategyName = "subspace-straight-through"
    learning_rate: Rate = 2e-3
    code_learning_rate: Rate = 2e-2
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    code_beta: Decay = 0.95
    fraction: Share = 0.01
    gain_pool: Count = 4
    low_memory: Flag | None = None
    clip_norm: Positive = 1.0


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


def _for_embeddings(text: str) -> str:
    """ "auto", "keep", or the text of a scheme of codebooks; ValueError for any other."""
    if text in ("auto", "keep"):
        return text
    if isinstance(parse_scheme(text), GridScheme):
        raise ValueError(f"{text} is a grid, in which checkpoints have no embeddings")
    return _tunable(text)


@settings
class AllocationSettings:
    """How bits are shared out where a recipe says how many the file has.

    windows, length: of calibration's text, the part that KL is measured on.
    """

    windows: Count = 4
    length: Annotated[int, Field(strict=True, ge=8, le=10**9)] = 128


@settings
class Recipe:
    """Everything that decides the result besides model and text. Stored with the run.

    bits: per weight, of the whole file; schemes are then chosen layer by layer, and `scheme` says
    nothing. None: all layers have `scheme`. embeddings: the scheme of embedding and output head,
    "auto" or "keep" (in 16 bits). targets: what a block's fine-tuning aims at. "quantised": the
    dense block's outputs on the outputs of the quantised blocks before it. "original": the original
    model's own activations after that block, so that a block also fixes what earlier ones broke (a
    second set of hidden states is kept for it). training: PV-Tuning after calibration, or None; pv:
    its steps.
    """

    scheme: Annotated[str, AfterValidator(_tunable)] = "2x8g8"
    bits: Annotated[float, Field(strict=True, ge=1, le=8)] | None = None
    allocation: AllocationSettings = Field(default_factory=AllocationSettings)
    embeddings: Annotated[str, AfterValidator(_for_embeddings)] = "auto"
    samples: Count = 64
    length: Annotated[int, Field(strict=True, ge=8, le=10**9)] = 512
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    fit: FitSettings = Field(default_factory=FitSettings)
    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings)
    targets: Literal["quantised", "original"] = "original"
    training: TrainSettings | None = None
    pv: PVSettings = Field(default_factory=PVSettings)

    @field_validator("bits")
    @classmethod
    def _of_codebooks(cls, bits: float | None, others: ValidationInfo) -> float | None:
        """ValueError where bits are to be shared out and a grid is asked for besides."""
        scheme = others.data.get("scheme")
        if bits is not None and scheme and isinstance(parse_scheme(scheme), GridScheme):
            raise ValueError(
                f"bits are shared out in codebooks, and {scheme} is a grid; leave one out"
            )
        return bits

    @cached_property
    def parsed_scheme(self) -> Scheme | GridScheme:
        """The scheme itself; `scheme` is how people write it."""
        return parse_scheme(self.scheme)

    @property
    def asked(self) -> str:
        """What was asked of the layers, for people."""
        return self.scheme if self.bits is None else f"by measured KL ({self.bits:g} bits)"

    @property
    def embedding_schemes(self) -> list[Scheme]:
        """Those for embedding and output head, the best first; none where they stay as they are."""
        if self.embeddings == "keep" or isinstance(self.parsed_scheme, GridScheme):
            return []
        names = EMBEDDINGS if self.embeddings == "auto" else (self.embeddings,)
        return [Scheme.parse(name) for name in names]

    @property
    def windows(self) -> int:
        """Windows of text in all: the held-out ones of PV-Tuning come first."""
        if self.training is None:
            return self.samples
        return self.training.held_out + max(self.samples, self.training.windows)

    @property
    def calibration(self) -> slice:
        """Which of the windows calibrate the layers; never held-out ones."""
        first = 0 if self.training is None else self.training.held_out
        return slice(first, first + self.samples)

    @property
    def settled(self) -> "Recipe":
        """The recipe with what costs least time in the place of what is left open."""
        usual: dict[str, Any] = {"move_codes": True}
        if self.training is not None:
            usual |= {"microbatch": min(4, self.training.batch), "states": "device"}
            usual |= dict.fromkeys(("recompute_activations", "teacher_first", "low_memory"), False)
            usual |= {"snapshots": True}
        return self.with_choices(usual)

    @property
    def choices(self) -> dict[str, Any]:
        """What decides memory and time, by name; None is left open."""
        return {
            name: getattr(part, name)
            for name in CHOICES
            for part in self._parts().values()
            if hasattr(part, name)
        }

    def _parts(self) -> dict[str, Any]:
        """The settings of stages that have choices, by name."""
        stages = {} if self.training is None else {"training": self.training, "pv": self.pv}
        return {"finetune": self.finetune, **stages}

    def with_choices(self, chosen: Mapping[str, Any]) -> "Recipe":
        """The recipe with choices by name in the place of what is left open."""
        open_ = {k: chosen[k] for k, v in self.choices.items() if v is None and k in chosen}
        changed = {}
        for name, part in self._parts().items():
            own = {key: value for key, value in open_.items() if hasattr(part, key)}
            changed[name] = replace(part, **own)
        return replace(self, **changed)

    def record(self) -> dict[str, Any]:
        """What decides the result, by name: the settings of PV-Tuning's steps and of sharing bits
        out do not where neither is done.
        """
        values = asdict(self)
        if self.training is None:
            del values["pv"]
        if self.bits is None:  # as runs were before there was a choice
            del values["bits"], values["allocation"]
        return values


#: Presets by effort: calibration windows, and how long layers are fitted and blocks tuned.
EFFORTS: dict[str, Recipe] = {
    "quick": Recipe(
        samples=144,
        length=256,
        fit=FitSettings(rounds=1, kmeans_iterations=12, beam=4),
        finetune=FinetuneSettings(epochs=1, code_learning_rate=4e-2),
    ),
    "standard": Recipe(samples=120, training=TrainSettings()),
    "best": Recipe(
        samples=256,
        length=1024,
        fit=FitSettings(rounds=12, kmeans_iterations=60, kmeans_momentum=0.88, beam=16),
        finetune=FinetuneSettings(epochs=4, code_learning_rate=1e-2),
        training=TrainSettings(windows=4096, steps=2000, batch=16, held_out=16, evaluate_every=50),
        pv=PVSettings(code_learning_rate=1e-2),
    ),
}


@dataclass(frozen=True)
class TuneJob:
    """One call of `tune`: what to compress, with what text, to where, and how to start.

    activations: where hidden states are kept, "memory" or "disk" ("auto": memory if they fit).
    stream: where all of the original model computes, its blocks come from the host one by one
    (False is for all that fits; a plan may say otherwise).
    force: start although the plan says that it does not fit.
    seconds: time limit in all; the best checkpoint by then is left, and the same job goes on later.
    start: a checkpoint of `model` whose codes PV-Tuning begins with, in the place of calibration.
    """

    model: str
    out: Path
    recipe: Recipe
    data: str | None = None
    device: str = "cpu"
    activations: Literal["auto", "memory", "disk"] = "auto"
    stream: bool = False
    seconds: float | None = None
    start: Path | None = None
    resume: bool = False
    restart: bool = False
    force: bool = False
