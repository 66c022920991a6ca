"""The chat template of a model folder, without loading its tokenizer."""

import json
from pathlib import Path

from pvrt.errors import CheckpointError


def chat_template(folder: Path) -> str | None:
    """The template's text, from the file of its own or from tokenizer_config.json; None if none.
    Of several, that for tools. Raises CheckpointError for a file of its own that is no text.
    """
    for name in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja"):
        file = folder / name
        try:
            if file.is_file():
                return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as text: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(said, list):  # older files hold several under names
            entries = [entry for entry in said if isinstance(entry, dict)]
            texts = {str(entry.get("name")): entry.get("template") for entry in entries}
            said = texts.get("tool_use") or texts.get("default")
        if isinstance(said, str) and said:
            return said
    return None
