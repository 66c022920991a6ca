"""The model folder that is served, opened and checked once. Everything else is handed this."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pvrt.format.folder import StoredModel
from pvrt.format.grid import open_folder
from pvrt_server.templates import chat_template


@dataclass(frozen=True)
class OpenedModel:
    """A model folder: its config.json and headers, the same config as transformers has it, and the
    text of its chat template, if there is one."""

    stored: StoredModel
    config: Any
    chat_template: str | None

    @property
    def path(self) -> Path:
        """The folder."""
        return self.stored.path

    @property
    def dtype(self) -> str:
        """The type that config.json names, and so what its author trained or published it in."""
        config = self.stored.config
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def chats(self) -> bool:
        """Whether conversations can be written for it: by its template, or by mistral-common."""
        mistral = (self.path / "tekken.json").is_file() and find_spec("mistral_common") is not None
        return self.chat_template is not None or mistral

    @property
    def foreign(self) -> bool:
        """Whether its layers are quantised in a way that is not ours and transformers' affair."""
        return not self.stored.layers and bool(self.stored.config.get("quantization_config"))


def open_model(folder: Path) -> OpenedModel:
    """Open a model folder, quantised or dense. No weights are read.

    Raises CheckpointError for a folder that is not sound, or that transformers does not know.
    """
    from pvrt.hf.declared import check_tensors, read_config_of  # seconds of transformers

    stored = open_folder(folder)
    config = read_config_of(stored)
    check_tensors(stored, config)
    return OpenedModel(stored, config, chat_template(folder))
