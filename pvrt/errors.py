"""Errors that a user meets. Each says what is wrong, where, and what to do.

PvrtError
├── CheckpointError    a checkpoint that cannot be trusted, or cannot be written
├── SourceError        a model that cannot be read
├── DataError          calibration or evaluation text that cannot be used
├── RunError           a tuning run that cannot be started or resumed
└── ServeError         a server that cannot start
"""


class PvrtError(Exception):
    """Base of all user-facing errors; the CLI prints the message and exits with 2."""


class CheckpointError(PvrtError):
    """A checkpoint that cannot be trusted, or cannot be written.

    Its message is always one line: names in files may hold anything.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\r", "\\r").replace("\n", "\\n"))


class SourceError(PvrtError):
    """A model that cannot be read."""


class DataError(PvrtError):
    """Calibration or evaluation text that cannot be used."""


class RunError(PvrtError):
    """A tuning run that cannot be started or resumed."""


class ServeError(PvrtError):
    """A server that cannot start."""
