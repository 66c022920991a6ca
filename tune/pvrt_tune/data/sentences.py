"""What the files of a model make readers raise, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pvrt.errors import PvrtError, SourceError
from pvrt.hf.declared import reason


@contextmanager
def one_sentence(what: str | Path) -> Iterator[None]:
    """What a model's files make transformers raise becomes one sentence with its reason."""
    try:
        yield
    except (PvrtError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any file may hold anything, and readers check little
        raise SourceError(f"cannot load {what}: {reason(error)}") from error
