"""OpenAI's envelope around errors that an application answers in FastAPI's own form.

vLLM's routes use the envelope; what fails before them (an unknown route, a wrong method, a body
that is no text) does not, and clients lose the message of such an answer.
"""

import json
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Envelope:
    """ASGI middleware; bodies of other forms and of good answers pass as they come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: Message | None = None
        body = bytearray()

        async def looking(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _is_json_error(message):
                held = message
            elif held is not None and message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    content = enveloped(bytes(body), held["status"], scope["path"])
                    kept = [h for h in held["headers"] if h[0].lower() != b"content-length"]
                    length = (b"content-length", str(len(content)).encode())
                    await send({**held, "headers": [*kept, length]})
                    await send({"type": "http.response.body", "body": content})
            else:
                await send(message)

        await self._app(scope, receive, looking)


def enveloped(body: bytes, status: int, path: str) -> bytes:
    """The body of an error as {"error": {message, type, param, code}}; one that is, stays."""
    try:
        said: Any = json.loads(body)
    except ValueError:
        return body
    if not isinstance(said, dict) or isinstance(said.get("error"), dict):
        return body
    detail = said.get("detail", said.get("error", said))
    message = detail if isinstance(detail, str) else json.dumps(detail)
    code = None
    if status == HTTPStatus.NOT_FOUND:
        message, code = f"there is no {path}", "route_not_found"
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        message, code = f"this method is not allowed on {path}", "method_not_allowed"
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()


def _is_json_error(start: Message) -> bool:
    kinds = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return start["status"] >= 400 and any(b"application/json" in kind for kind in kinds)
