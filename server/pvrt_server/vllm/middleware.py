"""What pvrt puts before vLLM's own application: other origins, the API key on all routes, the page,
one form of errors, and /v1/models/NAME.

vLLM takes the class by name (--middleware) and gives it nothing but the application, so the rest
comes through the environment. `frontend_environment` writes it, `Frontend` reads it.
"""

import json
import os
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt_server.api.auth import Auth, Bounds
from pvrt_server.api.doorway import doorway
from pvrt_server.api.responses import error_body
from pvrt_server.engine.loading import load_codec
from pvrt_server.opened import OpenedModel
from pvrt_server.options import ServeOptions
from pvrt_server.vllm.error_envelope import Envelope
from pvrt_server.vllm.grammar_budget import GrammarBudget
from pvrt_server.vllm.response_stores import ResponseStores
from pvrt_server.web.page import Page, model_card

_KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own, so that its check and ours agree
_VARIABLE = "PVRT_FRONTEND"
_MODELS = "/v1/models"


class Frontend:
    """ASGI middleware for vLLM's server. vLLM alone guards /v1 and leaves the rest open."""

    def __init__(self, app: ASGIApp) -> None:
        given = _given()
        codec = cache(partial(load_codec, Path(given["folder"])))
        inner = ModelCards(GrammarBudget(ResponseStores(app), codec))
        page = Page(Envelope(inner), given["card"])
        key = os.environ.get(_KEY_VARIABLE) or None
        guarded = Auth(page, api_key=key, bounds=bounds())
        self._app = doorway(guarded, given["allowed_origins"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self._app(scope, receive, send)


def frontend_environment(opened: OpenedModel, options: ServeOptions) -> dict[str, str]:
    """The variables that `Frontend` reads in the process of vLLM's server."""
    given = {
        "folder": str(opened.path),
        "card": model_card(opened),
        "bounds": asdict(Bounds.of(options)),
        "allowed_origins": options.origins,
    }
    # The key is no flag of vLLM's: anybody can read those.
    key = {} if options.api_key is None else {_KEY_VARIABLE: options.api_key}
    return {_VARIABLE: json.dumps(given), **key}


def bounds() -> Bounds:
    """What requests must keep to, in the process of vLLM's server."""
    return Bounds(**_given()["bounds"])


def _given() -> dict[str, Any]:
    given: dict[str, Any] = json.loads(os.environ[_VARIABLE])
    return given


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
