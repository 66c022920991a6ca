"""What pvrt puts before vLLM's own application: the API key on all routes, the page, one form of
errors, and /v1/models/NAME.

vLLM takes the class by name (--middleware) and gives it nothing but the application, so the rest
comes through the environment.
"""

import json
import os
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt_server.envelope import Envelope
from pvrt_server.gate import MAX_BODY_BYTES, Gate
from pvrt_server.page import Page
from pvrt_server.responses import error_body

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own, so that its check and ours agree
FOLDER_VARIABLE = "PVRT_SERVED_FOLDER"
_MODELS = "/v1/models"


class Frontend(Gate):
    """ASGI middleware for vLLM's server. vLLM alone guards /v1 and leaves the rest open."""

    def __init__(self, app: ASGIApp) -> None:
        page = Page(Envelope(ModelCards(app)), Path(os.environ[FOLDER_VARIABLE]))
        key = os.environ.get(KEY_VARIABLE) or None
        super().__init__(page, api_key=key, max_body_bytes=MAX_BODY_BYTES)


class ModelCards:
    """ASGI middleware that answers GET /v1/models/NAME from what GET /v1/models says.

    An error of GET /v1/models is passed on as it is.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = scope.get("path", "")
        asked = scope["type"] == "http" and scope["method"] == "GET"
        if not asked or not path.startswith(f"{_MODELS}/"):
            await self._app(scope, receive, send)
            return
        answer: list[Message] = []

        async def collect(message: Message) -> None:
            answer.append(message)

        await self._app({**scope, "path": _MODELS, "raw_path": _MODELS.encode()}, receive, collect)
        if any(part.get("status", 200) != 200 for part in answer):
            for part in answer:  # it says what is wrong
                await send(part)
            return
        body = b"".join(part.get("body", b"") for part in answer)
        cards = {card["id"]: card for card in json.loads(body).get("data", [])}
        name = path.removeprefix(f"{_MODELS}/")
        if name in cards:
            await JSONResponse(cards[name])(scope, receive, send)
            return
        served = ", ".join(map(repr, cards)) or "no model"
        message = f"model {name!r} is not served here; {served} is"
        error = error_body(message, "invalid_request_error", "model", "model_not_found")
        await JSONResponse(error, 404)(scope, receive, send)
