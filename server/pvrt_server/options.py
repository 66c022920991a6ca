"""A checked call of `pvrt serve`, and the times that both engines keep."""

from dataclasses import dataclass, field
from pathlib import Path

#: What a running request gets to finish after SIGTERM; then its stream ends with an error event.
GRACE_SECONDS = 10.0
#: How long an idle connection stays open: longer than the usual 60 s of proxies, which otherwise
#: send a request just when the server closes.
KEEP_ALIVE_SECONDS = 75


@dataclass(frozen=True)
class Plan:
    """A checked call of `serve`. `url` is where this machine reaches the server.

    None is the engine's own choice.
    """

    model: Path
    name: str
    host: str
    port: int
    dtype: str
    max_model_len: int | None
    api_key: str | None = field(repr=False)
    log_level: str
    access_log: bool = True
    max_num_seqs: int | None = None
    max_num_queued_reqs: int | None = None

    @property
    def url(self) -> str:
        """http://host:port"""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
