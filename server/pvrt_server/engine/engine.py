"""The embedded engine: one model, one worker thread, many requests at once (`scheduler`).

    engine = Engine.load(Path("checkpoint"))
    for event in engine.generate(engine.codec.encode("Hello"), SamplingParams(max_tokens=16)):
        ...

`submit` is the same without waiting, for servers: events come by callback from the worker thread.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch

from pvrt_server.backend import Decision, choose_backend
from pvrt_server.capacity import this_machine
from pvrt_server.engine.grammar import GrammarCompiler
from pvrt_server.engine.loading import load_runtime, sampling_defaults
from pvrt_server.engine.metrics import Metrics
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.scheduler import Event, FailureEvent, Job, Scheduler
from pvrt_server.engine.sequences import GenerationRequest, PromptEvent, Runtime, TokenEvent
from pvrt_server.engine.text import TextCodec
from pvrt_server.errors import BusyError, EngineStoppedError, RequestError
from pvrt_server.opened import OpenedModel, open_model
from pvrt_server.options import ServeOptions

__all__ = ["Engine", "Event", "FailureEvent", "Job"]
_log = logging.getLogger("pvrt_server")
_SHUTTING_DOWN = "the server is shutting down"
#: Prompts times n of one request.
MAX_SEQUENCES = 2048


def check_sequences(count: int) -> None:
    """Raise RequestError for more answers than one request may ask for."""
    if count > MAX_SEQUENCES:
        raise RequestError(
            f"{count} answers were asked for at once; the most is {MAX_SEQUENCES}", "n"
        )


class Engine:
    """Runs jobs on a worker thread. Close it, or use it in a with statement.

    on_broken is called once, from that thread, should the engine break for good.
    """

    def __init__(
        self,
        runtime: Runtime,
        opened: OpenedModel,
        options: ServeOptions,
        defaults: SamplingParams | None = None,
    ) -> None:
        self.opened = opened
        self.defaults = defaults or sampling_defaults(runtime.model)
        self.metrics = Metrics()
        self.grammars = GrammarCompiler(
            runtime.codec.tokenizer, runtime.vocabulary, runtime.eos_ids
        )
        self.on_broken: Callable[[], None] = lambda: None
        self._runtime = runtime
        self._most_requests = options.requests
        self._scheduler = Scheduler(runtime, self.metrics)
        self._changed = threading.Condition()
        self._stopped: str | None = None
        self._broken: str | None = None
        self._deadline = math.inf
        self._worker = threading.Thread(target=self._work, name="pvrt-engine", daemon=True)
        self._worker.start()

    @classmethod
    def load(cls, folder: Path, options: ServeOptions | None = None) -> "Engine":
        """Load a model folder, quantised or dense, onto the GPU if there is one.

        Raises CheckpointError for a folder that is not sound, ServeError for options that the model
        cannot meet.
        """
        options = (options or ServeOptions()).changed(engine="local")
        opened = open_model(folder)
        return cls.start(opened, options, choose_backend(opened, options, this_machine()))

    @classmethod
    def start(cls, opened: OpenedModel, options: ServeOptions, decision: Decision) -> "Engine":
        """Load an opened model as was decided. Raises CheckpointError and ServeError."""
        return cls(load_runtime(opened, options, decision), opened, options)

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
    def running(self) -> int:
        """How many sequences run."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return self._scheduler.waiting

    @property
    def failure(self) -> str | None:
        """Why the engine is broken, None while it is well."""
        return self._broken

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if this model cannot run a request."""
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        self.check_tokens("prompt", prompt)
        self.check_tokens("logit_bias", params.logit_bias)
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

    def check_tokens(self, field: str, ids: Collection[int]) -> None:
        """Raise RequestError, naming `field`, if the model has no such tokens."""
        vocabulary = self._runtime.vocabulary
        if (bad := max(ids, default=0)) >= vocabulary or (bad := min(ids, default=0)) < 0:
            raise RequestError(
                f"{field} holds token {bad}; this model has tokens 0 to {vocabulary - 1}", field
            )

    def submit(
        self, requests: Sequence[GenerationRequest], on_event: Callable[[Event], None]
    ) -> Job:
        """Queue requests as one job; their events have the request's place as `index`.

        on_event is called from the worker thread and must be quick. Raises RequestError for a
        request that cannot run, BusyError when there are too many, EngineStoppedError when the
        engine takes no more.
        """
        check_sequences(len(requests))
        for request in requests:
            self.check(request)
        job = Job(self._runtime, requests, on_event, self._scheduler.discard)
        with self._changed:
            if self._stopped is not None:
                raise EngineStoppedError(self._stopped)
            if self._scheduler.requests >= self._most_requests:
                seconds = max(1, math.ceil(self._scheduler.seconds_to_start))
                raise BusyError(
                    f"{self._most_requests} requests run or wait already; try again in "
                    f"{seconds} seconds",
                    seconds,
                )
            self._scheduler.add(job)
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

    def _work(self) -> None:
        with torch.inference_mode():
            try:
                while self._has_work():
                    self._scheduler.step()
            except BaseException as error:
                _log.exception("the engine is broken and takes no more requests")
                self._broken = f"the engine is broken: {type(error).__name__}: {error}"
                self._stopped = self._broken
        with self._changed:
            self._scheduler.fail_all(EngineStoppedError(self._stopped or _SHUTTING_DOWN))
        if self._broken is not None:
            self.on_broken()

    def _has_work(self) -> bool:
        """Wait for work; False once there will be none."""
        with self._changed:
            while self._scheduler.idle:
                if self._stopped is not None:
                    return False
                # Bounded, because stop() may be called where nothing can be notified.
                self._changed.wait(0.5)
        return time.monotonic() < self._deadline
