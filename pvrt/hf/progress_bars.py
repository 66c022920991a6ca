"""transformers' progress bars, which commands with lines of progress of their own do without."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws none until the context ends; else it does whenever it reads weights."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The bar over a GGUF's tensors asks for no setting.
        with patch.object(gguf, "tqdm", lambda tensors, **_: tensors, create=True):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
