"""OpenAI's protocol over the embedded engine: completions, chat completions, models.

`create_app(engine, "name")` is an ASGI application; `launch.serve` runs it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import pvrt
from pvrt_server.engine import Engine
from pvrt_server.errors import (
    EngineStoppedError,
    GenerationError,
    ModelNotFoundError,
    RequestError,
)
from pvrt_server.failures import add_handlers, failure_response
from pvrt_server.gate import MAX_BODY_BYTES, Gate
from pvrt_server.generation import ClientGone, Generation
from pvrt_server.responses import (
    DONE,
    KEEP_ALIVE,
    ChatForm,
    CompletionForm,
    Echo,
    Form,
    Piece,
    Usage,
    error_body,
    merge,
    new_header,
    sse,
)
from pvrt_server.sampling import SamplingParams
from pvrt_server.schema import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    TokenizeRequest,
    template_messages,
)
from pvrt_server.sequence import GenerationRequest, TokenEvent


def create_app(
    engine: Engine,
    served_model_name: str,
    api_key: str | None = None,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    keep_alive_seconds: float = 15,
) -> FastAPI:
    """The application. It closes the engine when it shuts down.

    With an api_key everything but /health and /version needs it as a bearer token.
    Streams carry an SSE comment whenever nothing else was sent for keep_alive_seconds, because
    proxies cut connections that are silent while a long prompt is read.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # No /docs or /redoc: their pages load scripts from elsewhere, and this server works offline.
    app = FastAPI(
        title="pvrt",
        version=pvrt.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    api = _Api(engine, served_model_name, keep_alive_seconds)
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/version", api.version, methods=["GET"])
    app.add_api_route("/v1/models", api.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", api.model, methods=["GET"])
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat_completions, methods=["POST"])
    app.add_api_route("/tokenize", api.tokenize, methods=["POST"])
    add_handlers(app)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)
    return app


class _Api:
    def __init__(self, engine: Engine, name: str, keep_alive_seconds: float) -> None:
        self._engine = engine
        self._name = name
        self._keep_alive_seconds = keep_alive_seconds
        # What people type: the name, the folder they served, its last part.
        self._names = {name, str(engine.folder), engine.folder.name}
        self._created = int((engine.folder / "config.json").stat().st_mtime)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._card()

    async def health(self) -> Response:
        if self._engine.failure is not None:
            return failure_response(EngineStoppedError(self._engine.failure))
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict[str, str]:
        return {"version": pvrt.__version__}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send either prompt or messages", "prompt")
        codec = self._engine.codec
        if body.messages is not None:
            ids = await asyncio.to_thread(
                codec.encode_chat,
                template_messages(body.messages),
                add_generation_prompt=body.add_generation_prompt is not False,
                template_kwargs=body.chat_template_kwargs,
            )
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

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        body.refuse_unsupported()
        params = body.sampling(self._engine.defaults)
        codec = self._engine.codec
        prompts: list[list[int]] = []
        echoes: list[Echo | None] = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
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
        form = CompletionForm(codec, echoes, body.logprobs is not None)
        return await self._answer(body, request, form, prompts, params)

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        self._check_model(body.model)
        body.refuse_unsupported()
        params = body.sampling(self._engine.defaults)
        ids = await asyncio.to_thread(
            self._engine.codec.encode_chat,
            template_messages(body.messages),
            template_kwargs=body.chat_template_kwargs,
        )
        form = ChatForm(self._engine.codec, bool(body.logprobs))
        return await self._answer(body, request, form, [ids], params)

    async def _answer(
        self,
        body: GenerateRequest,
        request: Request,
        form: Form,
        prompts: Sequence[list[int]],
        params: SamplingParams,
    ) -> Response:
        requests = [
            GenerationRequest(tuple(ids), _for_choice(params, number))
            for ids in prompts
            for number in range(body.choices)
        ]
        try:
            generation = Generation(self._engine, requests, request)
        except RequestError as error:
            if error.param == "prompt":  # the engine does not know where it came from
                error.param = form.prompt_field
            raise
        usage = Usage(sum(len(ids) for ids in prompts))
        if body.stream:
            chunks = self._stream(generation, form, usage, body.include_usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
        pieces: list[list[Piece]] = [[] for _ in requests]
        async for event in generation.events():
            if event is None:
                continue
            usage.completion_tokens += isinstance(event, TokenEvent)
            pieces[event.index] += form.pieces(event)
        choices = [form.choice(merge(parts)) for parts in pieces]
        header = new_header(self._name, form.prefix)
        return JSONResponse(header.body(form.kind, choices, usage=usage.body()))

    async def _stream(
        self, generation: Generation, form: Form, usage: Usage, include_usage: bool
    ) -> AsyncIterator[bytes]:
        header = new_header(self._name, form.prefix)
        # With include_usage all chunks carry the field, null up to the last.
        more = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        try:
            async for event in generation.events(self._keep_alive_seconds):
                if event is None:
                    yield KEEP_ALIVE
                    continue
                usage.completion_tokens += isinstance(event, TokenEvent)
                for piece in form.pieces(event):
                    opening = None if piece.index in opened else form.opening(piece.index)
                    opened.add(piece.index)
                    if opening is not None:
                        yield sse(header.body(form.chunk_kind, [opening], **more))
                    if piece.text or piece.tokens or piece.finish_reason:
                        yield sse(header.body(form.chunk_kind, [form.chunk(piece)], **more))
        except (GenerationError, EngineStoppedError) as error:
            # Never just close: to clients a cut stream looks like a complete answer.
            yield sse(error_body(str(error), "server_error", None, None))
        except ClientGone:
            return
        else:
            if include_usage:
                yield sse(header.body(form.chunk_kind, [], usage=usage.body()))
        yield DONE

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "pvrt",
            "max_model_len": self._engine.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ModelNotFoundError(f"model {name!r} is not served here; {self._name!r} is")


def _for_choice(params: SamplingParams, number: int) -> SamplingParams:
    """Parameters of the n-th choice: with a seed, each choice still draws its own numbers."""
    if params.seed is None or number == 0:
        return params
    half = 1 << 63
    return replace(params, seed=(params.seed + number + half) % (2 * half) - half)
