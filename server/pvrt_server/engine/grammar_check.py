"""Whether a grammar can be used: found out by a process of its own, which can be killed.

A schema of a kilobyte can keep llguidance at work without end, a gigabyte a minute, and none of its
limits holds then. Nor can a thread be stopped.
"""

import subprocess
import sys
import threading
from functools import lru_cache

from pvrt_server.errors import BusyError, RequestError

_CPU_SECONDS = 3  # of one grammar; large schemas of tools take half a second
_SECONDS = 60  # of waiting, on a machine that is busy: no word about the grammar
_BYTES = 1 << 30
_LONGEST = 1 << 20
_AT_ONCE = threading.Semaphore(2)  # threads that wait are not there for anything else

# What it prints is why nothing can follow the grammar. What is wrong with its text is left to who
# compiles it: that took no longer here.
_CHECK = f"""
import resource, sys
seconds = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLTokenizer
grammar = sys.stdin.read()
if not LLMatcher.validate_grammar(grammar):
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    matcher.compute_bitmask()
    if matcher.is_error():
        print("no answer can follow it")
"""


def check_grammar(grammar: str, field: str) -> None:
    """Raise RequestError, naming `field`, for a grammar (of `LLMatcher.grammar_from_...`) that is
    too long, takes too many CPU seconds, or lets no answer follow; BusyError where the machine has
    no time to find out.
    """
    problem = "it is longer than a megabyte" if len(grammar) > _LONGEST else _problem(grammar)
    if problem is not None:
        raise RequestError(f"{field} cannot be enforced: {problem}", field)


@lru_cache(64)
def _problem(grammar: str) -> str | None:
    busy = BusyError("other grammars are being checked; try again", _SECONDS)
    if not _AT_ONCE.acquire(timeout=_SECONDS):
        raise busy
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHECK, str(_CPU_SECONDS)],
            input=grammar.encode(),
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise busy from None  # and nothing is remembered
    finally:
        _AT_ONCE.release()
    return "it is too complex" if done.returncode else done.stdout.decode().strip() or None
