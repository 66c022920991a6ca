"""Whether grammars can be used: found out by a process of its own, which can be killed.

A schema of a kilobyte can keep llguidance at work without end, a gigabyte a minute, and none of its
limits holds then. Nor can a thread be stopped.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache

from pvrt_server.errors import BusyError, RequestError

_CPU_SECONDS = 3  # of the grammars of a request; large schemas of tools take half a second
_SECONDS = 60  # of waiting, on a machine that is busy: no word about the grammar
_BYTES = 1 << 30
_LONGEST = 1 << 20
_AT_ONCE = threading.Semaphore(2)  # threads that wait are not there for anything else

# A line for each grammar: why nothing can follow it, or null. What is wrong with its text is left
# to who compiles it: that took no longer here.
_CHECK = f"""
import json, resource, sys
seconds = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLTokenizer
tokenizer = LLTokenizer("byte")
for grammar in json.load(sys.stdin):
    said = None
    if not LLMatcher.validate_grammar(grammar):
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_error():
            said = "no answer can follow it"
    print(json.dumps(said), flush=True)
"""


def check_grammar(grammar: str, field: str) -> None:
    """As `check_grammars` for a single one."""
    check_grammars([(field, grammar)])


def check_grammars(grammars: Sequence[tuple[str, str]]) -> None:
    """Raise RequestError for grammars of a request (of `LLMatcher.grammar_from_...`), each with the
    field that it is of, that are too long, take too many CPU seconds in all, or let no answer
    follow; BusyError where the machine has no time to find out.
    """
    if sum(len(grammar) for _, grammar in grammars) > _LONGEST:
        field, _ = max(grammars, key=lambda pair: len(pair[1]))
        raise RequestError(f"{field} cannot be enforced: it is longer than a megabyte", field)
    if found := _problem(tuple(dict.fromkeys(grammar for _, grammar in grammars))):
        field = next(field for field, grammar in grammars if grammar == found[0])
        raise RequestError(f"{field} cannot be enforced: {found[1]}", field)


@lru_cache(64)
def _problem(grammars: tuple[str, ...]) -> tuple[str, str] | None:
    """The first grammar that cannot be used, and why."""
    if not grammars:
        return None
    busy = BusyError("other grammars are being checked; try again", _SECONDS)
    if not _AT_ONCE.acquire(timeout=_SECONDS):
        raise busy
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHECK, str(_CPU_SECONDS)],
            input=json.dumps(grammars).encode(),
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise busy from None  # and nothing is remembered
    finally:
        _AT_ONCE.release()
    said = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:  # at the one that has no line
        return grammars[min(len(said), len(grammars) - 1)], "it is too complex"
    return next(((each, why) for each, why in zip(grammars, said, strict=True) if why), None)
