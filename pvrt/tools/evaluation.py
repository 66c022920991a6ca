"""What `pvrt eval` finds, as data, as JSON and as text."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pvrt.tools.divergence import Divergence
from pvrt.tools.perplexity import Perplexity


@dataclass(frozen=True)
class Against:
    """How far a model is from its original over the same windows; noise_floor is the KL of the
    original in bfloat16 to itself in float32.
    """

    original: str
    perplexity: float
    kl: Divergence
    noise_floor: Divergence


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model; what was not asked for is None. tasks: metrics by task, as lm-eval names
    them ("acc,none").
    """

    model: str
    perplexity: Perplexity | None = None
    against: Against | None = None
    tasks: Mapping[str, Mapping[str, Any]] | None = None

    def record(self) -> dict[str, Any]:
        """What `--json` prints."""
        found: dict[str, Any] = {"model": self.model}
        if self.perplexity is not None:
            found |= asdict(self.perplexity)
        if self.against is not None:
            found |= {
                "original": self.against.original,
                "original_value": self.against.perplexity,
                "kl": asdict(self.against.kl),
                "noise_floor": asdict(self.against.noise_floor),
            }
        if self.tasks is not None:
            found["tasks"] = self.tasks
        return found


def as_text(found: Evaluation) -> str:
    """The figures for a terminal."""
    return "\n".join((*_of_text(found), *_of_tasks(found.tasks or {})))


def _of_text(found: Evaluation) -> Iterator[str]:
    figures, against = found.perplexity, found.against
    if figures is not None:
        original = "" if against is None else f" (original {against.perplexity:.4f})"
        yield (
            f"perplexity {figures.value:.4f}{original} @ {figures.context} tokens, "
            f"{figures.windows} windows of {figures.text}"
        )
    if against is not None:
        kl, floor = against.kl, against.noise_floor
        yield (
            f"KL to the original {kl.mean:.5f} +- {kl.standard_error:.5f} nats per token "
            f"(median {kl.median:.5f}, 99% below {kl.percentile_99:.3f}); "
            f"the same likeliest token at {kl.same_top:.1%}"
        )
        yield (
            f"noise floor {floor.mean:.6f} +- {floor.standard_error:.6f}: the original in "
            "bfloat16 against float32"
        )


def _of_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, scores in tasks.items():
        for metric, score in scores.items():
            measure, comma, kind = metric.partition(",")
            if comma and not measure.endswith("_stderr") and isinstance(score, int | float):
                error = scores.get(f"{measure}_stderr,{kind}")
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                yield f"{name} {measure} {score:.4f}{spread} ({scores['items']} items)"
