"""Calibration tokens from files or a Hugging Face dataset.

Text is plain ("text" of a row) or a conversation ("messages" of a row, through the model's chat
template); one file may hold both.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import DataError
from pvrt_tune.data.documents import Found, documents, is_local
from pvrt_tune.data.rows import Document


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


@dataclass(frozen=True)
class Windows:
    """How many windows of text to draw, of how many tokens each, and the seed of the draw."""

    count: int
    length: int
    seed: int


def from_text(
    spec: str,
    tokenizer: Any,
    wanted: Windows,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> CalibrationData:
    """Random non-overlapping windows of a text file, a folder of them, or a dataset.

    `spec` is a path, or a Hugging Face dataset name ("name", "name:split"; "hf:" forces it), of
    which the beginning is read. Documents are tokenised piece by piece, in stretches from all over
    the text until they give enough windows, and joined. `progress(done, total)` counts windows,
    `notice(line)` is told what was found and skipped.
    Raises DataError when the text is unreadable or has fewer tokens than the windows wanted.
    """
    samples, length, seed = wanted.count, wanted.length, wanted.seed
    found = Found()
    reach = _reach(spec, samples * length)
    stretches = list(_stretches(documents(spec, found), length, reach))
    order = torch.randperm(len(stretches), generator=torch.Generator().manual_seed(seed)).tolist()
    read: dict[int, _Tokens] = {}
    count = 0
    for number in order:
        read[number] = _tokenised(stretches[number], tokenizer, spec, found)
        count += len(read[number].ids) // length
        if progress is not None:
            progress(min(count, samples), samples)
        if count >= samples:
            break
    if notice is not None:
        notice(found.line(spec))
    windows = [_joined(run).windows(length) for run in _neighbours(read)]
    count = sum(len(part) for part, _ in windows)
    if count < samples:  # all of the text was read, so that it is one run
        held = sum(len(part.ids) for part in read.values())
        advice = f"or --samples {count}" if count else f"or --length {max(held, 1)}"
        raise DataError(
            f"{spec} holds {held} tokens, {samples} windows of {length} need {samples * length}; "
            f"give more text {advice}" + (f" ({found.line(spec)})" if found.skipped else "")
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    tokens, positions = (torch.cat(part)[chosen] for part in zip(*windows, strict=True))
    return CalibrationData(tokens, spec, positions)


@dataclass(frozen=True)
class _Piece:
    """A document or a part of one, and whether it has the document's beginning and its end."""

    document: Document
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class _Tokens:
    """Tokens [n] int64 of some text, and where in them documents begin."""

    ids: Tensor
    begins: Tensor

    def windows(self, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and positions of all whole windows, [count, length]."""
        count = len(self.ids) // length
        place = torch.arange(len(self.ids))
        since = torch.zeros_like(place)
        since[self.begins] = self.begins
        place = (place - since.cummax(0).values)[: count * length].view(count, length)
        return self.ids[: count * length].view(count, length), place.minimum(torch.arange(length))


# Characters of a stretch of text per token of a window: some windows, so that little is lost at its
# ends. And of a dataset per token of all windows, where there may be terabytes more.
_STRETCH = 16
_REACH = 32
# A document that is longer than a stretch is cut, after the end of a line or else of a word.
_ENDS = (re.compile(r"\n(?=\S)"), re.compile(r"(?<=\S)(?=\s)"))


def _reach(spec: str, tokens: int) -> float:
    """How many characters of a spec to read."""
    return math.inf if is_local(spec) else _REACH * tokens


def _stretches(found: Iterable[Document], length: int, reach: float) -> Iterator[list[_Piece]]:
    """The documents in their order, in stretches of pieces."""
    stretch: list[_Piece] = []
    size = total = 0
    for document in found:
        for piece in _pieces(document, _STRETCH * length):
            stretch.append(piece)
            size += _characters(piece.document)
            if size >= _STRETCH * length:
                yield stretch
                total += size
                stretch, size = [], 0
        if total >= reach:
            return
    if stretch:
        yield stretch


def _characters(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    return sum(len(str(message.get("content"))) for message in document.messages)


def _pieces(document: Document, size: int) -> Iterator[_Piece]:
    """A plain text in parts of about `size` characters; a conversation whole."""
    if not isinstance(document, str) or len(document) <= size:
        yield _Piece(document)
        return
    start = 0
    while start < len(document):
        stop = start + size
        ends = (end.search(document, stop, stop + size) for end in _ENDS)
        stop = next((end.end() for end in ends if end), stop + size)
        yield _Piece(document[start:stop], start == 0, stop >= len(document))
        start = stop


def _neighbours(read: Mapping[int, _Tokens]) -> Iterator[list[_Tokens]]:
    """Runs of stretches that follow each other in the text."""
    run: list[_Tokens] = []
    for number in sorted(read):
        if number - 1 not in read and run:
            yield run
            run = []
        run.append(read[number])
    if run:
        yield run


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    """The tokens of parts in a row."""
    begins, offset = [], 0
    for part in parts:
        begins.append(part.begins + offset)
        offset += len(part.ids)
    return _Tokens(torch.cat([part.ids for part in parts]), torch.cat(begins))


def _tokenised(pieces: Sequence[_Piece], tokenizer: Any, spec: str, found: Found) -> _Tokens:
    ids: list[int] = []
    begins: list[int] = []
    for piece in pieces:
        if piece.begins:
            begins.append(len(ids))
        ids += _piece_tokens(piece, tokenizer, spec, found)
    # A document that is empty to the tokenizer begins nowhere.
    begins = [place for place in begins if place < len(ids)]
    return _Tokens(torch.tensor(ids, dtype=torch.int64), torch.tensor(begins, dtype=torch.int64))


def _piece_tokens(piece: _Piece, tokenizer: Any, spec: str, found: Found) -> list[int]:
    """Token numbers, with the special ones that a document begins and ends with; none for a
    conversation that the chat template refuses, which is noted in `found`.
    """
    document = piece.document
    if not isinstance(document, str) and document.plain is not None:
        document = document if tokenizer.chat_template else document.plain
    if isinstance(document, str):
        if piece.begins and piece.ends:
            whole: list[int] = tokenizer(document, verbose=False)["input_ids"]
            return whole
        ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        around: list[int] = tokenizer("", verbose=False)["input_ids"]
        first = [token for token in around if token == tokenizer.bos_token_id]
        last = [token for token in around if token != tokenizer.bos_token_id]
        return [*first * piece.begins, *ids, *last * piece.ends]
    if not tokenizer.chat_template:
        raise DataError(f"{spec} holds conversations, but the model has no chat template for them")
    try:
        chat: list[int] = tokenizer.apply_chat_template(
            document.messages, tools=document.tools, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise what they like
        shown = json.dumps(document.messages)[:100]
        found.skip(f"{spec}: the model's chat template refuses {shown}:", error)
        return []
    return chat
