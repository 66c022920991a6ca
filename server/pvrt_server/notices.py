"""What an operator should hear once, however often clients cause it."""

import logging
from functools import lru_cache

_log = logging.getLogger("pvrt_server")
_LONGEST = 300  # characters; clients choose parts of these sentences


@lru_cache(maxsize=1024)
def say_once(sentence: str) -> None:
    """Log a sentence as a warning, unless it was logged before."""
    _log.warning("%s", sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]}...")
