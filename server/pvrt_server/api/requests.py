"""What clients send, and what becomes of it.

Every field may be null, which means its default. What the engine cannot do is refused by name:
a field is ignored only where ignoring it cannot change an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

from pydantic import ConfigDict, model_validator

from pvrt_server.api.body import Body
from pvrt_server.api.messages import Message, template_messages
from pvrt_server.api.responses import UsageInStream
from pvrt_server.api.tool_params import AnyChoice, ResponseFormat, ToolParams
from pvrt_server.engine.engine import check_sequences
from pvrt_server.engine.sampling import MAX_LOGPROBS, SamplingParams
from pvrt_server.engine.text import TextCodec
from pvrt_server.errors import RequestError
from pvrt_server.notices import say_once

MAX_CHOICES = 128
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

# What cannot change an answer here: bookkeeping of clients and of OpenAI's own service, and
# settings of other engines' speed and memory.
_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "extra_body"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction", "verbosity"),
        *("chat_id", "session_id", "id", "title", "background_tasks", "message_id"),
        *("cache_prompt", "id_slot", "keep_alive", "cache_salt", "priority", "request_id"),
        *("usage", "provider", "transforms", "include_reasoning"),
        *("num_ctx", "num_keep", "num_batch", "num_thread", "num_gpu", "use_mmap", "use_mlock"),
    }
)
# Other engines' names for our fields.
_ALIASES = {"repeat_penalty": "repetition_penalty"}
# Fields that go to SamplingParams as they are.
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
# Fields that we know and do not offer, with the values that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "mirostat": (0,),
    "tfs_z": (1,),
    "typical_p": (1,),
    "web_search_options": (),
    "guided_json": (),
    "structured_outputs": (),
}


class StreamOptions(Body):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # pads chunks on OpenAI's own service


class GenerateRequest(Body):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    #: Fields that cannot change the answers of this endpoint.
    harmless: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_our_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {_ALIASES.get(name, name): value for name, value in given.items()}
        return known if len(known) == len(given) else given

    def refuse_unsupported(self) -> None:
        """Raise RequestError naming the first field that asks for something not offered."""
        for name, value in (self.model_extra or {}).items():
            if value is None or value in _NOTHING.get(name, ()):
                continue
            if name in _HARMLESS or name in self.harmless:
                say_once(f"ignored in requests, because it changes no answer: {name}")
                continue
            if name in _NOTHING:
                raise RequestError(
                    f"{name} is not supported by this engine", name, "unsupported_parameter"
                )
            raise RequestError(f"unrecognized request argument: {name}", name, "unknown_parameter")
        if self.best_of is not None and self.best_of != self.choices:
            raise RequestError(
                f"best_of is {self.best_of}; only the value of n ({self.choices}) is supported",
                "best_of",
                "unsupported_parameter",
            )

    @property
    def choices(self) -> int:
        """How many answers per prompt. Raises RequestError out of range."""
        number = 1 if self.n is None else self.n
        if not 1 <= number <= MAX_CHOICES:
            raise RequestError(f"n is {number}; it must be between 1 and {MAX_CHOICES}", "n")
        return number

    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, None for any text. Raises RequestError."""
        return None if self.response_format is None else self.response_format.schema_to_follow()

    @property
    def usage_in_stream(self) -> UsageInStream:
        """Where a stream tells the usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "nowhere"
        return "everywhere" if options.continuous_usage_stats else "at the end"

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Parameters of the first choice. Raises RequestError for a value out of range."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return replace(defaults, **given, stop=stop, logit_bias=_token_keys(self.logit_bias))


def check_gap(prompt: Any, echo: Any) -> None:
    """Raise RequestError unless a suffix can follow this prompt."""
    if echo or not isinstance(prompt, str):
        raise RequestError("suffix needs one prompt as text, and no echo", "suffix")


class CompletionRequest(GenerateRequest):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        """All prompts, as text or token ids. Raises RequestError when there is none."""
        if self.prompt == []:
            raise RequestError("prompt is an empty list", "prompt")
        if self.suffix:
            check_gap(self.prompt, self.echo)
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts = cast(Sequence[str | list[int]], [self.prompt] if one else self.prompt)
        check_sequences(len(prompts) * self.choices)  # before any of them is tokenised
        return prompts

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """See GenerateRequest."""
        max_tokens = _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if max_tokens < (0 if self.echo else 1):
            raise RequestError(
                f"max_tokens is {max_tokens}; it must be at least 1, or 0 with echo", "max_tokens"
            )
        return replace(
            super().sampling(defaults),
            max_tokens=max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class Thinking(Body):
    """`thinking`, as Anthropic and several others have it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "disabled", "adaptive", "auto"]


class Conversation(Body):
    """The fields that become a prompt under the chat template."""

    messages: list[Message] | None = None
    tools: list[ToolParams] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None

    def encode(self, codec: TextCodec, with_tools: bool = True) -> list[int]:
        """Token ids of the prompt; without tools the template hears of none. Raises RequestError.

        reasoning_effort and thinking reach templates that know a variable for them.
        """
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                "continue_final_message",
            )
        given = [tool.model_dump(exclude_none=True) for tool in self.tools or ()] or None
        template = codec.template(given)
        variables: dict[str, Any] = {"reasoning_effort": self.reasoning_effort}
        if self.thinking is not None and self.thinking.type in ("enabled", "disabled"):
            variables["enable_thinking"] = self.thinking.type == "enabled"
        elif self.reasoning_effort == "none":
            variables["enable_thinking"] = False
        variables = {
            name: value
            for name, value in variables.items()
            if value is not None and name in (template or "")
        }
        continues = bool(self.continue_final_message)
        return codec.encode_chat(
            template_messages(self.messages or (), template),
            tools=given if with_tools else None,
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
            template_kwargs={**variables, **(self.chat_template_kwargs or {})},
        )


class ChatRequest(GenerateRequest, Conversation):
    """The body of POST /v1/chat/completions."""

    harmless: ClassVar[frozenset[str]] = frozenset({"suffix"})

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: AnyChoice | None = None
    parallel_tool_calls: bool | None = None

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """See GenerateRequest."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is "
                f"{self.max_completion_tokens}; send one of them",
                "max_completion_tokens",
            )
        max_tokens = next(iter(limits), None)
        if max_tokens is not None and max_tokens < 1:
            name = "max_tokens" if self.max_tokens is not None else "max_completion_tokens"
            raise RequestError(f"{name} is {max_tokens}; it must be at least 1", name)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs}; it must be between 0 and {MAX_LOGPROBS}",
                "top_logprobs",
            )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return replace(super().sampling(defaults), max_tokens=max_tokens, logprobs=logprobs)


class TokenizeRequest(Conversation):
    """The body of POST /tokenize: a prompt, or messages for the chat template (as in vLLM)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize (as in vLLM)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[int]


def _token_keys(bias: Mapping[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError as error:
        raise RequestError("logit_bias maps token ids to numbers", "logit_bias") from error
