"""From an opened model to what sequences run on: the model on its device, and its tokenizer."""

import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.grid import GridCheckpoint
from pvrt.hf.declared import read_tokenizer
from pvrt.hf.load import load
from pvrt.modules.aqlm_layer import AQLMLayer
from pvrt.modules.whole_model import decode_once, pack_model
from pvrt_server.backend import Decision
from pvrt_server.engine import cuda_graphs
from pvrt_server.engine.captured_model import CapturedModel
from pvrt_server.engine.chat_template import MistralTemplate
from pvrt_server.engine.cpu_model import CpuModel
from pvrt_server.engine.models import LanguageModel, TransformersModel, weight_bytes
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import Runtime
from pvrt_server.engine.text import TextCodec
from pvrt_server.opened import OpenedModel
from pvrt_server.options import ServeOptions

_log = logging.getLogger("pvrt_server")


def load_runtime(opened: OpenedModel, options: ServeOptions, decision: Decision) -> Runtime:
    """Load model and tokenizer as was decided. Raises CheckpointError and ServeError."""
    codec = load_codec(opened.path)
    model = _load_model(opened, options, decision)
    capacity = decision.capacity
    length, wanted = capacity.max_model_len, capacity.wanted_len
    if length < wanted:
        _log.warning("the context is cut from %d to %d tokens: no more fit", wanted, length)
    codec.bound(length)
    _log.info(
        "loaded %s: %s, %s on %s, %.0f MB, context %d tokens, cache %d tokens of %.0f KB",
        opened.path,
        opened.stored.scheme_names,
        str(model.dtype).removeprefix("torch."),
        model.device.type,
        model.weight_bytes / 1e6,
        length,
        decision.cache_tokens,
        capacity.cache.bytes_for(1) / 1e3,
    )
    return Runtime(
        model=model,
        codec=codec,
        eos_ids=eos_ids(model.generation_config.eos_token_id, codec),
        vocabulary=_vocabulary(model.model),
        max_model_len=length,
        prefill_chunk=options.prefill_chunk,
        max_sequences=options.sequences,
        cache_tokens=decision.cache_tokens,
        prefix_reuse=options.prefix_reuse,
    )


def _load_model(
    opened: OpenedModel, options: ServeOptions, decision: Decision
) -> CpuModel | TransformersModel:
    stored = opened.stored
    # In C, weights that are not quantised need never be wider than they are stored.
    as_stored = decision.in_c and not stored.layers
    model: Any = load(
        stored,
        dense=isinstance(stored, GridCheckpoint),
        config=opened.config,
        dtype="auto" if as_stored else decision.dtype,
    )
    decode_once(model, decision.decoded)
    model = model.to(torch.device(decision.machine.device))
    pack_model(model, model.dtype)
    if decision.decoded:
        _log.warning(
            "no %s kernel for %s: such weights are decoded once, all take %.0f MB in place of %.0f",
            "+".join(map(str, decision.decoded)),
            decision.machine.device,
            weight_bytes(model) / 1e6,
            stored.file_bytes() / 1e6,
        )
    if decision.in_c:
        # What its author published in 16 bits needs no more in prompts.
        rounds = options.dtype == "auto" and opened.dtype in ("bfloat16", "float16")
        return CpuModel(model, options.sequences, rounds=rounds)
    if model.device.type == "cuda":
        record = cuda_graphs.recorder(model.device)
        return CapturedModel(model, record, decision.cache_tokens // 2)
    return TransformersModel(model)


def sampling_defaults(model: LanguageModel) -> SamplingParams:
    """What a request gets that says nothing: the model's generation_config, as in vLLM."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: getattr(model.generation_config, name, None) for name in names}
    return replace(
        SamplingParams(), **{name: value for name, value in values.items() if value is not None}
    )


def load_codec(folder: Path) -> TextCodec:
    """The tokenizer of a folder. Raises ServeError where none can be read.

    Beside Mistral's tekken.json, transformers would take mistral-common's tokenizer, which knows no
    vocabulary by text. It still writes the conversations of folders without a chat template.
    """
    tekken = (folder / "tekken.json").is_file()
    try:
        options = {"mistral_format": False} if tekken else {}
        tokenizer = read_tokenizer(folder, **options)
        if tekken and not tokenizer.chat_template and find_spec("mistral_common"):
            mistral = read_tokenizer(folder, mistral_format=True)
            return TextCodec(tokenizer, MistralTemplate(mistral))
    except CheckpointError as error:
        raise ServeError(
            f"no tokenizer can be read: {error}; copy tokenizer.json and tokenizer_config.json of "
            "the original model into it"
        ) from error
    return TextCodec(tokenizer)


def _vocabulary(model: Any) -> int:
    """The tokens that a model can read and write, whatever its tokenizer has."""
    embedding = model.get_input_embeddings()
    packed = isinstance(embedding, AQLMLayer)
    rows: int = embedding.out_features if packed else embedding.weight.shape[0]
    return min(rows, int(model.config.get_text_config().vocab_size))


def eos_ids(listed: int | list[int] | None, codec: TextCodec) -> frozenset[int]:
    """Where answers end: at the checkpoint's eos_token_id, the tokenizer's, and the chat template's
    end of a turn. Warns where only the template knows it."""
    known = [*(listed if isinstance(listed, list) else [listed]), codec.eos_id]
    turn = codec.end_of_turn
    if turn is not None and turn not in known:
        _log.warning(
            "answers end at %s, as in the chat template: the checkpoint's eos_token_id lacks it",
            codec.token_text(turn),
        )
    return frozenset(token for token in [*known, turn] if token is not None)
