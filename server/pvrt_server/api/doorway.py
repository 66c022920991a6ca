"""What stands before everything else on both engines: other origins, HEAD, trailing slashes."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


def doorway(app: ASGIApp, allowed_origins: Sequence[str]) -> ASGIApp:
    """An application whose paths may end in a slash, that answers HEAD wherever it answers GET, and
    that pages of some origins may call ("*" for all, none without any)."""
    app = _Paths(app)
    if not allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


class _Paths:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. The server leaves the body of an answer to HEAD out."""
        if scope["type"] == "http":
            path = scope["path"].rstrip("/") or "/"
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": scope["raw_path"].rstrip(b"/")}
            scope = {**scope, "method": method}
        await self._app(scope, receive, send)
