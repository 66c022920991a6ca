"""OpenAI-compatible serving of pvrt checkpoints: `pvrt serve FOLDER`.

`launch.serve` is the command: vLLM with our plugin where it is installed, otherwise `app` (the same
protocol) over `engine` (one machine, no dependency beyond transformers). The engine is usable
without HTTP: `Engine.load(folder).generate(prompt_ids, SamplingParams(max_tokens=16))`.
"""
