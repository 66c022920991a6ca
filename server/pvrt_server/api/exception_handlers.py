"""Every way in which a request fails, as OpenAI's error envelope."""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pvrt.errors import PvrtError
from pvrt_server.api.generation import ClientGone
from pvrt_server.api.responses import error_body
from pvrt_server.errors import (
    BusyError,
    EngineStoppedError,
    GenerationError,
    ModelNotFoundError,
    RequestError,
)


class _ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error envelope, for the server's own description of itself."""

    error: _ErrorDetail


#: What every route may answer.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 404, 413, 429, 500, 503)
}

# Names that pydantic puts into an error's place for the branches of a union.
_BRANCH = re.compile(r"str|int|float|bool|dict|list|.*\W.*")


def add_handlers(app: FastAPI) -> None:
    """Answer all errors of an application in OpenAI's form."""
    app.add_exception_handler(PvrtError, _on_error)
    app.add_exception_handler(ClientGone, _on_gone)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


def error_response(error: PvrtError) -> JSONResponse:
    """The response for one of our errors."""
    message = str(error)
    match error:
        case RequestError(param=param, code=code):
            return _response(400, message, "invalid_request_error", param, code)
        case ModelNotFoundError():
            return _response(404, message, "invalid_request_error", "model", "model_not_found")
        case BusyError(retry_after_seconds=seconds):
            response = _response(429, message, "rate_limit_error", None, "queue_full")
            response.headers["Retry-After"] = str(seconds)
            return response
        case EngineStoppedError():
            return _response(503, message, "server_error", None, "engine_stopped")
        case GenerationError():
            return _response(500, message, "server_error", None, "generation_failed")
    return _response(500, message, "server_error", None, None)


def _response(
    status: int, message: str, kind: str, param: str | None, code: str | None
) -> JSONResponse:
    return JSONResponse(error_body(message, kind, param, code), status)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PvrtError)
    return error_response(error)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the access log does


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request_error(error.errors()))


def request_error(problems: Sequence[Any]) -> RequestError:
    """What pydantic found wrong with a body, by its first problem; places begin with "body"."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        message = f"the body is not valid JSON: {reason} at character {first['loc'][-1]}"
        return RequestError(message, None, "invalid_json")
    param = _field(first["loc"])
    if param is None:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return RequestError(message, None, "invalid_json")
    if first["type"] == "missing":
        return RequestError(f"{param} is missing", param, "missing_required_parameter")
    # A union fails once per branch; all of them together say what is accepted.
    said = [p["msg"] for p in problems if _field(p["loc"], 1) == _field(first["loc"], 1)]
    return RequestError(f"{param}: {'; or '.join(dict.fromkeys(said))}", param, "invalid_type")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message = f"there is no {request.url.path}; routes are {', '.join(_routes(request.app))}"
        code = "route_not_found"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path}"
        code = "method_not_allowed"
    elif error.status_code == 413:
        code = "too_large"
    response = _response(error.status_code, message, "invalid_request_error", None, code)
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    message = f"the server failed: {type(error).__name__}; its log says more"
    return _response(500, message, "server_error", None, None)


def _routes(app: Any) -> list[str]:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return [f"{' '.join(sorted(route.methods))} {route.path}" for route in routes]


def _field(place: Sequence[Any], depth: int | None = None) -> str | None:
    """A pydantic place ("body", "messages", 0, "content", "str") as messages[0].content.

    depth limits the number of parts; None where the body as a whole is wrong.
    """
    name = ""
    parts = [part for part in place[1:] if isinstance(part, int) or not _BRANCH.fullmatch(part)]
    for part in parts[:depth]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".") or None
