"""Models that are measured: a checkpoint folder, or anything that `pvrt.tune` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pvrt.api.arguments import Dtype, one_of
from pvrt.api.lines import Tell
from pvrt.errors import PvrtError, RunError

if TYPE_CHECKING:
    import torch

    from pvrt.format.folder import StoredModel
    from pvrt.tools.compare import Side

# Tokens of the answer and runs that a speed is measured on.
_NEW, _RUNS = 32, 3


@dataclass(frozen=True)
class Opener:
    """Opens models to measure them on a device (`checked_device`) in a type, None being their own.
    `tell` gets notices.
    """

    device: str
    dtype: "torch.dtype | None"
    tell: Tell

    @classmethod
    def of(cls, device: str, dtype: Dtype, tell: Tell) -> "Opener":
        """By their names; "auto" is what is best here. Raises RunError for a device that cannot be
        used, and for no type.
        """
        one_of("dtype", dtype, get_args(Dtype))
        import torch

        from pvrt.device import checked_device

        place = checked_device(device)
        if dtype == "auto":
            return cls(place, torch.float32 if place == "cpu" else None, tell)
        return cls(place, getattr(torch, dtype), tell)

    def any(self, model: "str | Path | StoredModel") -> "Side":
        """A checkpoint, which is decoded when it is loaded, or a dense model."""
        from pvrt.format.aqlm import read_config
        from pvrt.format.folder import StoredModel

        if isinstance(model, StoredModel):
            return self.folder(model)
        path = Path(model)
        if path.is_dir() and read_config(path).get("quantization_config"):
            return self.folder(model)
        return self.original(model)

    def original(self, model: str | Path) -> "Side":
        """A dense model: a folder, a GGUF file or a hub id."""
        from pvrt.format import grid
        from pvrt.tools.compare import Side
        from pvrt.tools.held_out import longest_context
        from pvrt.tools.sizes import Sizes
        from pvrt_tune.data.locate import locate
        from pvrt_tune.data.source_model import load_source

        name = str(model)
        source, place = load_source(name), locate(name)
        for line in source.notes:
            self.tell(line)
        weights = sum(parameter.numel() for parameter in source.model.parameters())

        def load(wanted: "torch.dtype | None") -> Any:
            wanted = wanted or self.dtype or source.model.dtype
            _check_room(name, weights, wanted, self.device)
            return source.dense(wanted, self.device)

        sizes = Sizes(place.stat().st_size, weights, [])  # of a GGUF, which the engine cannot load
        if place.is_dir():
            sizes = Sizes.of(grid.open_folder(place))
        return Side(
            name,
            source.tokenizer,
            load,
            sizes,
            longest_context(source.model.config),
            speed=lambda: _speed(place, self.tell) if place.is_dir() else None,
        )

    def folder(self, model: "str | Path | StoredModel") -> "Side":
        """A folder that `pvrt.load` takes. Raises CheckpointError for one that is not sound."""
        from pvrt.format import grid
        from pvrt.format.folder import StoredModel
        from pvrt.hf.declared import read_config_of, read_tokenizer
        from pvrt.hf.load import load as load_model
        from pvrt.hf.progress_bars import no_progress_bar
        from pvrt.tools.compare import Side
        from pvrt.tools.held_out import longest_context
        from pvrt.tools.sizes import Curves, Sizes

        stored = model if isinstance(model, StoredModel) else grid.open_folder(Path(model))
        path, sizes = stored.path, Sizes.of(stored)

        def load(wanted: "torch.dtype | None") -> Any:
            wanted = wanted or self.dtype
            for place in sorted({"cpu", self.device}):  # it is loaded and decoded on the host
                _check_room(str(path), sizes.weights, wanted, place)
            with no_progress_bar():
                return load_model(stored, dense=True, dtype=wanted or "auto").to(self.device)

        return Side(
            str(path),
            read_tokenizer(path),
            load,
            sizes,
            longest_context(read_config_of(stored)),
            stored.scheme_names if stored.layers else None,
            Curves.of(stored),
            lambda: _speed(path, self.tell),
        )


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


def _speed(folder: Path, tell: Tell) -> float | None:
    """Tokens per second of the embedded engine, None with a notice where it cannot run a folder."""
    from pvrt.api.engine import engine_speed
    from pvrt.tools.bench_model import Case
    from pvrt_tune.machine import release_memory

    release_memory()  # the engine asks for what is free, too
    try:
        measured = engine_speed(folder, "auto", [Case(new=_NEW)], _RUNS)
    except PvrtError as error:
        tell(f"{folder}: tokens per second cannot be measured: {error}")
        return None
    return measured.speeds[0].tokens_per_second
