"""What lies beside the weights of a checkpoint, in words that older readers know as well."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from pvrt.errors import RunError
from pvrt.format.atomic import as_json
from pvrt.hf.declared import reason

#: Of processors of images and sound, of converters, and of the law.
_COPIED = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


def model_config(model: Any) -> dict[str, Any]:
    """config.json of a model, without a quantization_config.

    transformers 5 has one dictionary of rotary settings; version 4 and others read two older names.
    """
    config: dict[str, Any] = model.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    for part in (config, config.get("text_config")):
        rope = part.get("rope_parameters") if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(rope, dict) and "rope_theta" in rope:
            scaled = rope.get("rope_type", "default") != "default"
            part.setdefault("rope_theta", rope["rope_theta"])
            part.setdefault("rope_scaling", dict(rope) if scaled else None)
    return config


def other_files(first: Path) -> dict[str, bytes]:
    """Files beside a model's config.json that its other readers need, by name."""
    found = (first.parent / name for name in _COPIED) if first.suffix == ".json" else ()
    return {file.name: file.read_bytes() for file in found if file.is_file()}


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """A tokenizer's files by their path in its folder; its class by the name that all know.

    Raises RunError where the folder for temporary files is full, or the tokenizer cannot be saved.
    """
    try:
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = (file for file in Path(folder).rglob("*") if file.is_file())
            found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    except Exception as error:  # tokenizers have none of their own
        raise RunError(
            f"the tokenizer cannot be written to {gettempdir()} ({reason(error)}); free some space "
            "there, or name another folder in TMPDIR, and run the same command again"
        ) from error
    config = json.loads(found["tokenizer_config.json"])
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 reads names there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return {**found, "tokenizer_config.json": as_json(config)}
