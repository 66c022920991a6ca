"""Whether texts begin with a special token: a GGUF says it, and transformers does not read that."""

from pathlib import Path
from typing import Any

from pvrt.tools.perplexity import beginning

_KEY = "tokenizer.ggml.add_bos_token"


def begin_as_stated(tokenizer: Any, file: Path) -> None:
    """Have a tokenizer begin texts with its BOS token, or not, as its GGUF file states.

    Nothing changes where the file does not say. Models that were trained with the token answer
    nonsense without it.
    """
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get(_KEY)
    if field is None or tokenizer.bos_token_id is None:
        return
    stated = bool(field.contents())
    if stated != (beginning(tokenizer) == [tokenizer.bos_token_id]):
        tokenizer.add_bos_token = stated
