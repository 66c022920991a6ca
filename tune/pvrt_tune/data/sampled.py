"""Calibration tokens that the model itself writes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import DataError
from pvrt.kv_cache import cache_name, cache_shape
from pvrt_tune.data.one_token import fast_for_one_token
from pvrt_tune.data.text import CalibrationData, Windows

# A chance is a multiple of one part in _CHANCES, a probability of one part in _PARTS.
_CHANCES = 1 << 48
_PARTS = 1 << 40
# Windows that are written together at least: fewer take hardly less time.
_PART = 16


def from_model(
    model: Any,
    wanted: Windows,
    progress: Callable[[int, int], None] | None = None,
    enough: Callable[[int], bool] | None = None,
) -> CalibrationData:
    """Windows sampled from the model itself, for when no text is at hand.

    Each starts at the beginning-of-sequence token (or a random token where there is none) and
    follows the model's own distribution at temperature 1. `progress(done, total)` counts tokens
    in rows of windows. With `enough` there are parts of an eighth, or of 16 windows, after each
    of which it is asked whether so many windows are. Deterministic for one seed on one machine.
    """
    samples, length, seed = wanted.count, wanted.length, wanted.seed
    generator = torch.Generator().manual_seed(seed)
    rows = rows_at_once(model.config, samples, length)
    if enough is not None:
        rows = min(rows, max(_PART, -(-samples // 8)))
    windows: list[Tensor] = []
    for start in range(0, samples, rows):
        done, total = start // rows * length, -(-samples // rows) * length

        def shown(tokens: int, done: int = done, total: int = total) -> None:
            if progress is not None:
                progress(done + tokens, total)

        windows.append(_sample(model, min(rows, samples - start), length, generator, shown))
        if enough is not None and enough(start + len(windows[-1])):
            break
    return CalibrationData(torch.cat(windows), "sampled from the model")


def rows_at_once(config: Any, samples: int, length: int) -> int:
    """Windows to sample together: as many as 4 GiB of 16-bit key-value cache hold.

    It depends on nothing that may change between two runs, or their texts would differ.
    """
    size = cache_shape(config).bytes_for(length)
    return max(1, min(samples, (4 << 30) // size))


def peak_bytes(config: Any, wanted: Windows, parameters: int, itemsize: int) -> int:
    """Peak of `from_model` with the model in memory, its numbers of `itemsize` bytes."""
    rows = rows_at_once(config, wanted.count, wanted.length)
    cache = cache_shape(config, itemsize)
    # Keys grow by being copied, one layer at a time; then values.
    growing = max(size * min(wanted.length, most or wanted.length) for size, most in cache.layers)
    # Logits, and their probabilities twice in int64.
    scores = config.get_text_config().vocab_size * (itemsize + 2 * 8)
    windows: int = rows * (cache.bytes_for(wanted.length) + growing // 2 + scores)
    return itemsize * parameters + windows


def _sample(
    model: Any, rows: int, length: int, generator: torch.Generator, shown: Callable[[int], None]
) -> Tensor:
    """Tokens [rows, length]. Raises DataError where the model's logits are not numbers."""
    config = model.config.get_text_config()
    tokens = torch.randint(config.vocab_size, (rows, 1), generator=generator)
    if config.bos_token_id is not None and config.bos_token_id != config.eos_token_id:
        # The random second token spreads the windows over the model's subjects.
        tokens = torch.cat([torch.full_like(tokens, config.bos_token_id), tokens], 1)
    # All chance is drawn here, so that the device is not waited for after every token.
    chances = torch.randint(_CHANCES, (rows, length), generator=generator).double() / _CHANCES
    chances, cache, steps = chances.to(model.device), None, [tokens.to(model.device)]
    broken = torch.tensor(False, device=model.device)
    with torch.inference_mode(), fast_for_one_token():
        for done in range(tokens.shape[1], length):
            output = model(steps[-1], use_cache=True, **{cache_name(): cache})
            cache = output[cache_name()]
            step, usable = _draw(output.logits[:, -1], chances[:, done : done + 1])
            broken |= ~usable
            steps.append(step)
            shown(done + 1)
    if broken:
        raise DataError("cannot sample text: the model's outputs are not numbers; give --data")
    return torch.cat(steps, 1)[:, :length].cpu()


def _draw(logits: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [rows, 1] by logits [rows, vocabulary] and chances [rows, 1] float64 in [0, 1).

    Also whether all logits are usable: numbers, not all of a row minus infinity.
    """
    # Whole numbers add up the same in any order, and their sums never fall: on every device, a
    # token of no probability adds nothing, and is never drawn.
    parts = logits.float().softmax(-1).mul_(_PARTS).nan_to_num_(0.0).long()
    sums = parts.cumsum(-1)
    del parts
    whole = sums[:, -1:]
    tokens = torch.searchsorted(sums, (chances * whole).long(), right=True)
    return tokens.clamp_(max=logits.shape[1] - 1), whole.all()
