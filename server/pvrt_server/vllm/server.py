"""vLLM's own server, and a deadline for the headers of its requests, which vLLM has not.

    python -m pvrt_server.vllm.server FLAGS OF VLLM

As a module, because the `vllm` script of the CPU package does not start.
"""

import runpy

import uvicorn.config

from pvrt_server.api.connection import protocol
from pvrt_server.vllm.middleware import bounds


def main() -> None:
    """Run vLLM's server as `python -m` does."""
    # uvicorn takes a class in the place of its name.
    protocols: dict[str, object] = uvicorn.config.HTTP_PROTOCOLS  # type: ignore[assignment]
    protocols["auto"] = protocol(bounds().request_seconds)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":  # vLLM's other processes import this module again
    main()
