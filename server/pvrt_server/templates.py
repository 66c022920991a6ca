"""The chat template of a model folder, without loading its tokenizer."""

import json
from pathlib import Path


def chat_template(folder: Path) -> str | None:
    """The template's text, from the file of its own or from tokenizer_config.json; None if none.
    Of several, that for tools.
    """
    for name in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(said, list):  # older files hold several under names
            texts = {entry.get("name"): entry.get("template") for entry in said}
            said = texts.get("tool_use") or texts.get("default")
        if isinstance(said, str) and said:
            return said
    return None
