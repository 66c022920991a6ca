"""Models by their name on the hub."""

import json
from pathlib import Path

from transformers.utils import cached_file

from pvrt.format.aqlm import INDEX_FILE, WEIGHTS_FILE
from pvrt.format.config_block import CONFIG_FILE
from pvrt_tune.data.sentences import one_sentence


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: the hub's are "owner/name", and owners are no
    folders here.
    """
    path = Path(name).expanduser()
    inside = path.parent != Path() and path.parent.is_dir()
    return path.is_absolute() or name.startswith(".") or name.count("/") > 1 or inside


def download(name: str, weights: bool) -> Path:
    """The snapshot folder of a hub id."""
    with one_sentence(f"{name}, which is no folder or file here,"):
        folder = Path(cached_file(name, CONFIG_FILE)).parent
        if weights:
            optional = {"_raise_exceptions_for_missing_entries": False}
            if cached_file(name, WEIGHTS_FILE, **optional) is None:
                index = json.loads(Path(cached_file(name, INDEX_FILE)).read_text("utf-8"))
                for file in sorted(set(index["weight_map"].values())):
                    cached_file(name, file)
            cached_file(name, "generation_config.json", **optional)
    return folder
