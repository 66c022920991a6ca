"""The options that `pvrt tune` and `pvrt plan` share, so that a plan is of the run it is asked for.

None leaves a setting to `--config`, and then to the preset of `--effort`.
"""

from pathlib import Path
from typing import Annotated

import typer

from pvrt.api.arguments import Activations, Effort

Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, a .gguf file, or a hub id like org/name. With --from a checkpoint."
    ),
]
Original = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="The dense original of MODEL, which is a checkpoint then: PV-Tuning goes on from its "
        "codes.",
    ),
]


Scheme = Annotated[
    str | None,
    typer.Option(
        show_default="2x8g8",
        help="Codebooks x bits g group: 2x8g8 is 2 bits, 3x8g8 is 3; or a scalar grid: w4g128 "
        "is 4 bits in groups of 128, w4g128s symmetric.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Bits per weight of the whole file, like 2.5, instead of one scheme for all layers: "
        "each layer gets the codebooks that its measured effect on the model is worth."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: a .txt/.jsonl file, a folder, or a Hugging Face dataset "
        "(name or name:split). Without it the model writes its own."
    ),
]
EffortOption = Annotated[Effort, typer.Option("--effort", help="Time against quality.")]
Config = Annotated[
    Path | None,
    typer.Option(help="A YAML or JSON file with settings of the recipe, over --effort."),
]
Limit = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Time in all but for the report, like 40m or 2h30m. The best checkpoint by then is "
        "left.",
    ),
]
PV = Annotated[
    bool, typer.Option("--pv/--no-pv", help="PV-Tuning after calibration (from --effort).")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows (from --effort).")]
Length = Annotated[int | None, typer.Option(help="Tokens per window (from --effort).")]
KeepEmbeddings = Annotated[
    bool,
    typer.Option(
        "--keep-embeddings", help="Leave embeddings and output head in 16 bits, not in codes."
    ),
]
ActivationsOption = Annotated[
    Activations,
    typer.Option(
        "--activations", help="Where hidden states are kept; auto takes memory if they fit."
    ),
]


def seconds(limit: str | None) -> float | None:
    """The time of --for."""
    from pvrt_tune.settings.options import seconds

    return None if limit is None else seconds(limit)
