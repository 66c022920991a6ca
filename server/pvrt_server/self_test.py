"""`pvrt serve --check`: a short test of a running server from a client's side, as a table.

Asks nothing of the model but to write some tokens, so it passes or fails by the server alone.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_TIMEOUT_SECONDS = 300  # a slow CPU may compile on the first request
_TOKENS = 12


@dataclass(frozen=True)
class Target:
    """A running server: http://host:port, the model's name there, the key, and whether it chats."""

    url: str
    model: str
    api_key: str | None
    chat: bool


@dataclass(frozen=True)
class Result:
    """One check: `problem` is None where it passed."""

    name: str
    seconds: float
    problem: str | None


@dataclass(frozen=True)
class Answer:
    """A response: its status and body, text in full."""

    status: int
    text: str

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events. Raises ValueError if it has no proper end."""
        data = [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]
        if not data or data[-1] != "[DONE]":
            raise ValueError("the stream does not end with data: [DONE]")
        return [json.loads(event) for event in data[:-1]]


class _Client:
    def __init__(self, target: Target) -> None:
        self._target = target

    def ask(self, path: str, body: Any = None, *, key: bool = True) -> Answer:
        """POST a body, or GET without one; errors of HTTP are answers too."""
        headers = {"Content-Type": "application/json"}
        if key and self._target.api_key is not None:
            headers["Authorization"] = f"Bearer {self._target.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._target.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())

    def complete(self, **fields: Any) -> Answer:
        """A greedy completion."""
        body = {"model": self._target.model, "prompt": "Once upon a time", "temperature": 0}
        return self.ask("/v1/completions", {**body, "max_tokens": _TOKENS, **fields})

    def converse(self, **fields: Any) -> Answer:
        """A greedy chat completion."""
        messages = [{"role": "user", "content": "Say hello."}]
        body = {"model": self._target.model, "messages": messages, "temperature": 0}
        return self.ask("/v1/chat/completions", {**body, "max_tokens": _TOKENS, **fields})


def run_checks(target: Target) -> Iterator[Result]:
    """Run all checks in turn. One that fails does not stop the others."""
    client = _Client(target)
    for name, check in _checks(target):
        started = time.monotonic()
        problem = None
        try:
            check(client)
        except Exception as error:  # whatever a wrong answer leads to
            problem = str(error) or type(error).__name__
        yield Result(name, time.monotonic() - started, problem)


def report(results: Iterable[Result]) -> bool:
    """Print the table as results come; returns whether all passed."""
    passed = total = 0
    for result in results:
        total += 1
        passed += result.problem is None
        mark = "ok  " if result.problem is None else "FAIL"
        said = "" if result.problem is None else f"  {result.problem}"
        print(f"{mark}  {result.name:42} {result.seconds:6.2f} s{said}", flush=True)
    print(f"{passed} of {total} checks passed", flush=True)
    return passed == total


def _checks(target: Target) -> Iterator[tuple[str, Callable[[_Client], None]]]:
    yield "health, without a key", _health
    if target.api_key is not None:
        yield "nothing else without the key", _guarded
    yield "models: name and context", lambda client: _models(client, target.model)
    yield "completion: text, usage, finish_reason", _completion
    yield "completion: seed repeats", _seed
    yield "completion: logprobs", _logprobs
    yield "completion: n and list of prompts", _several
    yield "completion: token ids as prompt", _token_ids
    yield "stop string ends the answer", _stop
    yield "stream: same text, usage chunk, [DONE]", _stream
    if target.chat:
        yield "chat: message, usage, finish_reason", _chat
        yield "chat: stream, usage chunk, [DONE]", _chat_stream
    yield "four requests at once", _at_once
    yield "error: unknown model is 404", _unknown_model
    yield "error: bad value is 400, in the envelope", _bad_value
    yield "error: context overflow is 400", _overflow
    yield "error: no JSON is 400", _no_json
    yield "metrics: Prometheus text", _metrics
    yield "page at /", _page


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _status(answer: Answer, status: int = 200) -> Answer:
    _expect(answer.status == status, f"status {answer.status}: {answer.text[:200]}")
    return answer


def _good(answer: Answer) -> Any:
    return _status(answer).json


def _refused(answer: Answer, status: int) -> None:
    error = _status(answer, status).json.get("error")
    _expect(isinstance(error, dict) and bool(error.get("message")), "no error.message in the body")
    _expect({"type", "param", "code"} <= error.keys(), "error lacks type, param or code")


def _usage(usage: Any) -> int:
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    _expect(usage["total_tokens"] == total, f"usage does not add up: {usage}")
    return int(usage["completion_tokens"])


def _health(client: _Client) -> None:
    _status(client.ask("/health", key=False))


def _guarded(client: _Client) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/pvrt/status"):
        _refused(client.ask(path, key=False), 401)


def _models(client: _Client, name: str) -> None:
    cards = _good(client.ask("/v1/models"))["data"]
    own = [card for card in cards if card["id"] == name]
    _expect(len(own) == 1, f"{name} is not in the list")
    _expect(own[0]["max_model_len"] > 0, "no max_model_len")


def _completion(client: _Client) -> None:
    body = _good(client.complete(ignore_eos=True))
    (choice,) = body["choices"]
    _expect(choice["finish_reason"] == "length", f"finish_reason {choice['finish_reason']}")
    _expect(isinstance(choice["text"], str), "no text")
    _expect(_usage(body["usage"]) == _TOKENS, f"usage says {body['usage']}")


def _seed(client: _Client) -> None:
    texts = {_good(client.complete(temperature=1, seed=7))["choices"][0]["text"] for _ in range(2)}
    _expect(len(texts) == 1, "two answers with one seed differ")


def _logprobs(client: _Client) -> None:
    scores = _good(client.complete(logprobs=2, ignore_eos=True))["choices"][0]["logprobs"]
    _expect(len(scores["tokens"]) == _TOKENS, f"{len(scores['tokens'])} tokens")
    _expect(all(value <= 1e-6 for value in scores["token_logprobs"]), "a logprob above 0")
    # Not two: tokens that are no text of their own go by one name.
    _expect(all(scores["top_logprobs"]), "no alternatives")


def _several(client: _Client) -> None:
    body = _good(client.complete(prompt=["One", "Two"], n=2, temperature=1, max_tokens=2))
    places = [choice["index"] for choice in body["choices"]]
    _expect(sorted(places) == [0, 1, 2, 3], f"indices {places}")


def _token_ids(client: _Client) -> None:
    ids = _good(client.ask("/tokenize", {"prompt": "Once upon a time"}))["tokens"]
    texts = {
        _good(client.complete(prompt=prompt))["choices"][0]["text"]
        for prompt in (ids, "Once upon a time")
    }
    _expect(len(texts) == 1, "the text and its token ids are answered differently")


def _stop(client: _Client) -> None:
    text = _good(client.complete(ignore_eos=True))["choices"][0]["text"]
    word = text[len(text) // 2 :][:2]
    _expect(bool(word), "the model wrote nothing to stop at")
    (choice,) = _good(client.complete(ignore_eos=True, stop=[word]))["choices"]
    _expect(choice["text"] == text[: text.index(word)], "the answer is not cut at the stop string")
    _expect(choice["finish_reason"] == "stop", f"finish_reason {choice['finish_reason']}")


def _stream(client: _Client) -> None:
    whole = _good(client.complete(ignore_eos=True))
    answer = client.complete(ignore_eos=True, stream=True, stream_options={"include_usage": True})
    *chunks, last = _status(answer).events
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    _expect(text == whole["choices"][0]["text"], "the stream says something else")
    _expect(last["choices"] == [], "the last chunk is not usage alone")
    _expect(last["usage"]["total_tokens"] == whole["usage"]["total_tokens"], "usage differs")
    plain = client.complete(stream=True).events
    _expect(all(chunk["choices"] for chunk in plain), "a usage chunk that nobody asked for")
    _expect(bool(plain[-1]["choices"][0]["finish_reason"]), "no finish_reason at the end")


def _chat(client: _Client) -> None:
    body = _good(client.converse())
    (choice,) = body["choices"]
    _expect(choice["message"]["role"] == "assistant", "the answer is not the assistant's")
    _expect(choice["finish_reason"] in ("stop", "length"), f"{choice['finish_reason']}")
    _usage(body["usage"])


def _chat_stream(client: _Client) -> None:
    whole = _good(client.converse())["choices"][0]["message"]["content"]
    *chunks, last = client.converse(stream=True, stream_options={"include_usage": True}).events
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    _expect(text == (whole or ""), "the stream says something else")
    _usage(last["usage"])


def _at_once(client: _Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.complete(), range(4)))
    for answer in answers:
        _good(answer)


def _unknown_model(client: _Client) -> None:
    _refused(client.complete(model="no-such-model"), 404)


def _bad_value(client: _Client) -> None:
    _refused(client.complete(temperature=-1), 400)


def _overflow(client: _Client) -> None:
    _refused(client.complete(max_tokens=100_000_000), 400)


def _no_json(client: _Client) -> None:
    _refused(client.ask("/v1/completions", ["not", "an", "object"]), 400)


def _metrics(client: _Client) -> None:
    text = _status(client.ask("/metrics")).text
    _expect("# TYPE" in text and "time_to_first_token" in text, "no TTFT in it")


def _page(client: _Client) -> None:
    _expect("<title>" in _status(client.ask("/", key=False)).text, "no page")
