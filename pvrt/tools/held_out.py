"""The text that models are measured on, cut into windows that they can read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pvrt.errors import DataError
from pvrt.tools.perplexity import default_text, read_text, windows


@dataclass(frozen=True)
class HeldOut:
    """A named text, and how much of it is asked for: tokens per window (None: `usual`, or what the
    model can read if that is less) and at most so many windows (None: all).
    """

    name: str
    body: str
    context: int | None
    usual: int
    limit: int | None

    @classmethod
    def read(
        cls, file: Path | None, context: int | None, usual: int, limit: int | None
    ) -> "HeldOut":
        """A text file, or the text that every machine has. Raises DataError when unreadable."""
        if file is None:
            return cls("the Python language reference", default_text(), context, usual, limit)
        return cls(str(file), read_text(file), context, usual, limit)

    def windows(self, tokenizer: Any, longest: int | None, notice: Callable[[str], None]) -> Tensor:
        """Windows [n, context] for a model that reads `longest` tokens at once (None: any number).

        `notice` gets a sentence where windows are cut to that. Raises DataError when more was asked
        for, and for too short a text.
        """
        context = self.context or self.usual
        if longest is not None and context > longest:
            if self.context is not None:
                raise DataError(
                    f"--context {context} is longer than the {longest} tokens that the model was "
                    f"made for; give at most --context {longest}"
                )
            notice(f"windows have {longest} tokens, for the model was made for no more")
            context = longest
        return windows(self.body, tokenizer, context, self.limit)


def longest_context(config: Any) -> int | None:
    """Tokens that a model was made to read at once, by its transformers config; None where that
    does not say.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
