"""What goes wrong, and what surrounds answers: errors, limits, keys, leaving clients."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import pvrt
from pvrt_server.engine.engine import Engine, Job
from pvrt_server.engine.sequences import GenerationRequest
from tests.server.running import Server, post_bytes, scripted_engine, serving, wait_until

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -4}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": 600}, "messages"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": ["", "a"]}, "stop"),
        ({"stop": 7}, "stop"),
        ({"logit_bias": {"many": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"mirostat": 2}, "mirostat"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}},
            "response_format",
        ),
        ({"best_of": 2}, "best_of"),
        ({"temprature": 0.5}, "temprature"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{**HELLO[0], "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"messages": [{**HELLO[0], "prefix": True}]}, "messages[0].prefix"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
    ],
)
def test_a_chat_request_is_refused_by_the_name_of_its_field(
    says: Server, extra: dict[str, Any], param: str
) -> None:
    error = refused(says.post(CHAT, {"model": "toy", "messages": HELLO, **extra}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"] or param == "messages"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [1, 99999]}, "prompt"),
        ({"prompt": [1, -1], "echo": True}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 50}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ],
)
def test_a_completion_request_is_refused_by_the_name_of_its_field(
    says: Server, body: dict[str, Any], param: str
) -> None:
    assert refused(says.post(COMPLETIONS, body))["param"] == param


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "ann", "metadata": {"a": "b"}, "store": False},
        {
            "tools": None,
            "parallel_tool_calls": False,
            "response_format": {"type": "text"},
            "tool_choice": "none",
        },
        {"max_tokens": 4, "max_completion_tokens": 4},
        {"n": 1, "best_of": 1, "top_k": -1, "min_p": 0, "logit_bias": {}},
        {"some_new_field": None},
        {"reasoning_effort": "low", "verbosity": "low", "prediction": {"type": "content"}},
        {"thinking": {"type": "disabled"}, "include_reasoning": False},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"cache_prompt": True, "keep_alive": "5m", "priority": 3, "request_id": "r", "num_ctx": 9},
        {"repeat_penalty": 1.1, "mirostat": 0, "tfs_z": 1.0, "suffix": "x"},
        {"provider": {"order": ["x"]}, "usage": {"include": True}, "cache_salt": "x"},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "json_object", "schema": {"const": {}}}},
    ],
)
def test_harmless_fields_are_accepted(says: Server, extra: dict[str, Any]) -> None:
    assert says.post(CHAT, {"messages": HELLO, **extra}).status_code == 200


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Hi", "id": "1", "opts": {"visible": True}, "timestamp": 1},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hi", "provider_specific_fields": {"refusal": None}},
        {"role": "assistant", "content": "Hi", "thinking_blocks": [{}], "reasoning": "why"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x"},
                {"type": "output_text", "text": "Hi"},
            ],
        },
    ],
)
def test_what_clients_keep_with_messages_is_no_part_of_the_prompt(
    says: Server, message: dict[str, Any]
) -> None:
    plain = {"role": message["role"], "content": "Hi"}
    prompts = [
        says.post("/tokenize", {"messages": [*HELLO, each, *HELLO]}).json()["tokens"]
        for each in (message, plain)
    ]
    assert prompts[0] == prompts[1]


def test_an_answer_of_nothing_can_be_sent_back(says: Server) -> None:
    nothing: Any = {"role": "assistant", "content": None, "tool_calls": []}
    assert says.post(CHAT, {"messages": [*HELLO, nothing, *HELLO]}).status_code == 200


def test_what_is_ignored_is_told_once(says: Server, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        says.post(CHAT, {"messages": HELLO, "use_mlock": True})
    assert [record.message for record in caplog.records if "use_mlock" in record.message] == [
        "ignored in requests, because it changes no answer: use_mlock"
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"prompt": "a"', b"[1]", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "brace", "cut", "list", "string", "null", "no-utf8", "deep"],
)
def test_a_body_that_is_no_json_object_is_a_400_and_the_server_lives(
    says: Server, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    response = says.post(COMPLETIONS, content=content, headers=headers)
    assert refused(response)["message"]
    assert says.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "seed": 99999999999999999999999}', "seed"),
        (b'{"prompt": "half of \\ud83d"}', "prompt"),
    ],
)
def test_values_that_json_lets_through_are_refused(
    says: Server, content: bytes, param: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = says.post(COMPLETIONS, content=content, headers=headers)
    assert refused(response)["param"] == param


def test_a_full_context_is_refused_with_both_numbers(says: Server) -> None:
    error = refused(says.post(COMPLETIONS, {"prompt": "a" * 500, "max_tokens": 13}))
    assert error["code"] == "context_length_exceeded"
    for number in ("512", "500", "13"):
        assert number in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_a_413(toy: Path, chunked: bool) -> None:
    engine, _ = scripted_engine(toy, "ok")
    content = json.dumps({"prompt": "a" * 5000}).encode()
    with serving(engine, max_body_bytes=1000) as server:
        response = server.post(
            COMPLETIONS,
            content=iter([content[:2500], content[2500:]]) if chunked else content,
            headers={"Content-Type": "application/json"},
        )
        assert refused(response, 413)["code"] == "too_large"
        assert server.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200


def test_an_unknown_route_lists_those_that_exist(says: Server) -> None:
    error = refused(says.post("/v1/v1/chat/completions", {}), 404)
    assert "POST /v1/chat/completions" in error["message"]
    error = refused(says.get(CHAT), 405)
    assert error["code"] == "method_not_allowed"


def test_models_go_by_name_and_folder_and_no_other(says: Server, toy: Path) -> None:
    client = says.client()
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("toy", "model", "pvrt")
    assert card.model_dump()["max_model_len"] == 512
    assert client.models.retrieve("toy").id == "toy"
    for name in ("toy", toy.name, str(toy)):
        assert client.completions.create(model=name, prompt="ab").model == "toy"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="ab")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "'toy'" in caught.value.message


def test_the_official_client_reads_our_errors(says: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        says.client().chat.completions.create(model="toy", messages=HELLO, temperature=9)
    assert caught.value.param == "temperature"
    assert "between 0 and 2" in caught.value.message


def test_a_key_guards_everything_but_health_and_the_page(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine, api_key="secret") as server:
        assert server.client(api_key="secret").models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(api_key="wrong").completions.create(model="toy", prompt="ab")
        assert caught.value.code == "invalid_api_key"
        assert server.get("/v1/models").status_code == 401
        assert server.get("/nothing").status_code == 401
        assert server.get("/version").status_code == 401
        assert server.get("/pvrt/status").status_code == 401
        assert server.get("/health").json() == {"status": "ok"}
        assert "<title>" in server.get("/").text
        headers = {"Authorization": "Bearer secret"}
        version = server.get("/version", headers=headers)
        assert version.json() == {"version": pvrt.__version__}


def test_a_full_queue_is_a_429_that_says_when_to_return(toy: Path) -> None:
    engine, model = scripted_engine(toy, "ok", max_sequences=1, max_requests=2)
    model.gate.clear()
    with serving(engine) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.post, COMPLETIONS, {"prompt": "ab"})
        wait_until(lambda: engine.running == 1)
        second = pool.submit(server.post, COMPLETIONS, {"prompt": "ab"})
        wait_until(lambda: engine.waiting == 1)
        response = server.post(COMPLETIONS, {"prompt": "ab"})
        assert refused(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["Retry-After"]) >= 1
        model.gate.set()
        assert [answer.result().status_code for answer in (first, second)] == [200, 200]
        assert server.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(
    toy: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = scripted_engine(toy, "x" * 400)
    model.gate.clear()
    jobs: list[Job] = []
    submit = engine.submit

    def noted(requests: Sequence[GenerationRequest], on_event: Any) -> Job:
        jobs.append(submit(requests, on_event))
        return jobs[-1]

    monkeypatch.setattr(engine, "submit", noted)
    body = json.dumps({"prompt": "ab", "max_tokens": 400, "stream": stream}).encode()
    with serving(engine) as server:
        with server.connect() as connection:
            connection.sendall(post_bytes(COMPLETIONS, body))
            wait_until(lambda: engine.running == 1)
        wait_until(lambda: jobs[0].cancelled)
        model.gate.set()
        wait_until(lambda: engine.running == 0)
        assert model.steps == []


def test_a_waiting_client_that_leaves_gives_up_its_place(toy: Path) -> None:
    engine, model = scripted_engine(toy, "ok", max_sequences=1)
    model.gate.clear()
    with serving(engine) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, COMPLETIONS, {"prompt": "ab"})
        wait_until(lambda: engine.running == 1)
        with server.connect() as connection:
            connection.sendall(post_bytes(COMPLETIONS, b'{"prompt": "ab"}'))
            wait_until(lambda: engine.waiting == 1)
        wait_until(lambda: engine.waiting == 0)
        model.gate.set()
        assert first.result().status_code == 200


def test_a_silent_stream_is_kept_alive_with_comments(toy: Path) -> None:
    engine, model = scripted_engine(toy, "ok")
    model.gate.clear()
    text = ""
    with (
        serving(engine, sse_keep_alive_seconds=0.01) as server,
        server.connect() as connection,
    ):
        connection.sendall(post_bytes(COMPLETIONS, b'{"prompt": "ab", "stream": true}'))
        while piece := connection.recv(65536).decode():
            text += piece
            if ": keep-alive\n\n" in text:
                model.gate.set()
    assert text.index(": keep-alive") < text.index("data: ")
    assert "data: [DONE]\n\n" in text


@pytest.mark.parametrize("error", [RuntimeError("device lost"), MemoryError("no room")])
def test_a_stream_that_breaks_ends_with_an_error_event(toy: Path, error: Exception) -> None:
    engine, _ = scripted_engine(toy, [65, 66, error])
    with serving(engine) as server:
        stream = server.client().completions.create(model="toy", prompt="ab", stream=True)
        with pytest.raises(openai.APIError, match=str(error)):
            list(stream)


def test_a_stream_that_breaks_still_says_done(toy: Path) -> None:
    engine, _ = scripted_engine(toy, [65, MemoryError("no room")])
    with serving(engine) as server:
        text = server.post(COMPLETIONS, {"prompt": "ab", "stream": True}).text
        assert '"error"' in text.split("\n\n")[-3]
        assert text.endswith("data: [DONE]\n\n")
        # One answer lacked memory; the next may not.
        error = refused(server.post(COMPLETIONS, {"prompt": "ab"}), 500)
        assert error["type"] == "server_error"
        assert server.get("/health").status_code == 200


def test_a_broken_engine_is_unhealthy_and_says_so(toy: Path) -> None:
    engine, _ = scripted_engine(toy, [65, RuntimeError("device lost")])
    with serving(engine) as server:
        assert "device lost" in refused(server.post(COMPLETIONS, {"prompt": "ab"}), 503)["message"]
        assert "device lost" in refused(server.get("/health"), 503)["message"]
        refused(server.post(COMPLETIONS, {"prompt": "ab"}), 503)


def test_a_bug_of_ours_is_an_envelope_too(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = scripted_engine(toy, "ok")

    def broken(*args: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(Engine, "check", broken)
    with serving(engine) as server:
        assert refused(server.post(COMPLETIONS, {"prompt": "ab"}), 500)["type"] == "server_error"


def test_a_checkpoint_without_a_template_names_the_file(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    engine.codec._tokenizer.chat_template = None
    with serving(engine) as server:
        error = refused(server.post(CHAT, {"messages": HELLO}))
        assert "chat_template.jinja" in error["message"]
        assert server.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200
