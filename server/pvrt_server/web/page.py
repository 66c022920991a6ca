"""The page at / on both engines, and the figures of the model and the machine that it shows."""

import asyncio
import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pvrt.kv_cache import cache_shape
from pvrt.version import __version__
from pvrt_server.opened import OpenedModel

_FILE = Path(__file__).with_name("page.html")
STATUS_PATH = "/pvrt/status"


class Page:
    """ASGI middleware that answers GET / with the page and GET /pvrt/status with JSON.

    card is what `model_card` gives.
    """

    def __init__(self, app: ASGIApp, card: dict[str, Any]) -> None:
        self._app = app
        self._card = card

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            if scope["path"] == "/":
                await page_response()(scope, receive, send)
                return
            if scope["path"] == STATUS_PATH:
                memory = await asyncio.to_thread(memory_in_use)
                body = {"model": self._card, "memory": memory, "pvrt": __version__}
                await JSONResponse(body)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def model_card(opened: OpenedModel) -> dict[str, Any]:
    """What a folder says of its model: architecture, scheme, bits, size, origin. Plain JSON."""
    stored, config = opened.stored, opened.stored.config
    text = opened.config.get_text_config()
    card: dict[str, Any] = {
        "name": opened.path.name,
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "context": cache_shape(text).longest,
        "layers": getattr(text, "num_hidden_layers", None),
        "chat": opened.chats,
    }
    if stored.layers:
        card["scheme"] = stored.scheme_names
        card["bits_per_weight"] = stored.linear_bits_per_weight()
        card["file_bytes"] = stored.file_bytes()
    return card | _origin(opened.path / "pvrt.json")


def memory_in_use() -> dict[str, int | None]:
    """Resident bytes of this process and its children, and bytes in use on the first GPU."""
    resident = 0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            resident += process.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return {"resident_bytes": resident, "gpu_bytes": _gpu_bytes()}


def _gpu_bytes() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return int(torch.cuda.device_memory_used(0))  # by NVML: no context on the GPU
    except (RuntimeError, ImportError):
        return None


def _origin(manifest: Path) -> dict[str, Any]:
    """What pvrt.json, where there is one, says of the original model and of measured quality."""
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict):
        return {}
    found: dict[str, Any] = {}
    base = said.get("base_model")
    if isinstance(base, dict) and isinstance(base.get("name"), str):
        found["base_model"] = base["name"]
    return found


@cache
def page_response() -> Response:
    """The page, with a policy that lets it load nothing but itself and talk to nobody but us."""
    html = re.sub(
        r"/\* (\w+\.js) \*/",
        lambda name: _FILE.with_name(name[1]).read_text(encoding="utf-8"),
        _FILE.read_text(encoding="utf-8"),
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(html, 'script')}",
            f"style-src {_hashes(html, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(html, media_type="text/html", headers=headers)


def _hashes(html: str, tag: str) -> str:
    """The sources that a policy allows: the digest of every inline element of this kind."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
