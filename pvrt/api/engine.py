"""The embedded engine for those that use it without a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvrt.errors import RunError

if TYPE_CHECKING:
    import torch

    from pvrt.tools.bench_model import Case, Speed
    from pvrt_server.engine.engine import Engine


def open_engine(path: Path, dtype: str, **options: Any) -> "Engine":
    """The embedded engine on a model folder; `options` are others of `ServeOptions`.

    Raises CheckpointError and ServeError.
    """
    from pvrt.hf.progress_bars import no_progress_bar
    from pvrt_server.engine.engine import Engine
    from pvrt_server.options import ServeOptions

    asked = ServeOptions.model_validate({"dtype": dtype, **options})
    with no_progress_bar():
        return Engine.load(path, asked)


@dataclass(frozen=True)
class Measured:
    """Speeds of an engine on a folder, weights in bytes that a token reads, and where."""

    speeds: "list[Speed]"
    bytes_per_token: int
    device: "torch.device"


def engine_speed(path: Path, dtype: str, tests: "Sequence[Case]", repeats: int) -> Measured:
    """Every test on the embedded engine.

    Raises what `open_engine` and `measure` raise, and RunError for tests that are too long.
    """
    import torch

    from pvrt.tools.bench_model import measure
    from pvrt.tools.gpu_energy import energy_counter
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent
    from pvrt_server.errors import RequestError

    with open_engine(path, dtype) as engine:

        def generate(prompt_ids: Any, count: int) -> Any:
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            events = engine.generate(prompt_ids, params)
            return (event for event in events if isinstance(event, TokenEvent))

        device = torch.device(engine.device)
        energy = energy_counter(device)
        try:
            speeds = [measure(generate, test, repeats, energy=energy) for test in tests]
        except RequestError as error:
            raise RunError(f"{path}: {error}") from error
        return Measured(speeds, engine.bytes_per_token, device)
