"""What was found to do harm, or is near it: tried first, and changed further by no one.

FOUND are contents of files by name; BODIES are sound requests by path, which are changed.
"""

from typing import Any

DEEP = b"[" * 100_000
FOUND: list[tuple[str, bytes]] = [
    *(
        (name, text)
        for name in ("config.json", "tokenizer.json", "generation_config.json")
        for text in (DEEP, b"[]", b"null", b"{}", b"", b"5", b"\xff", b'{"a": ' + DEEP)
    ),
    ("config.json", b'{"model_type": "llama", "architectures": 5}'),
    ("config.json", b'{"model_type": "llama", "num_hidden_layers": 2147483648}'),
    ("config.json", b'{"model_type": "llama", "vocab_size": -5}'),
    ("config.json", b'{"model_type": "nobody-knows", "auto_map": {"AutoConfig": "code.Config"}}'),
    ("config.json", b'{"model_type": "llama", "output_hidden_states": ["model"]}'),
    ("config.json", b'{"model_type": ["llama"]}'),
    ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
    ("config.json", b'{"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}'),
    ("config.json", b'{"model_type": "llama", "quantization_config": []}'),
    ("config.json", b'{"model_type": "llama", "quantization_config": {"quant_method": []}}'),
    ("tokenizer.json", b'{"version": "1.0"}'),
    (
        "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}',
    ),
    ("tokenizer_config.json", b'{"tokenizer_class": 5}'),
    ("tokenizer_config.json", b'{"tokenizer_class": "Nobodys"}'),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
    ("tokenizer_config.json", b'{"eos_token": {"content": 5}}'),
    ("chat_template.jinja", b"{% for x in range(10**10) %}{% endfor %}"[:30]),
    ("chat_template.jinja", b"{{ messages[9].x.y }}"),
    ("chat_template.jinja", b"\xe5"),
    ("model.safetensors", b"\xff" * 8),
    ("model.safetensors", b"\0" * 8),
    ("model.safetensors", b""),
    ("pvrt.json", b'{"tensor_sha256": []}'),
    ("model.gguf", b"GGUF"),
    ("model.gguf", b"GGUF\3\0\0\0"),
    ("model.gguf", b"GGUF\3\0\0\0" + b"\xff" * 16),
    ("model.gguf", b"GGUF\3\0\0\0" + b"\0" * 16),
    *(
        ("recipe.yaml", text)
        for text in (
            DEEP,
            b"",
            b"- 1",
            b"a: &a [*a]",
            b"!!python/object/apply:os.system [ls]",
            b"{1: 2}",
            b"scheme: 5",
            b"scheme: 99x99g99",
            b"samples: .inf",
            b"samples: 1e400",
            b"seed: -1",
            b"pv: [1]",
            b"training: {steps: .nan}",
            b"? [a]\n: b",
            b"x: 2001-13-45",
            b"\xff\xfe\0",
            b"bits: .nan",
            b"pv: {pv: {pv: {}}}",
            b"training: {training: {}}",
            b"x: 0o999999999999",
            b"samples: 0x" + b"f" * 5000,
            b"scheme: " + b"x" * 50_000,
            b'pv: {strategy: "\\ud800x"}',
            b"? " + b"x" * 50_000,
        )
    ),
    *(
        (f".run/{name}", text)
        for name in ("fingerprint.json", "journal.jsonl", "config.yaml")
        for text in (
            DEEP,
            b"",
            b"null",
            b"[]",
            b"{}",
            b"\xff",
            b'{"event": "piece"}\n',
            b'{"event": []}\n',
        )
    ),
    (".run/fingerprint.json", b'{"recipe": {"pv": []}}'),
    (".run/fingerprint.json", b'{"model": "' + b"9" * 5000 + b'"}'),
    (".run/fingerprint.json", b'{"recipe": {"training": 5}}'),
    (".run/fingerprint.json", b'{"recipe": 5, "versions": 7}'),
    (".run/journal.jsonl", b'{"event": "versions", "versions": 5}\n'),
    (".run/journal.jsonl", b'{"event": "piece", "name": 5, "sha256": 7, "report": 5}\n'),
    (".run/journal.jsonl", b'{"event": "piece", "name": "block-00000", "parts": 5}\n'),
]

_HELLO = {"role": "user", "content": "Hello"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["town"],
        },
    },
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "array", "items": {"$ref": "#/$defs/c"}, "maxItems": 3},
        "d": {"anyOf": [{"type": "string", "pattern": "^x+$"}, {"type": "null"}]},
    },
    "required": ["a"],
    "$defs": {"c": {"enum": ["x", 1, None]}},
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA, "strict": True}}
_SAMPLING: dict[str, Any] = {
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "n": 2,
    "stop": ["x", "yz"],
    "logit_bias": {"5": 1.5},
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logprobs": 2,
    "user": "u",
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "toy", "prompt": "Hello", **_SAMPLING}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "echo": True, "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"prompt": "a", "suffix": "b", "response_format": _FORMAT}),
    ("/v1/chat/completions", {"messages": [_HELLO], **_SAMPLING, "logprobs": True}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"town": "Bern"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            ],
            "tools": [_TOOL],
            "tool_choice": "auto",
            "max_tokens": 3,
        },
    ),
    ("/v1/chat/completions", {"messages": [_HELLO], "tools": [_TOOL], "tool_choice": "required"}),
    ("/v1/chat/completions", {"messages": [_HELLO], "response_format": _FORMAT, "max_tokens": 4}),
    (
        "/v1/chat/completions",
        {"messages": [_HELLO], "stream": True, "stream_options": {"include_usage": True}},
    ),
    (
        "/v1/responses",
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "instructions": "Be brief.",
            "text": {"format": {"type": "json_schema", "name": "s", "schema": _SCHEMA}},
            "tools": [{"type": "function", **_TOOL["function"]}],  # type: ignore[dict-item]
            "max_output_tokens": 4,
            "reasoning": {"effort": "low"},
            "metadata": {"a": "b"},
        },
    ),
    ("/v1/responses", {"input": "Hi", "stream": True, "store": True, "max_output_tokens": 3}),
    ("/tokenize", {"prompt": "Hello", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [_HELLO], "tools": [_TOOL], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
