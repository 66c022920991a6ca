"""The embedded engine for those that use it without a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pvrt.tools.bench_model import Speed
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


def engine_speed(
    path: Path, dtype: str, prompt_tokens: int, new_tokens: int, repeats: int
) -> "tuple[Speed, int, torch.device]":
    """Speed of the embedded engine on a folder, weights in bytes that a token reads, and where."""
    import torch

    from pvrt.tools.bench_model import measure
    from pvrt.tools.gpu_energy import energy_counter
    from pvrt_server.engine.sampling import SamplingParams
    from pvrt_server.engine.sequences import TokenEvent

    # The same prompt again and again, which must be read every time.
    with open_engine(path, dtype, prefix_reuse=False) as engine:
        prompt = [1 + i % 200 for i in range(prompt_tokens)]

        def generate(prompt_ids: Any, count: int) -> Any:
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            events = engine.generate(prompt_ids, params)
            return (event for event in events if isinstance(event, TokenEvent))

        device = torch.device(engine.device)
        energy = energy_counter(device)
        speed = measure(generate, prompt, new_tokens, repeats, energy=energy)
        return speed, engine.bytes_per_token, device
