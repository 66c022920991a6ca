"""The responses that vLLM keeps for previous_response_id: the newest, for vLLM forgets none."""

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from pvrt_server.api.response_requests import MOST_RESPONSES

#: vLLM keeps responses only where this is 1.
STORE_VARIABLE = "VLLM_ENABLE_RESPONSES_API_STORE"
#: Dictionaries by a response's name, in vLLM's object for /v1/responses.
STORES = ("response_store", "msg_store", "event_store")


class ResponseStores:
    """ASGI middleware that keeps these dictionaries as small as the embedded engine's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self._app(scope, receive, send)
        if scope["type"] == "http" and scope.get("path") == "/v1/responses":
            state = getattr(scope.get("app"), "state", None)
            forget(getattr(state, "openai_serving_responses", None))


def forget(serving: Any) -> None:
    """Drop the oldest of what vLLM's object keeps."""
    for name in STORES:
        kept: dict[str, Any] = getattr(serving, name, {})
        for oldest in list(kept)[: max(0, len(kept) - MOST_RESPONSES)]:
            del kept[oldest]
