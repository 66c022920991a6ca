"""The embedded engine: one model, one worker thread, requests in the order of their arrival.

    engine = Engine.load(Path("checkpoint"))
    for event in engine.generate(engine.codec.encode("Hello"), SamplingParams(max_tokens=16)):
        ...

`submit` is the same without waiting, for servers: events come by callback from the worker thread.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from pvrt_server.errors import (
    BusyError,
    EngineStoppedError,
    GenerationError,
    RequestError,
)
from pvrt_server.loading import EngineOptions, load_runtime, sampling_defaults
from pvrt_server.sampling import SamplingParams
from pvrt_server.sequence import (
    GenerationRequest,
    PromptEvent,
    Runtime,
    TokenEvent,
    decode,
)
from pvrt_server.text import TextCodec

_log = logging.getLogger("pvrt_server")
_SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True)
class FailureEvent:
    """A job ended early; no more events follow. `error` says why."""

    error: GenerationError | EngineStoppedError


Event = PromptEvent | TokenEvent | FailureEvent


class Job:
    """Requests that were submitted together, and the callback that gets their events."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        on_event: Callable[[Event], None],
        on_cancel: Callable[["Job"], None],
    ) -> None:
        self.requests = tuple(requests)
        self.on_event = on_event
        self.cancelled = False
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """Stop before the next token; harmless when finished. No event tells of it."""
        self.cancelled = True
        self._on_cancel(self)


class Engine:
    """Runs jobs one after another on a worker thread. Close it, or use it in a with statement."""

    def __init__(
        self, runtime: Runtime, defaults: SamplingParams, *, folder: Path, queue_size: int
    ) -> None:
        self.folder = folder
        self.defaults = defaults
        self._runtime = runtime
        self._queue_size = queue_size
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running_job: Job | None = None
        self._stopped: str | None = None
        self._broken: str | None = None
        self._deadline = math.inf
        self._job_seconds = 1.0
        self._worker = threading.Thread(target=self._work, name="pvrt-engine", daemon=True)
        self._worker.start()

    @classmethod
    def load(cls, folder: Path, options: EngineOptions | None = None) -> "Engine":
        """Load a checkpoint folder, AQLM or dense, onto the GPU if there is one.

        Raises CheckpointError for a folder that is not sound, ServeError for options that do not
        fit the model.
        """
        options = options or EngineOptions()
        runtime = load_runtime(folder, options)
        defaults = sampling_defaults(runtime.model)
        return cls(runtime, defaults, folder=folder, queue_size=options.queue_size)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def codec(self) -> TextCodec:
        """The model's tokenizer and chat template."""
        return self._runtime.codec

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together have at most this many tokens."""
        return self._runtime.max_model_len

    @property
    def device(self) -> str:
        """Where the model runs: cpu or cuda."""
        return self._runtime.model.device.type

    @property
    def bytes_per_token(self) -> int:
        """Weights that decoding one token reads."""
        return self._runtime.model.bytes_per_token

    @property
    def failure(self) -> str | None:
        """Why the engine is broken, None while it is well."""
        return self._broken

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if this model cannot run a request."""
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        vocabulary = self._runtime.vocabulary
        for field, ids in (("prompt", prompt), ("logit_bias", params.logit_bias)):
            if (bad := max(ids, default=0)) >= vocabulary or (bad := min(ids, default=0)) < 0:
                raise RequestError(
                    f"{field} holds token {bad}; this model has tokens 0 to {vocabulary - 1}", field
                )
        wanted = params.max_tokens
        # Without a limit of its own, a prompt must at least leave room for one token.
        total = len(prompt) + (1 if wanted is None else wanted)
        if total > self.max_model_len:
            asked = "" if wanted is None else f" and max_tokens asks for {wanted}"
            raise RequestError(
                f"this model's maximum context length is {self.max_model_len} tokens, but the "
                f"prompt has {len(prompt)}{asked}",
                "prompt",
                "context_length_exceeded",
            )

    def submit(
        self, requests: Sequence[GenerationRequest], on_event: Callable[[Event], None]
    ) -> Job:
        """Queue requests as one job; their events have the request's place as `index`.

        on_event is called from the worker thread and must be quick. Raises RequestError for a
        request that cannot run, BusyError when the queue is full, EngineStoppedError when the
        engine takes no more.
        """
        for request in requests:
            self.check(request)
        job = Job(requests, on_event, self._forget)
        with self._changed:
            if self._stopped is not None:
                raise EngineStoppedError(self._stopped)
            if len(self._waiting) >= self._queue_size:
                seconds = max(1, math.ceil(self._job_seconds))
                raise BusyError(
                    f"{self._queue_size} requests are waiting already; try again in "
                    f"{seconds} seconds",
                    seconds,
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> Generator[PromptEvent | TokenEvent]:
        """Continue a prompt (by the model's own defaults without params) and yield its events.

        Leaving the loop cancels. Raises what `submit` raises, and GenerationError.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        request = GenerationRequest(tuple(prompt_ids), params or self.defaults)
        job = self.submit([request], events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, FailureEvent):
                    raise event.error
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            job.cancel()

    def stop(self, grace_seconds: float) -> None:
        """Take no more jobs; fail those that are not done after some seconds. Does not wait.

        Safe in a signal handler: takes no lock.
        """
        self._stopped = self._stopped or _SHUTTING_DOWN
        self._deadline = min(self._deadline, time.monotonic() + grace_seconds)

    def close(self) -> None:
        """Fail what is running or waiting and end the worker thread."""
        self.stop(0)
        with self._changed:
            self._changed.notify_all()
        self._worker.join()

    def _forget(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        with torch.inference_mode():
            while (job := self._next()) is not None:
                started = time.monotonic()
                try:
                    self._run(job)
                except Exception as error:
                    self._fail(job, error)
                self._running_job = None
                if not job.cancelled:
                    seconds = time.monotonic() - started
                    self._job_seconds += 0.2 * (seconds - self._job_seconds)
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for job in left:
            _emit(job, FailureEvent(EngineStoppedError(self._stopped or _SHUTTING_DOWN)))

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting or self._broken:
                if self._stopped is not None:
                    return None
                # Bounded, because stop() may be called where nothing can be notified.
                self._changed.wait(0.5)
            if time.monotonic() > self._deadline:
                return None
            self._running_job = self._waiting.popleft()
            return self._running_job

    def _run(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            for event in decode(self._runtime, index, request):
                if job.cancelled:
                    return
                if time.monotonic() > self._deadline:
                    _emit(job, FailureEvent(EngineStoppedError(_SHUTTING_DOWN)))
                    return
                if event is not None:
                    _emit(job, event)

    def _fail(self, job: Job, error: Exception) -> None:
        """Tell a job that it broke. What is not known to be harmless breaks the engine as well."""
        if _is_passing(error):
            _log.error("a generation failed: %s", error)
            _emit(job, FailureEvent(GenerationError(f"the generation failed: {error}")))
            return
        _log.exception("the engine is broken and takes no more requests")
        self._broken = f"the engine is broken: {type(error).__name__}: {error}"
        self._stopped = self._broken
        _emit(job, FailureEvent(EngineStoppedError(self._broken)))


def _emit(job: Job, event: Event) -> None:
    try:
        job.on_event(event)
    except Exception:
        _log.exception("nobody takes the events of a job any more")
        job.cancelled = True


def _is_passing(error: Exception) -> bool:
    """Whether the next generation can be expected to work after this error."""
    if isinstance(error, (MemoryError, FloatingPointError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch has no type of its own for this on CPU
