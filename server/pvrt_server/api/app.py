"""OpenAI's protocol over the embedded engine: completions, chat, responses, models, metrics.

`create_app(engine, options)` is an ASGI application; `local_server` runs it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from pvrt.version import __version__
from pvrt_server.api.auth import Auth, Bounds
from pvrt_server.api.chat import for_choice, prepare
from pvrt_server.api.doorway import doorway
from pvrt_server.api.exception_handlers import ERROR_RESPONSES, add_handlers, error_response
from pvrt_server.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pvrt_server.api.response_routes import ResponseRoutes
from pvrt_server.api.responses import CompletionSerializer, Echo, Usage
from pvrt_server.api.streaming import Responder
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.metrics import CONTENT_TYPE
from pvrt_server.engine.sequences import GenerationRequest
from pvrt_server.errors import EngineStoppedError, ModelNotFoundError, RequestError
from pvrt_server.options import ServeOptions
from pvrt_server.web.page import Page, model_card


def create_app(engine: Engine, options: ServeOptions) -> FastAPI:
    """The application. It closes the engine when it shuts down.

    With an api_key everything but /health and the page at / needs it as a bearer token.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # No /docs or /redoc: their pages load scripts from elsewhere, and this server works offline.
    app = FastAPI(
        title="pvrt",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_routes(app, _Api(engine, options))
    add_handlers(app)
    app.add_middleware(Page, card=model_card(engine.opened))
    app.add_middleware(Auth, api_key=options.api_key, bounds=Bounds.of(options))
    app.add_middleware(doorway, allowed_origins=options.origins)
    return app


def _add_routes(app: FastAPI, api: "_Api") -> None:
    responses = ResponseRoutes(api.responder, api.check_model)
    routes: dict[str, Callable[..., Any]] = {
        "GET /health": api.health,
        "GET /version": api.version,
        "GET /metrics": api.metrics,
        "GET /v1/models": api.models,
        "GET /v1/models/{name:path}": api.model,
        "POST /v1/completions": api.completions,
        "POST /v1/chat/completions": api.chat_completions,
        "POST /v1/responses": responses.create,
        "GET /v1/responses/{name}": responses.get,
        "DELETE /v1/responses/{name}": responses.delete,
        "GET /v1/responses/{name}/input_items": responses.input_items,
        "POST /tokenize": api.tokenize,
        "POST /detokenize": api.detokenize,
        "GET /tokenizer_info": api.tokenizer_info,
    }
    for route, endpoint in routes.items():
        method, path = route.split()
        app.add_api_route(path, endpoint, methods=[method], responses=ERROR_RESPONSES)


class _Api:
    def __init__(self, engine: Engine, options: ServeOptions) -> None:
        folder = engine.opened.path
        self._engine = engine
        self._name = options.name(folder)
        self.responder = Responder(engine, self._name, options.sse_keep_alive_seconds)
        # What people type: the name, the folder they served, its last part.
        self._names = {self._name, str(folder), folder.name}
        self._created = int((folder / "config.json").stat().st_mtime)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self.check_model(name)
        return self._card()

    async def health(self) -> Response:
        if self._engine.failure is not None:
            return error_response(EngineStoppedError(self._engine.failure))
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict[str, str]:
        return {"version": __version__}

    async def metrics(self) -> Response:
        return Response(self._engine.metrics.expose(self._name), media_type=CONTENT_TYPE)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send either prompt or messages", "prompt")
        codec = self._engine.codec
        if body.messages is not None:
            ids = await asyncio.to_thread(body.encode, codec)
        else:
            special = body.add_special_tokens is not False
            ids = await asyncio.to_thread(codec.encode, body.prompt or "", special=special)
        names = [codec.token_text(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": self._engine.max_model_len,
            "tokens": ids,
            "token_strs": names,
        }

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        self.check_model(body.model)
        self._engine.check_tokens("tokens", body.tokens)
        return {"prompt": await asyncio.to_thread(self._engine.codec.decode, body.tokens)}

    async def tokenizer_info(self) -> dict[str, Any]:
        return {**self._engine.codec.info(), "model_max_length": self._engine.max_model_len}

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        body.refuse_unsupported()
        params = body.sampling(self._engine.defaults)
        codec = self._engine.codec
        prompts: list[list[int]] = []
        echoes: list[Echo | None] = []
        for prompt in body.prompts():
            if isinstance(prompt, str) and body.suffix:
                ids = await asyncio.to_thread(codec.encode_gap, prompt, body.suffix)
            elif isinstance(prompt, str):
                ids = await asyncio.to_thread(codec.encode, prompt)
            else:
                ids = prompt
            self._engine.check(GenerationRequest(tuple(ids), params))
            prompts.append(ids)
            echo: Echo | None = None
            if body.echo:
                text = prompt if isinstance(prompt, str) else codec.decode(ids)
                echo = Echo(text, tuple(ids))
            echoes += [echo] * body.choices
        serializer = CompletionSerializer(codec, echoes, body.logprobs is not None)
        schema, grammars = body.schema_to_follow(), self._engine.grammars
        grammar = None
        if schema is not None:
            grammar = await asyncio.to_thread(grammars.json_schema, schema, "response_format")
        requests = [
            GenerationRequest(tuple(ids), for_choice(params, number), grammar)
            for ids in prompts
            for number in range(body.choices)
        ]
        usage = Usage(sum(map(len, prompts)), body.choices, body.usage_in_stream)
        stream = bool(body.stream)
        return await self.responder.answer(requests, serializer, request, usage, stream=stream)

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        chat = await asyncio.to_thread(prepare, self._engine, body)
        return await self.responder.answer(
            chat.requests, chat.serializer, request, chat.usage, stream=bool(body.stream)
        )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "pvrt",
            "max_model_len": self._engine.max_model_len,
        }

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for the name of another model."""
        if name is not None and name not in self._names:
            raise ModelNotFoundError(f"model {name!r} is not served here; {self._name!r} is")
