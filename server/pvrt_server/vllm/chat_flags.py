"""What vLLM is told of a chat template: forms of calls and thoughts, and where answers end."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from pvrt.errors import ServeError
from pvrt_server.engine.loading import eos_ids, load_codec
from pvrt_server.engine.text import TextCodec
from pvrt_server.opened import OpenedModel
from pvrt_server.options import ServeOptions
from pvrt_server.vllm.reasoning_parser import reasoning_parser
from pvrt_server.vllm.tool_parser import tool_parser

_log = logging.getLogger("pvrt_server")
_GENERATION = "generation_config.json"


def chat_flags(opened: OpenedModel, options: ServeOptions, vllm: Path, folder: Path) -> list[str]:
    """Flags for a vLLM whose package is in the folder vllm; those that the user gives are left out.

    An empty folder gets what a flag names, and must be there while vLLM starts.
    """
    if opened.chat_template is None or options.gives("--chat-template"):
        return []
    return list(_flags(opened, options, vllm, folder))


def _flags(opened: OpenedModel, options: ServeOptions, vllm: Path, folder: Path) -> Iterator[str]:
    kind = str(opened.stored.config.get("model_type"))
    if not options.gives("--tool-call-parser"):
        parser = tool_parser(opened.chat_template, kind, vllm)
        if parser is not None:
            yield from ("--enable-auto-tool-choice", "--tool-call-parser", parser)
    try:
        codec = load_codec(opened.path)
    except ServeError as error:  # vLLM may know a way of its own
        _log.warning("vLLM is not told where answers end, and of no thoughts: %s", error)
        return
    if not options.gives("--reasoning-parser"):
        parser = reasoning_parser(codec, kind, vllm)
        if parser is not None:
            yield from ("--reasoning-parser", parser)
    if not options.gives("--generation-config") and _write_ends(opened, codec, folder):
        yield from ("--generation-config", str(folder))


def _write_ends(opened: OpenedModel, codec: TextCodec, folder: Path) -> bool:
    """Write the model's generation_config.json with the end of a turn, where it lacks that."""
    file = opened.path / _GENERATION
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    listed = given.get("eos_token_id", opened.stored.config.get("eos_token_id"))
    ends = eos_ids(listed, codec)
    known = {*(listed if isinstance(listed, list) else [listed]), codec.eos_id}
    if ends <= known:
        return False
    text = json.dumps({**given, "eos_token_id": sorted(ends)})
    (folder / _GENERATION).write_text(text, encoding="utf-8")
    return True
