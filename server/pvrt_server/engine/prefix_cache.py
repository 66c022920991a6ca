"""Prompts that begin like something known: its keys and values are used again."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from pvrt_server.engine.models import LanguageModel
from pvrt_server.engine.sequences import Sequence

# Fewer tokens are read again as fast as they are copied.
LEAST = 16


class PrefixCache:
    """States of at most `most` finished sequences, the one used last at the end; 0 is off.

    Sizes count tokens.
    """

    def __init__(self, model: LanguageModel, most: int) -> None:
        self._model = model
        self._most = most
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.size = 0

    def add(self, sequence: Sequence) -> None:
        """Keep what a finished sequence has read."""
        if sequence.state is None or sequence.state.length < LEAST:
            return
        tokens = tuple(sequence.tokens[: sequence.state.length])
        for known in [known for known in self._states if shared(known, tokens) == len(known)]:
            self._take(known)  # the new one serves all that this one did
        self._states[tokens] = sequence.state
        self.size += len(tokens)
        self.shrink(self.size)

    def find(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Give a sequence that has read nothing the longest beginning that is known.

        What a finished sequence left is taken as it is where all of it is used, else copied.
        """
        if not self._most or sequence.scores_prompt:
            return  # the logits of all tokens are asked for
        prompt = sequence.tokens[:-1]  # the last must be read for its logits
        best, length, origin = None, LEAST - 1, None
        for known, state in self._states.items():
            if (same := shared(known, prompt)) > length:
                best, length, origin = state, same, known
        for other in running:
            if other.state is None or other is sequence:
                continue
            same = min(shared(other.tokens, prompt), other.state.length)
            if same > length:
                best, length, origin = other.state, same, None
        if best is None:
            return
        if origin is not None and length == len(origin):
            sequence.state = self._take(origin)
        else:
            sequence.state = self._model.copy(best, length)
            if origin is not None:
                self._states.move_to_end(origin)
        sequence.cached = 0 if sequence.state is None else length

    def shrink(self, size: int) -> None:
        """Forget what was not used for longest, until at most `size` tokens are kept."""
        while self._states and (self.size > size or len(self._states) > self._most):
            self._take(next(iter(self._states)))

    def _take(self, tokens: tuple[int, ...]) -> Any:
        self.size -= len(tokens)
        return self._states.pop(tokens)


def shared(first: "list[int] | tuple[int, ...]", second: "list[int] | tuple[int, ...]") -> int:
    """How many tokens two sequences have in common at their beginnings."""
    low, high = 0, min(len(first), len(second))
    if not high or first[0] != second[0]:
        return 0
    first, second = list(first[:high]), list(second[:high])
    while low < high:  # comparing whole slices is a hundred times faster than a loop
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
