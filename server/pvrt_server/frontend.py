"""What pvrt puts before vLLM's own application: the API key on all routes, and the page.

vLLM takes the class by name (--middleware) and gives it nothing but the application, so the rest
comes through the environment.
"""

import os
from pathlib import Path

from starlette.types import ASGIApp

from pvrt_server.gate import MAX_BODY_BYTES, Gate
from pvrt_server.page import Page

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own, so that its check and ours agree
FOLDER_VARIABLE = "PVRT_SERVED_FOLDER"


class Frontend(Gate):
    """ASGI middleware for vLLM's server. vLLM alone guards /v1 and leaves the rest open."""

    def __init__(self, app: ASGIApp) -> None:
        page = Page(app, Path(os.environ[FOLDER_VARIABLE]))
        key = os.environ.get(KEY_VARIABLE) or None
        super().__init__(page, api_key=key, max_body_bytes=MAX_BODY_BYTES)
