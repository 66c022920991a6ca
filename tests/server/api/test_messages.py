"""What clients keep with the messages that they send: it is no part of the prompt."""

from typing import Any

import pytest

from tests.server.running import Server

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


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
