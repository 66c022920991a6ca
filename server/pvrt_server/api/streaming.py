"""From submitted requests to one HTTP response: a whole body, or a stream of events."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pvrt_server.api.generation import ClientGone, Generation
from pvrt_server.api.responses import (
    DONE,
    KEEP_ALIVE,
    Delta,
    Serializer,
    Usage,
    error_body,
    merge,
    new_header,
    sse,
)
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sequences import GenerationRequest
from pvrt_server.errors import EngineStoppedError, GenerationError, RequestError

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Responder:
    """Answers requests in the name of a model.

    Streams carry an SSE comment whenever nothing else was sent for keep_alive_seconds.
    """

    engine: Engine
    name: str
    keep_alive_seconds: float

    async def answer(
        self,
        requests: Sequence[GenerationRequest],
        serializer: Serializer,
        request: Request,
        usage: Usage,
        *,
        stream: bool,
    ) -> Response:
        """Run requests, one choice each, and write what becomes of them.

        Raises RequestError, BusyError, EngineStoppedError, and GenerationError without a stream.
        """
        try:
            generation = Generation(self.engine, requests, request)
        except RequestError as error:
            if error.param == "prompt":  # the engine does not know where it came from
                error.param = serializer.prompt_field
            raise
        if stream:
            chunks = self._stream(generation, serializer, usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=SSE_HEADERS)
        deltas: list[list[Delta]] = [[] for _ in requests]
        async for event in generation.events():
            if event is not None:
                usage.count(event)
                deltas[event.index] += serializer.deltas(event)
        choices = [serializer.choice(merge(parts)) for parts in deltas]
        header = new_header(self.name, serializer.prefix)
        return JSONResponse(header.body(serializer.kind, choices, usage=usage.body()))

    async def _stream(
        self, generation: Generation, serializer: Serializer, usage: Usage
    ) -> AsyncIterator[bytes]:
        header = new_header(self.name, serializer.prefix)
        opened: set[int] = set()
        try:
            async for event in generation.events(self.keep_alive_seconds):
                if event is None:
                    yield KEEP_ALIVE
                    continue
                usage.count(event)
                for delta in serializer.deltas(event):
                    opening = None if delta.index in opened else serializer.opening(delta.index)
                    opened.add(delta.index)
                    if opening is not None:
                        yield sse(header.body(serializer.chunk_kind, [opening], **usage.of_chunk()))
                    if not delta.empty:
                        chunk = [serializer.chunk(delta)]
                        yield sse(header.body(serializer.chunk_kind, chunk, **usage.of_chunk()))
        except (GenerationError, EngineStoppedError) as error:
            # Never just close: to clients a cut stream looks like a complete answer.
            yield sse(error_body(str(error), "server_error", None, None))
        except ClientGone:
            return
        else:
            if usage.in_stream != "nowhere":
                yield sse(header.body(serializer.chunk_kind, [], usage=usage.body()))
        yield DONE
