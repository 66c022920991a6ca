"""Which sequences run, and what each step of the engine does: continuous batching.

A step appends one token to every sequence that decodes, all in one call of the model, and then
reads one piece of one prompt. So a long prompt delays the others' next tokens by the time of a
piece, which is bounded, and sequences join and leave between any two tokens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from pvrt_server.engine.metrics import Metrics
from pvrt_server.engine.prefix_cache import LEAST, PrefixCache, shared
from pvrt_server.engine.sequences import (
    GenerationRequest,
    PromptEvent,
    Runtime,
    Sequence,
    TokenEvent,
)
from pvrt_server.errors import EngineStoppedError, GenerationError

_log = logging.getLogger("pvrt_server")
# While others decode, prompts are read in pieces at least this many times smaller.
_SHARE = 8
# What reading a piece may take, in seconds: whoever decodes, or comes anew, waits so long. On one
# core SmolLM2-135M reads 128 tokens in half a second, as fast as more, and 16 in a tenth, at 1.4
# times the cost of each.
_PIECE_SECONDS, _PIECE_SECONDS_BESIDE = 0.5, 0.1
_FIRST_PACE = 0.004  # seconds per token, before one is measured
_LEAST_PIECE = 8  # tokens that share lookup tables: fewer cost as much


@dataclass(frozen=True)
class FailureEvent:
    """A job ended early; no more events follow. `error` says why."""

    error: GenerationError | EngineStoppedError


Event = PromptEvent | TokenEvent | FailureEvent


class Job:
    """Requests that were submitted together, and the callback that gets their events."""

    def __init__(
        self,
        runtime: Runtime,
        requests: Iterable[GenerationRequest],
        on_event: Callable[[Event], None],
        on_cancel: Callable[["Job"], None],
    ) -> None:
        self.pending = deque(Sequence(runtime, i, request) for i, request in enumerate(requests))
        self.running = 0
        self.cancelled = False
        self._on_event = on_event
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """Stop before the next token; harmless when finished. No event tells of it."""
        self.cancelled = True
        self._on_cancel(self)

    def emit(self, event: Event) -> None:
        """Tell of an event."""
        try:
            self._on_event(event)
        except Exception:
            _log.exception("nobody takes the events of a job any more")
            self.cancelled = True

    def fail(self, error: GenerationError | EngineStoppedError) -> None:
        """Tell that the job ended early, once, unless it was cancelled."""
        if not self.cancelled:
            self.emit(FailureEvent(error))
        self.cancelled = True


class Scheduler:
    """Jobs that wait, in the order of arrival, and sequences that run.

    `add` and `discard` may be called from any thread, everything else from one.
    """

    def __init__(self, runtime: Runtime, metrics: Metrics) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._lock = threading.Lock()
        self._jobs: list[Job] = []  # with pending sequences
        self._running: list[tuple[Job, Sequence]] = []
        self._prefixes = PrefixCache(
            runtime.model, most=2 * runtime.max_sequences if runtime.prefix_reuse else 0
        )
        self._turn = 0
        # Seconds per token of the last pieces. The least counts: others only wait for the machine.
        self._paces = deque[float](maxlen=4)
        self._seconds = 1.0  # that a job takes, lately
        metrics.watch(lambda: self.running, lambda: self.waiting, lambda: self.cache_share)

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return sum(bool(job.pending) and not job.running for job in self._jobs)

    @property
    def running(self) -> int:
        """How many sequences run."""
        return len(self._running)

    @property
    def requests(self) -> int:
        """How many jobs run or wait, those that were cancelled left out."""
        with self._lock:
            jobs = {*self._jobs, *(job for job, _ in self._running)}
        return sum(bool(job.pending or job.running) for job in jobs if not job.cancelled)

    @property
    def cache_share(self) -> float:
        """Tokens in the cache, those of finished sequences too, of all that it takes: 0 to 1."""
        held = sum(sequence.held for _, sequence in self._running)
        return (held + self._prefixes.size) / self._runtime.cache_tokens

    @property
    def seconds_to_start(self) -> float:
        """When a place among those who wait can be expected to be free."""
        return self._seconds / self._runtime.max_sequences

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._jobs

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        with self._lock:
            self._jobs.append(job)

    def discard(self, job: Job) -> None:
        """Forget what a job has not begun."""
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)

    def fail_all(self, error: GenerationError | EngineStoppedError) -> None:
        """End everything."""
        with self._lock:
            jobs, self._jobs = self._jobs, []
        for job in dict.fromkeys([*(job for job, _ in self._running), *jobs]):
            job.fail(error)
        self._running = []

    def step(self) -> None:
        """A token for all that decode, and a piece of a prompt.

        Errors that concern some sequences only end the jobs of these; all others are raised, and
        leave the scheduler unusable.
        """
        self._let_go()
        self._admit()
        decoding = [(job, s) for job, s in self._running if s.decoding]
        reading = [(job, s) for job, s in self._running if not s.decoding]
        if decoding:
            self._decode(decoding)
        if reading:
            job, sequence = reading[self._turn % len(reading)]
            self._turn += 1
            size = min(self._piece(beside=bool(decoding)), sequence.pending)
            start = time.monotonic()
            self._advance(job, sequence, partial(sequence.read, size))
            if size >= _LEAST_PIECE:
                self._paces.append((time.monotonic() - start) / size)
        self._keep_within_memory()

    def _piece(self, *, beside: bool) -> int:
        """How many tokens of a prompt to read at once, beside sequences that decode or not."""
        chunk = self._runtime.prefill_chunk
        size = max(1, chunk // _SHARE) if beside else chunk
        seconds = _PIECE_SECONDS_BESIDE if beside else _PIECE_SECONDS
        while size >= 2 * _LEAST_PIECE and size * min(self._paces, default=_FIRST_PACE) > seconds:
            size //= 2  # few sizes, so that the same prompt is most often read in the same pieces
        return size

    def _let_go(self) -> None:
        """Drop the sequences of jobs that were cancelled."""
        for job, sequence in [pair for pair in self._running if pair[0].cancelled]:
            job.running -= 1
            self._running.remove((job, sequence))
            self._prefixes.add(sequence)  # whoever stops an answer often goes on from there

    # Who runs

    def _admit(self) -> None:
        while len(self._running) < self._runtime.max_sequences:
            with self._lock:
                self._jobs = [job for job in self._jobs if job.pending and not job.cancelled]
                # Whoever has least comes first, so that a job of many prompts is no wall.
                ready = [job for job in self._jobs if not self._waits(job.pending[0])]
                job = min(ready, key=lambda job: job.running, default=None)
                if job is None or not self._fits(job.pending[0]):
                    return
                sequence = job.pending.popleft()
                job.running += 1
                self._running.append((job, sequence))
            self._find_prefix(sequence)
            self._prefixes.shrink(self._free_tokens())
            self._metrics.admitted(sequence)

    def _find_prefix(self, sequence: Sequence) -> None:
        try:
            self._prefixes.find(sequence, (other for _, other in self._running))
        except Exception as error:
            if not _is_passing(error):
                raise
            # The prompt is read anew, with the memory of what finished.
            _log.warning("a known beginning of a prompt could not be copied: %s", error)
            self._prefixes.shrink(0)

    def _waits(self, sequence: Sequence) -> bool:
        """Whether another sequence is just reading most of what this one would read."""
        prompt = sequence.tokens
        least = max(LEAST, len(prompt) // 2)
        if sequence.scores_prompt or not self._runtime.prefix_reuse:
            return False
        return any(
            not other.prompt_read and shared(other.tokens, prompt) > least
            for _, other in self._running
        )

    def _free_tokens(self) -> int:
        """How many more tokens the cache takes beside the sequences that run."""
        return self._runtime.cache_tokens - sum(len(s.tokens) + 1 for _, s in self._running)

    def _fits(self, sequence: Sequence) -> bool:
        return not self._running or self._free_tokens() > len(sequence.tokens)

    def _keep_within_memory(self) -> None:
        """Forget finished sequences, then put the youngest back that does not fit."""
        free = self._free_tokens()
        self._prefixes.shrink(free)
        while free < 0 and len(self._running) > 1:
            job, sequence = self._running.pop()
            free += len(sequence.tokens) + 1
            sequence.state = None
            job.running -= 1
            self._metrics.preempted()
            with self._lock:
                job.pending.appendleft(sequence)
                if job not in self._jobs:
                    self._jobs.insert(0, job)

    # What is computed

    def _decode(self, batch: list[tuple[Job, Sequence]]) -> None:
        model = self._runtime.model
        try:
            rows = model.step(
                [sequence.state for _, sequence in batch],
                [sequence.tokens[-1] for _, sequence in batch],
                all(sequence.argmax_only for _, sequence in batch),
            )
        except Exception as error:
            # Their states are lost. The youngest pays for the others, who read theirs again.
            self._fail(*batch[-1], error)
            for _, sequence in batch:
                sequence.state = None
            return
        for (job, sequence), logits in zip(batch, rows, strict=True):
            self._advance(job, sequence, partial(sequence.advance, logits))

    def _advance(
        self, job: Job, sequence: Sequence, act: Callable[[], list[PromptEvent | TokenEvent]]
    ) -> None:
        try:
            events = act()
        except Exception as error:
            self._fail(job, sequence, error)
            return
        for event in events:
            self._metrics.observe(sequence, event)
            if not job.cancelled:
                job.emit(event)
        if sequence.finish_reason is not None:
            job.running -= 1
            self._running.remove((job, sequence))
            self._seconds += 0.2 * (sequence.times.whole - sequence.times.queued - self._seconds)
            self._prefixes.add(sequence)

    def _fail(self, job: Job, sequence: Sequence, error: Exception) -> None:
        """End a job whose error says nothing about the next one; raise any other."""
        sequence.state = None
        if not _is_passing(error):
            raise error
        _log.error("a generation failed: %s", error)
        job.fail(GenerationError(f"the generation failed: {error}"))


def _is_passing(error: Exception) -> bool:
    """Whether the next generation can be expected to work after this error."""
    if isinstance(error, (MemoryError, ArithmeticError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch has no type of its own for this on CPU
