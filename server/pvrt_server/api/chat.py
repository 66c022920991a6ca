"""From a conversation to what the engine runs: prompt, tools, grammar, and where thoughts stand."""

from dataclasses import dataclass, replace

from pvrt_server.api.reasoning import Thought, after_thought, thought_of
from pvrt_server.api.requests import ChatRequest
from pvrt_server.api.responses import ChatSerializer, Usage
from pvrt_server.api.tool_params import offer
from pvrt_server.api.tools import Tools
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.grammar import GrammarFactory, json_rule
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.engine.sequences import GenerationRequest


@dataclass(frozen=True)
class Chat:
    """A chat request, ready to run: one GenerationRequest per choice."""

    requests: list[GenerationRequest]
    serializer: ChatSerializer
    usage: Usage


def prepare(engine: Engine, body: ChatRequest) -> Chat:
    """What a request asks of an engine. Takes milliseconds of tokenizing. Raises RequestError."""
    body.refuse_unsupported()
    params, codec = body.sampling(engine.defaults), engine.codec
    tools = offer(codec, body.tools, body.tool_choice, body.parallel_tool_calls)
    ids = body.encode(codec, tools is not None)
    thought = thought_of(codec, ids)
    grammar = _grammar(engine, body, tools, thought)
    requests = [
        GenerationRequest(tuple(ids), for_choice(params, number), grammar)
        for number in range(body.choices)
    ]
    serializer = ChatSerializer(codec, bool(body.logprobs), tools, thought)
    return Chat(requests, serializer, Usage(len(ids), body.choices, body.usage_in_stream))


def for_choice(params: SamplingParams, number: int) -> SamplingParams:
    """Parameters of the n-th choice: with a seed, each choice still draws its own numbers."""
    if params.seed is None or number == 0:
        return params
    half = 1 << 63
    return replace(params, seed=(params.seed + number + half) % (2 * half) - half)


def _grammar(
    engine: Engine, body: ChatRequest, tools: Tools | None, thought: Thought
) -> GrammarFactory | None:
    """What the answer must follow: the form of calls, a JSON schema, or nothing."""
    schema = body.schema_to_follow()
    rules = None if tools is None else tools.grammar(schema)
    if rules is not None and tools is not None:
        # Free text before a strict call has a place for thoughts.
        bound = tools.must_call or schema is not None
        rules = after_thought(rules, thought) if bound else rules
        return engine.grammars.lark(rules, "tools", tools.rule_names)
    if schema is None:
        return None
    rules = f"start: {json_rule(schema, 'response_format')}\n"
    return engine.grammars.lark(after_thought(rules, thought), "response_format")
