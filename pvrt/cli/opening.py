"""Models that commands measure: a checkpoint folder, or anything that `pvrt tune` takes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvrt.cli.shared import Dtype, notice
from pvrt.errors import PvrtError, RunError

if TYPE_CHECKING:
    import torch

    from pvrt.tools.compare import Side

# Tokens of the prompt and of the answer, and runs, that a speed is measured on.
_SPEED = (16, 32, 3)
_EVERY_SECONDS = 10.0  # between lines of progress


def open_any(model: str, dtype: Dtype, device: str) -> "Side":
    """A checkpoint, which is decoded when it is loaded, or a dense model."""
    from pvrt.format.aqlm import read_config

    path = Path(model)
    if path.is_dir() and read_config(path).get("quantization_config"):
        return open_folder(path, dtype, device)
    return open_original(model, dtype, device)


def open_original(model: str, dtype: Dtype, device: str) -> "Side":
    """A dense model: a folder, a GGUF file or a hub id."""
    from pvrt.format import grid
    from pvrt.tools.compare import Side
    from pvrt.tools.held_out import longest_context
    from pvrt.tools.sizes import Sizes
    from pvrt_tune.data.locate import locate
    from pvrt_tune.data.source_model import load_source

    source, place = load_source(model), locate(model)
    for line in source.notes:
        notice(line)
    weights = sum(parameter.numel() for parameter in source.model.parameters())

    def load(wanted: "torch.dtype | None") -> Any:
        wanted = wanted or _dtype(dtype, device) or source.model.dtype
        _check_room(model, weights, wanted, device)
        return source.dense(wanted, device)

    sizes = Sizes(place.stat().st_size, weights, [])  # of a GGUF, which the engine does not load
    if place.is_dir():
        sizes = Sizes.of(grid.open_folder(place))
    return Side(
        model,
        source.tokenizer,
        load,
        sizes,
        longest_context(source.model.config),
        speed=lambda: _speed(place) if place.is_dir() else None,
    )


def open_folder(path: Path, dtype: Dtype, device: str) -> "Side":
    """A folder that `pvrt.load` takes. Raises CheckpointError for one that is not sound."""
    import pvrt
    from pvrt.format import grid
    from pvrt.hf.declared import read_config_of, read_tokenizer
    from pvrt.hf.progress_bars import no_progress_bar
    from pvrt.tools.compare import Side
    from pvrt.tools.held_out import longest_context
    from pvrt.tools.sizes import Curves, Sizes

    stored = grid.open_folder(path)
    sizes = Sizes.of(stored)

    def load(wanted: "torch.dtype | None") -> Any:
        wanted = wanted or _dtype(dtype, device)
        for place in sorted({"cpu", device}):  # it is loaded and decoded on the host
            _check_room(str(path), sizes.weights, wanted, place)
        with no_progress_bar():
            return pvrt.load(stored, dense=True, dtype=wanted or "auto").to(device)

    return Side(
        str(path),
        read_tokenizer(path),
        load,
        sizes,
        longest_context(read_config_of(stored)),
        stored.scheme_names if stored.layers else None,
        Curves.of(stored),
        lambda: _speed(path),
    )


def _dtype(choice: Dtype, device: str) -> "torch.dtype | None":
    """The type that models are measured in; None is their own."""
    import torch

    if choice is Dtype.auto:
        return torch.float32 if device == "cpu" else None
    found: torch.dtype = getattr(torch, choice.value)
    return found


def _check_room(name: str, weights: int, dtype: "torch.dtype | None", device: str) -> None:
    """Raise RunError where a model does not fit the memory that is free."""
    from pvrt.device import free_device_bytes
    from pvrt.memory import free_host_bytes
    from pvrt_tune.machine import release_memory

    release_memory()  # torch keeps what the model before this one had
    wanted = weights * (2 if dtype is None else dtype.itemsize)
    on_device = free_device_bytes(device)
    free = free_host_bytes() if on_device is None else on_device
    if wanted > free:
        kind = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise RunError(
            f"{name}{kind} takes {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on "
            f"{device}; measure it on another device or machine"
        )


def _speed(folder: Path) -> float | None:
    """Tokens per second of the embedded engine, None with a notice where it cannot run a folder."""
    from pvrt.cli.engine import engine_speed
    from pvrt_tune.machine import release_memory

    release_memory()  # the engine asks for what is free, too
    try:
        speed, *_ = engine_speed(folder, Dtype.auto, *_SPEED)
    except PvrtError as error:
        notice(f"{folder}: tokens per second cannot be measured: {error}")
        return None
    return speed.decode_tokens_per_second


def progress(what: str) -> Callable[..., None]:
    """Lines about a long pass on stderr: what is done of it, how long the rest takes, and a figure
    so far, if there is one.
    """
    started = last = time.monotonic()

    def show(done: int, total: int, figure: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _EVERY_SECONDS or done == total:
            shown = "" if figure is None else f"  {figure:.3f}"
            left = (now - started) / done * (total - done)
            notice(f"{what}: {done}/{total}{shown}  {left:.0f} s left")
            last = now

    return show
