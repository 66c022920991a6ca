"""vLLM with our plugin and the embedded engine give the same answers over the same protocol."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import Server
from tests.server.test_launch import RUN, announced_url

pytestmark = pytest.mark.vllm
PROMPTS = ["Once upon a time", "def main():", "0, 1, 1, 2, 3, 5,", "x"]


@pytest.fixture(scope="module")
def vllm(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The official client of vLLM, started by `serve` on the toy checkpoint in float32."""
    code = (
        f"{RUN}Path({str(toy)!r}), engine='vllm', port=0, served_model_name='toy', "
        "dtype='float32', extra=['--enforce-eager', '--max-num-seqs', '4']))"
    )
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env={**os.environ, **quiet},
        )
        try:
            try:
                url = announced_url(process)
            except AssertionError:
                pytest.fail(log.read_text()[-3000:])
            yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completions_agree(vllm: openai.OpenAI, client: openai.OpenAI, prompt: str) -> None:
    def answer(who: openai.OpenAI) -> Any:
        return who.completions.create(
            model="toy", prompt=prompt, temperature=0, max_tokens=48, logprobs=0
        )

    ours, theirs = answer(client), answer(vllm)
    assert ours.choices[0].text == theirs.choices[0].text
    assert ours.choices[0].finish_reason == theirs.choices[0].finish_reason
    assert ours.usage.total_tokens == theirs.usage.total_tokens
    scores, expected = (a.choices[0].logprobs.token_logprobs for a in (ours, theirs))
    assert scores == pytest.approx(expected, abs=1e-3)


def test_greedy_chats_agree(vllm: openai.OpenAI, client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Answer."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}],
        },
    ]

    def answer(who: openai.OpenAI, **options: Any) -> Any:
        return who.chat.completions.create(
            model="toy", messages=messages, temperature=0, max_tokens=48, **options
        )

    ours, theirs = answer(client), answer(vllm)
    assert ours.choices[0].message.content == theirs.choices[0].message.content
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens
    texts = [
        "".join(chunk.choices[0].delta.content or "" for chunk in answer(who, stream=True))
        for who in (client, vllm)
    ]
    assert texts[0] == texts[1] == ours.choices[0].message.content


def test_stop_strings_and_echoed_scores_agree(
    vllm: openai.OpenAI, client: openai.OpenAI, server: Server
) -> None:
    text = client.completions.create(model="toy", prompt="x", temperature=0, max_tokens=48)
    stop = text.choices[0].text[4:6]

    def answer(who: openai.OpenAI) -> Any:
        return who.completions.create(
            model="toy", prompt="x y z", temperature=0, max_tokens=48, stop=stop
        )

    assert answer(client).choices[0].text == answer(vllm).choices[0].text

    def scores(who: openai.OpenAI) -> Any:
        answer = who.completions.create(
            model="toy", prompt="lm-eval", temperature=0, max_tokens=1, echo=True, logprobs=1
        )
        return answer.choices[0].logprobs

    ours, theirs = scores(client), scores(vllm)
    assert ours.tokens[:7] == theirs.tokens[:7]
    assert ours.token_logprobs[1:] == pytest.approx(theirs.token_logprobs[1:], abs=1e-3)
    assert ours.text_offset[:7] == theirs.text_offset[:7]
