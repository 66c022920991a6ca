"""What a request meets before it is read: the API key, and a bound on its size."""

import hmac
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt_server.api.responses import error_body

# Load balancers have no key, and a browser can send one only from the page, which holds no secret.
_OPEN = frozenset({"/health", "/"})


class Auth:
    """ASGI middleware that answers 401 and 413 before any work is done."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._header = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes

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
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_large())
            return message

        await self._app(scope, counting, send)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
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
        if length.isdigit() and int(length) > self._max_body_bytes:
            body = error_body(self._too_large(), "invalid_request_error", None, "too_large")
            return JSONResponse(body, 413)
        return None

    def _too_large(self) -> str:
        return f"the request body is larger than {self._max_body_bytes} bytes"
