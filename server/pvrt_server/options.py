"""Everything that a server can be told: built once, checked once, handed on as it is."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from pvrt.errors import ServeError

#: What a running request gets to finish after SIGTERM; then its stream ends with an error event.
GRACE_SECONDS = 10.0
#: How long an idle connection stays open: longer than the usual 60 s of proxies, which otherwise
#: send a request just when the server closes.
KEEP_ALIVE_SECONDS = 75

# Flags of vLLM that are options here: the address that is printed, the key that is guarded.
_OURS = (
    "--model",
    "--host",
    "--port",
    "--api-key",
    "--served-model-name",
    "--uds",
    "--allowed-origins",
)
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+")
_SEQUENCES = 16  # of the embedded engine, where nothing is said
_REQUESTS = 256

_Count = Annotated[int, Field(ge=1)]


class ServeOptions(BaseModel):
    """How to serve a model. None is the engine's own choice. Raises ServeError for a bad value.

    Both engines:

    engine auto is vLLM where it is installed and can run the folder. dtype auto is the
    checkpoint's; the embedded engine takes float32 on a CPU, the only type that Llama-like models
    decode in without transformers (`cpu_model`). max_model_len counts tokens of prompt and answer;
    None is what the model was made for, or what fits. max_num_seqs sequences run at once, and
    max_num_queued_reqs requests run or wait. Pages of allowed_origins (with commas; * for
    all) may call the server from a browser. port 0 takes any free one. check tests the server when
    it is ready, and ends it. extra are flags for vLLM itself; they come last and override ours.
    max_body_bytes bounds a request, whose headers and whose body must each be there within
    request_seconds. Without a key, a server of this machine alone answers those that call it by a
    number, as localhost, or by one of allowed_hosts (names, with commas); others may be pages of a
    browser whose names were made to lead here. allowed_hosts binds servers of other addresses, too.
    Streams carry an SSE comment whenever nothing else was sent for sse_keep_alive_seconds, because
    proxies cut connections that are silent while a long prompt is read.

    The embedded engine alone, without flags:

    Longer prompts than prefill_chunk tokens are read in parts, which bounds memory and lets others
    go on meanwhile. cache_bytes is for the keys and values of all sequences; None takes half of the
    free memory, or more where one sequence needs it. prefix_reuse: prompts do not read again what
    is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    engine: Literal["auto", "vllm", "local"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: _Count | None = None
    served_model_name: str | None = None
    api_key: Annotated[str | None, Field(repr=False)] = None
    allowed_origins: str | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    max_num_seqs: _Count | None = None
    max_num_queued_reqs: _Count | None = None
    check: bool = False
    extra: tuple[str, ...] = ()
    max_body_bytes: _Count = 16 << 20  # a prompt of a million tokens as a list of numbers fits
    request_seconds: Annotated[float, Field(gt=0)] = 60
    allowed_hosts: str | None = None
    sse_keep_alive_seconds: Annotated[float, Field(gt=0)] = 15
    prefill_chunk: _Count = 512
    cache_bytes: Annotated[int | None, Field(ge=0)] = None
    prefix_reuse: bool = True

    @property
    def url(self) -> str:
        """http://host:port, where this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names that requests may call the server by, beside numbers and localhost; None is any."""
        if self.allowed_hosts is None and (self.api_key is not None or not self.local):
            return None
        names = (self.allowed_hosts or "").lower().split(",")
        return tuple(name.strip() for name in names if name.strip())

    @property
    def local(self) -> bool:
        """Whether nobody but this machine can reach the server."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    @property
    def sequences(self) -> int:
        """Sequences that the embedded engine runs at once."""
        return self.max_num_seqs or _SEQUENCES

    @property
    def requests(self) -> int:
        """Requests that run or wait in the embedded engine."""
        return self.max_num_queued_reqs or _REQUESTS

    @property
    def gpus(self) -> int:
        """The number of GPUs that the flags for vLLM ask for."""
        count = 1
        for names in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
            for place, flag in enumerate(self.extra):
                if _flag_name(flag) in names:
                    following = "".join(self.extra[place + 1 : place + 2])
                    value = flag.partition("=")[2] or following
                    count *= int(value) if value.isdigit() else 1
        return count

    def name(self, folder: Path) -> str:
        """The model's name in the API: the folder's, if no other was given."""
        return self.served_model_name or folder.name

    def gives(self, *names: str) -> bool:
        """Whether the flags for vLLM hold one of these, or a part of it (--flag.part)."""
        return any(_flag_name(flag).partition(".")[0] in names for flag in self.extra)

    def changed(self, **values: Any) -> Self:
        """A copy with other values, checked as the first were."""
        return type(self).model_validate({**dict(self), **values})

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: str | None) -> str | None:
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ServeError("the API key must be one or more printable ASCII characters")
        return key

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins whose pages may call the server."""
        given = self.allowed_origins
        return tuple(map(str.strip, given.split(","))) if given else ()

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: str | None) -> str | None:
        for origin in (origins or "*").split(","):
            if not _ORIGIN.fullmatch(origin.strip()):
                raise ServeError(
                    f"--allowed-origins has {origin!r}; an origin is * or like "
                    "https://example.org or http://localhost:3000, without a path"
                )
        return origins

    @field_validator("extra")
    @classmethod
    def _check_flags(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        for name in map(_flag_name, extra):
            if name in _OURS:
                raise ServeError(f"{name} is pvrt's own: give it before the --")
        return extra

    @model_validator(mode="wrap")
    @classmethod
    def _say_it_in_one_sentence(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(values)
        except ValidationError as error:
            raise ServeError(_sentence(error)) from None  # the key may stand in pydantic's own


def _flag_name(flag: str) -> str:
    return flag.partition("=")[0].replace("_", "-")


def _sentence(error: ValidationError) -> str:
    """What is wrong with the first bad value, and what would be right."""
    first = error.errors()[0]
    if not first["loc"]:
        return f"options are given by name, not as {first['input']!r}"
    name, bounds = str(first["loc"][0]), first.get("ctx", {})
    flag = f"--{name.replace('_', '-')}"
    said = f"{flag} is {first['input']!r}"
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(name, ServeOptions.model_fields, 1)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
            return f"there is no option {flag}{hint}"
        case "literal_error":
            return f"{said}; choose {bounds['expected'].replace(chr(39), '')}"
        case "greater_than_equal":
            return f"{said}; it must be at least {bounds['ge']}"
        case "greater_than":
            return f"{said}; it must be more than {bounds['gt']}"
        case "less_than_equal":
            return f"{said}; it must be at most {bounds['le']}"
    return f"{said}; {first['msg'][0].lower()}{first['msg'][1:]}"
