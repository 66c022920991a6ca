"""Text to tokens and back: prompts, chat templates, and text that arrives token by token."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pvrt.tools.perplexity import beginning
from pvrt_server.engine.chat_template import ChatTemplate
from pvrt_server.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders print for bytes that are no character
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# How families of code models write "before, after, now the middle".
_GAP_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
# Enough tokens to decode the next one in context (words of a sentencepiece model lose their space
# at the start of a text), few enough that decoding them again for every token costs microseconds.
_CONTEXT = 8
_WINDOW = 32
# A character has at most 4 bytes, so what is still broken after these many tokens stays so.
_PATIENCE = 12


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(rest)}


class TextCodec:
    """A tokenizer as the server needs it. chat writes conversations, by default its template."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat: ChatTemplate | None = None
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._alphabet = _byte_alphabet()
        self._special = frozenset(tokenizer.all_special_ids)
        self._bytes: dict[int, bytes] = {}
        self._eos_id: int | None = tokenizer.eos_token_id
        self._longest_text = math.inf
        self.chat = chat or ChatTemplate(tokenizer)

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own end-of-text token."""
        return self._eos_id

    def bound(self, tokens: int) -> None:
        """Refuse texts that cannot fit a number of tokens, without the time to tokenize them."""
        self._longest_text = tokens * max(map(len, self._tokenizer.get_vocab()), default=1)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    def info(self) -> dict[str, Any]:
        """What clients build prompts with: the template, and the special tokens by their roles."""
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "chat_template": self.template(),
            **self._tokenizer.special_tokens_map,
        }

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; special=True adds what the tokenizer puts before one (BOS).

        Raises RequestError for a string that is no text, which JSON can write, and for one beyond
        `bound`.
        """
        return self._encode(text, special, "prompt")

    def encode_gap(self, before: str, after: str) -> list[int]:
        """Token ids that ask a code model for the text between two. Raises RequestError."""
        vocabulary = self._tokenizer.get_vocab()
        marks = next((marks for marks in _GAP_MARKS if vocabulary.keys() >= set(marks)), None)
        if marks is None:
            raise RequestError(
                "this model has no tokens that ask for a middle: suffix is not supported",
                "suffix",
                "unsupported_parameter",
            )
        first, second, last = marks
        return self._encode(f"{first}{before}{second}{after}{last}", True, "prompt")

    def template(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
        """The chat template for conversations with or without tools; None where there is none."""
        return self.chat.source(tools)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        tools are what the model may call, as the request has them; template_kwargs are variables
        that the template knows (enable_thinking and the like).
        Raises RequestError when there is no template or it refuses the messages.
        """
        text = self.chat.render(
            messages,
            tools,
            template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._encode(text, False, "messages")  # a template writes its own special tokens

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends answers under the chat template; None where no token does."""
        text = self.chat.end_of_turn
        added = self._tokenizer.get_added_vocab()
        marks = [mark for mark in added if text is not None and text.startswith(mark)]
        return added[max(marks, key=len)] if marks else None

    def _encode(self, text: str, special: bool, field: str) -> list[int]:
        if len(text) > self._longest_text:
            raise RequestError(
                f"{field} has {len(text)} characters, more than this model's context can hold",
                field,
                "context_length_exceeded",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{field} holds half a surrogate pair: {error}", field) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return [*self._beginning, *ids] if special else ids

    @cached_property
    def _beginning(self) -> list[int]:
        """What the tokenizer puts before a text. What it puts after one would end a prompt."""
        return beginning(self._tokenizer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by name; bytes that are no text as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, also when they are part of a character only."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # models round their vocabulary up: these have no text
            return b""
        if token_id in self._special:
            return piece.encode()
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # a sentencepiece word with its space
            return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        text = self.decode([token_id])
        if _BROKEN in text and all(char in self._alphabet for char in piece):
            return bytes(self._alphabet[char] for char in piece)
        return text.encode()

    def stream(self, prompt_ids: Sequence[int] = ()) -> "TextStream":
        """A stream of text that follows a prompt."""
        return TextStream(self, prompt_ids)


class TextStream:
    """Token ids in, text out, never half a character.

    Decodes a short window of last tokens and hands out what is new. Text that ends in a broken
    character waits, for at most 12 tokens: later bytes can only repair the end.
    """

    def __init__(self, codec: TextCodec, prompt_ids: Sequence[int] = ()) -> None:
        self._codec = codec
        self._window, text = self._context(list(prompt_ids[-_CONTEXT:]))
        # A prompt may end inside a character: those bytes are no context, they wait for the rest.
        self._sent = text.rstrip(_BROKEN)
        self._waiting = 0
        self.length = 0  # characters handed out

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes none."""
        self._window.append(token_id)
        text = self._codec.decode(self._window)
        self._waiting += 1
        stable = text if self._waiting > _PATIENCE else text.rstrip(_BROKEN)
        new = stable[len(self._sent) :]
        if new or stable == text:
            self._waiting = 0
            self._sent = stable
        if len(self._window) >= _WINDOW:
            self._shorten(complete=stable == text)
        self.length += len(new)
        return new

    def _shorten(self, complete: bool) -> None:
        context, text = self._context(self._window[-_CONTEXT:])
        if _BROKEN not in text or len(self._window) > 4 * _WINDOW:
            self._window = context
            self._sent = text if complete else text.rstrip(_BROKEN)

    def _context(self, tokens: list[int]) -> tuple[list[int], str]:
        """Tokens to decode the next one with, and their text.

        They start with a whole character where possible: a decoder of single-byte tokens takes a
        whole run of them for broken when its first is.
        """
        for start in range(min(4, len(tokens))):
            text = self._codec.decode(tokens[start:])
            if _BROKEN not in text:
                return tokens[start:], text
        return tokens, self._codec.decode(tokens)


class StopFilter:
    """Lets text through up to the first stop string, which may span any number of pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found behind it)."""
        if not self._stops or not text:
            return text, False
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, once no more can follow."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
