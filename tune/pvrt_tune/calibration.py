"""Calibration tokens: from files, a Hugging Face dataset, or sampled from the model itself."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import DataError
from pvrt.evaluate import read_utf8
from pvrt.plan import cache_shape

_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".raw", ".jsonl"}


@dataclass(frozen=True)
class CalibrationData:
    """Token windows [samples, length] int64 on CPU, where they came from, and their digest."""

    tokens: Tensor
    origin: str

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def from_text(spec: str, tokenizer: Any, samples: int, length: int, seed: int) -> CalibrationData:
    """Random non-overlapping windows of a text file, a folder of them, or a dataset.

    `spec` is a path, or a Hugging Face dataset name ("name", "name:split"; "hf:" forces it).
    Documents are tokenised one by one and joined. Raises DataError when the text is unreadable or
    has fewer than samples x length tokens.
    """
    windows: list[Tensor] = []
    pending: list[int] = []
    # Enough text for a fair choice of windows, without tokenising a whole dataset.
    wanted = 8 * samples
    for text in documents(spec):
        pending += tokenizer(text, verbose=False)["input_ids"]
        while len(pending) >= length:
            windows.append(torch.tensor(pending[:length]))
            del pending[:length]
        if len(windows) >= wanted:
            break
    if len(windows) < samples:
        found = len(windows) * length + len(pending)
        advice = f"or --samples {len(windows)}" if windows else f"or --length {max(found, 1)}"
        raise DataError(
            f"{spec} holds {found} tokens, {samples} windows of {length} need {samples * length}; "
            f"give more text {advice}"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return CalibrationData(torch.stack([windows[i] for i in order[:samples].tolist()]), spec)


def documents(spec: str) -> Iterator[str]:
    """Documents of a calibration spec, in a fixed order; see `from_text`."""
    path = Path(spec).expanduser()
    if not spec.startswith("hf:") and path.exists():
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)
            if not files:
                known = ", ".join(sorted(_TEXT_SUFFIXES))
                raise DataError(f"{path} holds no text files ({known})")
        for file in files:
            yield from _file_documents(file)
    elif not spec.startswith("hf:") and path.suffix in _TEXT_SUFFIXES:
        raise DataError(f"{spec} does not exist; give a text file, a folder or a dataset name")
    else:
        yield from _dataset_documents(spec.removeprefix("hf:"))


def _file_documents(file: Path) -> Iterator[str]:
    text = read_utf8(file)
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            document = None
        if not isinstance(document, str):
            raise DataError(f'{file}:{number} is not a JSON object with a string "text"')
        yield document


def _dataset_documents(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{name} is no file or folder here, and reading it as a Hugging Face dataset needs "
            "pip install 'pvrt[data]'"
        ) from error
    repository, _, split = name.partition(":")
    try:
        rows = load_dataset(repository, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise DataError(f'dataset {name} has no "text" column; it has {sorted(row)}')
            yield row["text"]
    except DataError:
        raise
    except Exception as error:  # the library raises dozens of types, all about one cause
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"cannot read {name} as a file, folder or dataset: {reason}") from error


def from_model(
    model: Any,
    samples: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationData:
    """Windows sampled from the model itself, for when no text is at hand.

    Each starts at the beginning-of-sequence token (or a random token where there is none) and
    follows the model's own distribution at temperature 1. `progress(done, total)` counts tokens
    in rows of windows. Deterministic for one seed on one machine.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows_at_once(model.config, samples, length)
    windows: list[Tensor] = []
    for start in range(0, samples, rows):
        done, total = start // rows * length, -(-samples // rows) * length

        def shown(tokens: int, done: int = done, total: int = total) -> None:
            if progress is not None:
                progress(done + tokens, total)

        windows.append(_sample(model, min(rows, samples - start), length, generator, shown))
    return CalibrationData(torch.cat(windows), "sampled from the model")


def rows_at_once(config: Any, samples: int, length: int) -> int:
    """Windows to sample together: as many as 4 GiB of 16-bit key-value cache hold.

    It depends on nothing that may change between two runs, or their texts would differ.
    """
    size = cache_shape(config).bytes_for(length)
    return max(1, min(samples, (4 << 30) // size))


def _sample(
    model: Any, rows: int, length: int, generator: torch.Generator, shown: Callable[[int], None]
) -> Tensor:
    """Tokens [rows, length]."""
    config = model.config.get_text_config()
    tokens = torch.randint(config.vocab_size, (rows, 1), generator=generator)
    if config.bos_token_id is not None and config.bos_token_id != config.eos_token_id:
        # The random second token spreads the windows over the model's subjects.
        tokens = torch.cat([torch.full_like(tokens, config.bos_token_id), tokens], 1)
    cache, step = None, tokens
    with torch.inference_mode():
        while tokens.shape[1] < length:
            output = model(step.to(model.device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(-1).cpu()
            step = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, step], 1)
            shown(tokens.shape[1])
    return tokens[:, :length].clone()
