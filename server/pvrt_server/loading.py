"""From a checkpoint folder to what sequences run on: the model on its device, and its tokenizer."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pvrt
from pvrt.checkpoint import is_aqlm, parse_quantization_config, read_config, weight_files
from pvrt.device import default_device, free_device_bytes
from pvrt.errors import ServeError
from pvrt.linear import pack_model
from pvrt.memory import free_host_bytes
from pvrt.packed import is_quantised
from pvrt.scheme import Scheme
from pvrt_server import cpu_model
from pvrt_server.models import LanguageModel, TransformersModel, weight_bytes
from pvrt_server.sampling import SamplingParams
from pvrt_server.sequence import Runtime
from pvrt_server.text import TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("pvrt_server")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class EngineOptions:
    """How to load and run. Raises ServeError for a value out of range.

    dtype auto is the checkpoint's own on a GPU and float32 on CPU, the only type that Llama-like
    models decode in without transformers (`cpu_model`). max_model_len (tokens of prompt and answer)
    None is what the model was made for, or what fits. max_sequences bounds the sequences that run
    at once, max_requests the requests that run or wait. Longer prompts than
    prefill_chunk tokens are read in pieces, which bounds memory and lets others go on meanwhile.
    cache_bytes is for the keys and values of all sequences; None takes half of the free memory,
    or more where one sequence needs it. prefix_reuse: prompts do not read again what is known.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    prefill_chunk: int = 512
    max_sequences: int = 16
    max_requests: int = 256
    cache_bytes: int | None = None
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ServeError(f"dtype is {self.dtype!r}; choose auto, {', '.join(DTYPES)}")
        for name in ("max_model_len", "prefill_chunk", "max_sequences", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ServeError(f"{name} is {value}; it must be at least 1")


def load_runtime(folder: Path, options: EngineOptions) -> Runtime:
    """Load model and tokenizer. Raises CheckpointError and ServeError."""
    from transformers import AutoConfig

    device = torch.device(default_device())
    scheme = _scheme(folder)
    dense = scheme is not None and not scheme.has_fast_kernel(device.type)
    dtype: torch.dtype | str = DTYPES.get(options.dtype, "auto")
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    config = AutoConfig.from_pretrained(folder)
    max_model_len = _context_length(folder, config.get_text_config(), options.max_model_len)
    codec = TextCodec(_load_tokenizer(folder))
    in_c = dtype == torch.float32 and cpu_model.supports(config, device)
    # In C, weights that are not quantised need never be wider than they are stored.
    as_stored = in_c and not is_quantised(read_config(folder))
    model: Any = pvrt.load(folder, dense=dense, dtype="auto" if as_stored else dtype).to(device)
    if not dense:
        pack_model(model, model.dtype)
    language_model: LanguageModel
    if in_c and cpu_model.runs(model):
        language_model = cpu_model.CpuModel(model, options.max_sequences)
    else:
        model = model.float() if as_stored else model
        language_model = TransformersModel(model, options.max_sequences)
    if options.max_sequences > language_model.most_rows:
        raise ServeError(
            f"max_num_seqs is {options.max_sequences}; this model runs at most "
            f"{language_model.most_rows} sequences at once on a CPU"
        )
    size = weight_bytes(model)
    if dense:
        stored = sum(file.stat().st_size for file in weight_files(folder))
        _log.warning(
            "no %s kernel for %s: the weights are decoded once and take %.0f MB in place of %.0f",
            scheme,
            device.type,
            size / 1e6,
            stored / 1e6,
        )
    cache_tokens = _cache_tokens(language_model, options, max_model_len)
    if cache_tokens < max_model_len:
        max_model_len = _shorten(max_model_len, cache_tokens, language_model, options)
    codec.bound(max_model_len)
    runtime = Runtime(
        model=language_model,
        codec=codec,
        eos_ids=_eos_ids(model, codec),
        vocabulary=model.config.get_text_config().vocab_size,
        max_model_len=max_model_len,
        prefill_chunk=options.prefill_chunk,
        max_sequences=options.max_sequences,
        cache_tokens=cache_tokens,
        prefix_reuse=options.prefix_reuse,
    )
    _log.info(
        "loaded %s: %s, %s on %s, %.0f MB, context %d tokens, cache %d tokens of %.0f KB",
        folder,
        scheme or "dense",
        str(language_model.dtype).removeprefix("torch."),
        device.type,
        size / 1e6,
        runtime.max_model_len,
        runtime.cache_tokens,
        language_model.cache_bytes_per_token / 1e3,
    )
    return runtime


def _cache_tokens(model: LanguageModel, options: EngineOptions, length: int) -> int:
    """How many tokens' keys and values may be kept: one sequence's, and what else fits well."""
    each = max(1, model.cache_bytes_per_token)
    if options.cache_bytes is not None:
        return options.cache_bytes // each
    free = free_device_bytes(model.device)
    if free is None:
        free = free_host_bytes()
    return max(min(length, free // each), free // 2 // each)


def _shorten(length: int, fits: int, model: LanguageModel, options: EngineOptions) -> int:
    """The context length where the cache is too small for `length`; ServeError if it was asked."""
    megabytes = fits * model.cache_bytes_per_token / 1e6
    if options.max_model_len is not None or fits < 1:
        raise ServeError(
            f"a context of {length} tokens needs {length * model.cache_bytes_per_token / 1e6:.0f} "
            f"MB of cache, and there are {megabytes:.0f}; give --max-model-len {max(fits, 1)} or "
            "less, or free some memory"
        )
    _log.warning("the context is cut from %d to %d tokens: %.0f MB", length, fits, megabytes)
    return fits


def sampling_defaults(model: LanguageModel) -> SamplingParams:
    """What a request gets that says nothing: the model's generation_config, as in vLLM."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: getattr(model.generation_config, name, None) for name in names}
    return replace(
        SamplingParams(), **{name: value for name, value in values.items() if value is not None}
    )


def _scheme(folder: Path) -> Scheme | None:
    config = read_config(folder)
    if not is_aqlm(config):
        return None
    return parse_quantization_config(config["quantization_config"], str(folder))


def _load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]}); copy "
            "tokenizer.json and tokenizer_config.json of the original model into it"
        ) from error


def _eos_ids(model: Any, codec: TextCodec) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in [*listed, codec.eos_id] if token is not None)


def _context_length(folder: Path, config: Any, wanted: int | None) -> int:
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if made_for is None:
        if wanted is None:
            raise ServeError(
                f"{folder}/config.json has no max_position_embeddings; say --max-model-len"
            )
        return wanted
    if wanted is not None and wanted > made_for:
        raise ServeError(
            f"max_model_len is {wanted}, but the model was made for {made_for} tokens; give "
            f"--max-model-len {made_for} or less"
        )
    return wanted or made_for
