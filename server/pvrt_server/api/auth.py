"""What a request meets before it is read: the name it calls us by, the API key, bounds on its size
and on the time that it takes to arrive.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt_server.api.responses import error_body
from pvrt_server.options import ServeOptions

# Load balancers have no key, and a browser can send one only from the page, which holds no secret.
_OPEN = frozenset({"/health", "/"})


@dataclass(frozen=True)
class Bounds:
    """What requests must keep to, as `ServeOptions` has it."""

    max_body_bytes: int
    request_seconds: float
    hosts: Sequence[str] | None

    @classmethod
    def of(cls, options: ServeOptions) -> "Bounds":
        """Those of a server."""
        return cls(options.max_body_bytes, options.request_seconds, options.hosts)


class Auth:
    """ASGI middleware that answers 401, 403, 408 and 413 before any work is done."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, bounds: Bounds) -> None:
        self._app = app
        self._header = None if api_key is None else f"Bearer {api_key}".encode()
        self._bounds = bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        received, started = 0, False
        deadline: float | None = asyncio.get_running_loop().time() + self._bounds.request_seconds

        async def counting() -> Message:
            nonlocal received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                said = f"the body was not there within {self._bounds.request_seconds:g} seconds"
                close = {"Connection": "close"}
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, said, close) from None
            received += len(message.get("body", b""))
            if received > self._bounds.max_body_bytes:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_large())
            if not message.get("more_body"):
                deadline = None  # what comes now is the client's leaving
            return message

        async def telling(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counting, telling)
        except HTTPException as error:  # of ours, where nothing inside has handlers for it
            if started:
                raise
            body = error_body(str(error.detail), "invalid_request_error", None, None)
            await JSONResponse(body, error.status_code, error.headers)(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._bounds.hosts is not None and not _may_call_us(host, self._bounds.hosts):
            message = f"this server does not answer to {host!r}; --allowed-hosts lets it"
            return JSONResponse(
                error_body(message, "invalid_request_error", None, "forbidden_host"), 403
            )
        given = headers.get(b"authorization", b"")
        if (
            self._header is not None
            and path not in _OPEN
            and method != "OPTIONS"  # a browser's question before a call of another origin
            and not hmac.compare_digest(given, self._header)
        ):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            body = error_body(message, "authentication_error", None, "invalid_api_key")
            return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._bounds.max_body_bytes:
            body = error_body(self._too_large(), "invalid_request_error", None, "too_large")
            return JSONResponse(body, 413)
        return None

    def _too_large(self) -> str:
        return f"the request body is larger than {self._bounds.max_body_bytes} bytes"


def _may_call_us(host: str, allowed: Sequence[str]) -> bool:
    """Whether a Host header is a number, a name of this machine, or one that is allowed.

    A page of a browser reaches us under its own name, once that leads here. Numbers lead nowhere
    else, and a request without the header is no browser's.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost", *allowed) or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
