"""What a request can be told: each becomes one HTTP status and one sentence.

PvrtError
├── RequestError         400: the request asks for something wrong, or for something not offered
├── ModelNotFoundError   404: another model than the one served here
├── BusyError            429: the queue is full
├── GenerationError      500: this generation broke, the engine lives on
└── EngineStoppedError   503: the engine broke or is shutting down
"""

from pvrt.errors import PvrtError


class RequestError(PvrtError):
    """A request that cannot be served as written. `param` names the field, `code` the reason."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ModelNotFoundError(PvrtError):
    """A request for another model than the one served here."""


class BusyError(PvrtError):
    """The queue is full; `retry_after_seconds` is a guess from how long requests take."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class GenerationError(PvrtError):
    """A generation that broke, on an engine that goes on."""


class EngineStoppedError(PvrtError):
    """An engine that takes no more requests."""
