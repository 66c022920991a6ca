"""Client libraries of a server, all behind one interface, and what they are asked."""

from collections.abc import Iterator
from typing import Any

from clients.agent_clients import OpenAIAgents, PydanticAI
from clients.client import Client, Where
from clients.features import features
from clients.langchain_client import LangChain
from clients.litellm_client import LiteLLM
from clients.llm_client import LLM
from clients.node_client import Node, NodeOpenAI, VercelAI
from clients.openai_client import AsyncOpenAI, Instructor, OpenAI

__all__ = ["CLIENTS", "Node", "rows"]

CLIENTS: dict[str, type[Client]] = {
    "openai": OpenAI,
    "openai async": AsyncOpenAI,
    "langchain": LangChain,
    "litellm": LiteLLM,
    "openai-agents": OpenAIAgents,
    "pydantic-ai": PydanticAI,
    "instructor": Instructor,
    "llm": LLM,
    "npm openai": NodeOpenAI,
    "Vercel ai": VercelAI,
}


def rows(name: str, where: Where) -> Iterator[dict[str, Any]]:
    """One client's features: client with its version, feature, whether it passes, and what not.

    pass is None for what the client has no way to ask for.
    """
    client = CLIENTS[name](where)
    label = f"{name} {client.version()}"
    for feature, check in features(client):
        row: dict[str, Any] = {"client": label, "feature": feature, "pass": check and True}
        try:
            if check is not None:
                check()
        except Exception as error:  # whatever a wrong answer leads to
            row |= {"pass": False, "problem": f"{type(error).__name__}: {error}"[:300]}
        yield row
    client.close()
