"""Calibration tokens: from files, a Hugging Face dataset, or sampled from the model itself.

Text is plain ("text" of a row) or a conversation ("messages" of a row, through the model's chat
template); one file may hold both.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import DataError
from pvrt.evaluate import read_utf8
from pvrt.plan import cache_shape

_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".raw", ".jsonl"}


#: Plain text, or the messages of a conversation.
Document = str | list[dict[str, Any]]


@dataclass(frozen=True)
class CalibrationData:
    """Token windows [samples, length] int64 on CPU, and where they came from.

    positions: alike, the place of each token since its document or its window began; None where
    every window is one document.
    """

    tokens: Tensor
    origin: str
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | list[int]) -> "CalibrationData":
        positions = None if self.positions is None else self.positions[which]
        return replace(self, tokens=self.tokens[which], positions=positions)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and positions."""
        parts = [self.tokens] if self.positions is None else [self.tokens, self.positions]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def from_text(spec: str, tokenizer: Any, samples: int, length: int, seed: int) -> CalibrationData:
    """Random non-overlapping windows of a text file, a folder of them, or a dataset.

    `spec` is a path, or a Hugging Face dataset name ("name", "name:split"; "hf:" forces it).
    Documents are tokenised one by one and joined. Raises DataError when the text is unreadable or
    has fewer than samples x length tokens.
    """
    windows: list[Tensor] = []
    positions: list[Tensor] = []
    pending: list[int] = []
    places: list[int] = []
    # Enough text for a fair choice of windows, without tokenising a whole dataset.
    wanted = 8 * samples
    for document in documents(spec):
        ids = _tokenised(document, tokenizer, spec)
        pending += ids
        places += range(len(ids))
        while len(pending) >= length:
            windows.append(torch.tensor(pending[:length]))
            positions.append(torch.tensor(places[:length]).minimum(torch.arange(length)))
            del pending[:length], places[:length]
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
    chosen = order[:samples].tolist()
    tokens, kept = (torch.stack([part[i] for i in chosen]) for part in (windows, positions))
    return CalibrationData(tokens, spec, kept)


def _tokenised(document: Document, tokenizer: Any, spec: str) -> list[int]:
    if isinstance(document, str):
        ids: list[int] = tokenizer(document, verbose=False)["input_ids"]
        return ids
    if not tokenizer.chat_template:
        raise DataError(f"{spec} holds conversations, but the model has no chat template for them")
    try:
        ids = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)
    except Exception as error:  # templates raise what they like
        shown = json.dumps(document)[:100]
        raise DataError(f"the model's chat template refuses {shown} of {spec}: {error}") from error
    return ids


def documents(spec: str) -> Iterator[Document]:
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


def _file_documents(file: Path) -> Iterator[Document]:
    text = read_utf8(file)
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        document = _document(row)
        if document is None:
            raise DataError(
                f'{file}:{number} is not a JSON object with a string "text" or a list "messages" '
                'of {"role": ..., "content": ...}'
            )
        yield document


def _document(row: Any) -> Document | None:
    """The text or the messages of a row; None where it has neither."""
    if not isinstance(row, dict):
        return None
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return text
    if isinstance(messages, list) and messages:
        chat = all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        return messages if chat else None
    return None


def _dataset_documents(name: str) -> Iterator[Document]:
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
            document = _document(row)
            if document is None:
                raise DataError(
                    f'dataset {name} has no column "text" or "messages"; it has {sorted(row)}'
                )
            yield document
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
