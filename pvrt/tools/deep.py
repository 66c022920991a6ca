"""What `pvrt inspect --deep` computes: layers and greedy tokens on this machine.

Hashes tell whether a checkpoint's bytes are those that were written. This tells whether this
machine, with its kernels and versions, makes of them what the one that tuned them did.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pvrt.errors import CheckpointError, RunError
from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.folder import MANIFEST_FILE, LayerInfo, StoredModel, read_json_object
from pvrt.format.grid import GridCheckpoint, GridLayer
from pvrt.format.scheme import GridScheme
from pvrt.hf.load import load
from pvrt.hf.progress_bars import no_progress_bar
from pvrt.memory import free_host_bytes
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.whole_model import pack_model
from pvrt.tools.held_out import longest_context
from pvrt_kernels import reference

#: The key of pvrt.json, what the tokens answer, and how many there are.
GREEDY = "greedy"
PROMPT = "Once upon a time"
TOKENS = 16
#: A product's error norm over its norm; kernels round by less than 1e-4 (see their rounding.py).
_LARGEST_ERROR = 1e-3
#: How far a token's logit may be below the best: another instruction set decides ties otherwise.
_TIE = 0.05
_MOST = 1000  # tokens that a manifest may ask for
_ROWS = 8  # of inputs, which kernels take together; one alone goes another way

Progress = Callable[[int, int], None]


def load_for_check(stored: StoredModel) -> Any:
    """The model of a folder in float32 on the CPU, packed for its kernels as for serving.

    Raises CheckpointError for a folder that is not sound, RunError where memory is short.
    """
    grids = isinstance(stored, GridCheckpoint)
    wanted, free = _float32_bytes(stored), free_host_bytes()
    if wanted > free:
        raise RunError(
            f"{stored.path} takes {wanted / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are "
            "free; use a machine with more memory"
        )
    with no_progress_bar():
        model = load(stored, dense=grids, dtype=torch.float32)
    pack_model(model, torch.float32)
    return model


def _float32_bytes(stored: StoredModel) -> int:
    """Of a loaded model: codes as they are, grids decoded, all else in float32."""
    grids = isinstance(stored, GridCheckpoint)
    parts = {f"{name}.{part}" for name in stored.layers for part in stored.PARTS}
    weights = sum(layer.out_features * layer.in_features for layer in stored.layers.values())
    others = sum(info.elements for name, info in stored.tensors.items() if name not in parts)
    held = sum(
        info.elements * info.float_bits // 8 for n, info in stored.tensors.items() if n in parts
    )
    return 4 * others + (4 * weights if grids else held)


def greedy(model: Any, tokenizer: Any, progress: Progress) -> dict[str, list[int]]:
    """What pvrt.json says of a loaded model: a prompt, and the tokens that it finds likeliest.

    No cache is used, and nothing that a generation_config says.
    """
    known, room = range(_vocabulary(model)), _room(model)
    prompt = [int(token) for token in tokenizer(PROMPT).input_ids if token in known] or [0]
    prompt = prompt[: max(1, room - TOKENS)]
    tokens: list[int] = []
    count = min(TOKENS, room - len(prompt))
    for done in range(count):
        tokens.append(int(_logits(model, prompt + tokens)[-1].argmax()))
        progress(done + 1, count)
    return {"prompt": prompt, "tokens": tokens}


def check_deep(stored: StoredModel) -> dict[str, Any]:
    """Compute with a checkpoint, and compare.

    layers: of each scheme the smallest linear layer, multiplied by this machine's kernels, and its
    error against the plain definition in float64. greedy_tokens: how many tokens of pvrt.json the
    model gives again; None where it holds none. Raises CheckpointError where they differ.
    """
    model = load_for_check(stored)
    noted = _noted(stored, model)
    return {
        "layers": [_check_layer(stored, *each) for each in _chosen(stored, model)],
        "greedy_tokens": None if noted is None else _check_greedy(stored, model, *noted),
    }


def as_text(found: dict[str, Any]) -> str:
    """The result of `check_deep` for a terminal."""
    lines = [
        f"decoded           {layer['name']} ({layer['scheme']}), error {layer['error']:.0e}"
        for layer in found["layers"]
    ]
    tokens = found["greedy_tokens"]
    said = f"{tokens} as {MANIFEST_FILE} has them"
    if tokens is None:
        said = f"not compared: {MANIFEST_FILE} holds none"
    return "\n".join([*lines, f"greedy tokens     {said}"])


def _chosen(stored: StoredModel, model: nn.Module) -> Iterator[tuple[LayerInfo, nn.Module]]:
    """Of each scheme the smallest layer that is a linear one in the model."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    seen = set()
    for layer in sorted(stored.layers.values(), key=lambda one: one.out_features * one.in_features):
        names = (layer.name, layer.name.removeprefix(prefix), f"{prefix}{layer.name}")
        module = next((modules[name] for name in names if name in modules), None)
        if layer.scheme not in seen and isinstance(module, AQLMLinear | nn.Linear):
            seen.add(layer.scheme)
            yield layer, module


def _check_layer(stored: StoredModel, layer: LayerInfo, module: nn.Module) -> dict[str, Any]:
    x = torch.randn(_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0))
    read = stored.read_layer(layer.name)
    wanted = x.double() @ _plain(read, layer).double().T
    if read.bias is not None:
        wanted += read.bias.double()
    with torch.inference_mode():
        together, alone = module(x), module(x[:1])
    error = max(_distance(together, wanted), _distance(alone, wanted[:1]))
    if not error <= _LARGEST_ERROR:
        raise CheckpointError(
            f"{stored.path}: {layer.name} times random inputs is {error:.1e} of its size away from "
            "what its codes mean; run pvrt doctor, this machine's kernels compute something else"
        )
    return {"name": layer.name, "scheme": str(layer.scheme), "error": error}


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def _plain(read: QuantizedLayer | GridLayer, layer: LayerInfo) -> Tensor:
    """The weight [out, in] of a layer by its definition, in float32."""
    if isinstance(read, QuantizedLayer):
        books, scales = read.codebooks.float(), read.scales.float()
        weight = reference.dequantize(read.codes, books[None], scales, [layer.out_features])
        return weight if read.in_scales is None else weight * read.in_scales.float()
    assert isinstance(layer.scheme, GridScheme)
    zeros: Tensor | float = 2.0 ** (layer.scheme.bits - 1)
    if read.zeros is not None:
        zeros = _columns(read.zeros.float(), layer.scheme)
    return _columns(read.scales.float(), layer.scheme) * (read.codes.float() - zeros)


def _columns(groups: Tensor, scheme: GridScheme) -> Tensor:
    """[out, in/G] values of groups, for every column [out, in]."""
    return groups.repeat_interleave(scheme.group_size, 1)


def _noted(stored: StoredModel, model: Any) -> tuple[list[int], list[int]] | None:
    """Prompt and tokens of pvrt.json, which may hold anything; None where it has none."""
    file = stored.path / MANIFEST_FILE
    noted = read_json_object(file).get(GREEDY) if file.exists() else None
    if noted is None:
        return None
    room, vocabulary = _room(model), _vocabulary(model)
    lists = [noted.get(key) if isinstance(noted, dict) else None for key in ("prompt", "tokens")]
    prompt, tokens = (
        each if isinstance(each, list) and len(each) < room and _known(each, vocabulary) else []
        for each in lists
    )
    if not prompt or not tokens or len(prompt) + len(tokens) > room:
        raise CheckpointError(
            f"{file}: {GREEDY} must hold prompt and tokens, of the model's vocabulary and at least "
            f"one of each, {room} in all at most"
        )
    return prompt, tokens


def _known(tokens: list[Any], vocabulary: int) -> bool:
    return all(type(token) is int and 0 <= token < vocabulary for token in tokens)


def _check_greedy(stored: StoredModel, model: Any, prompt: list[int], tokens: list[int]) -> int:
    """How many tokens are the likeliest where they stand, which all must be or nearly be."""
    logits = _logits(model, prompt + tokens)[len(prompt) - 1 : -1]
    behind = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    wrong = (~(behind <= _TIE)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise CheckpointError(
            f"{stored.path}: greedy token {at + 1} is {int(logits[at].argmax())}, {MANIFEST_FILE} "
            f"has {tokens[at]}; run pvrt doctor, or copy or download the folder again"
        )
    return len(tokens)


def _room(model: Any) -> int:
    """Tokens that fit the model's context, and that a manifest may ask for."""
    return min(longest_context(model.config) or _MOST, _MOST)


def _vocabulary(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _logits(model: Any, tokens: list[int]) -> Tensor:
    """[tokens, vocabulary] in float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits
    return logits[0].float()
