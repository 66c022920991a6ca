"""npm's openai and Vercel's ai, each a process of node that answers lines of JSON (client.mjs).

The packages are those of the tests: `npm install` in tests/server/api/node.
"""

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from clients.client import Answer, Client, Where

NODE = Path(__file__).parents[2] / "tests" / "server" / "api" / "node"


class NodeError(Exception):
    """What a client in node threw."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status_code = status


class Node(Client):
    """A client of node by its package's name."""

    distribution = ""

    def __init__(self, where: Where) -> None:
        super().__init__(where)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [
                shutil.which("node") or "node",
                "client.mjs",
                self.distribution,
                *vars(where).values(),
            ],
            cwd=NODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _do(self, action: str, given: Any = None, options: dict[str, Any] | None = None) -> Any:
        line = json.dumps({"action": action, "given": given, "options": options or {}})
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            said = json.loads(self._process.stdout.readline())
        if "error" in said:
            raise NodeError(said["error"], said.get("status"))
        return said["value"]

    def _answers(self, action: str, given: Any, options: dict[str, Any]) -> list[Answer]:
        return [Answer(**found) for found in self._do(action, given, options)]

    def version(self) -> str:
        """See Client."""
        package = NODE / "node_modules" / self.distribution / "package.json"
        return str(json.loads(package.read_text(encoding="utf-8"))["version"])

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._answers("chat", messages, options)

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._answers("chat", messages, {**options, "stream": True})

    def complete(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._answers("complete", prompt, options)

    def complete_stream(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._answers("complete", prompt, {**options, "stream": True})

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._answers("respond", given, options)

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._answers("respond", given, {**options, "stream": True})

    def structured(self, api: str) -> Any:
        """See Client: a schema of Zod."""
        return self._do("structured", api)

    def batch(self, questions: list[str]) -> int:
        """See Client: promises at once."""
        return len(self._do("batch", questions))

    def leave(self) -> None:
        """See Client: by an AbortController."""
        self._do("leave")

    def close(self) -> None:
        """See Client."""
        self._process.communicate()


class NodeOpenAI(Node):
    """npm's openai. Beyond OpenAI's own options its bodies take any."""

    distribution = "openai"

    def models(self) -> list[str]:
        """See Client."""
        names: list[str] = self._do("models")
        return names


class VercelAI(Node):
    """Vercel's ai with @ai-sdk/openai."""

    distribution = "ai"
    lacks = frozenset(
        {
            "completion: echo with logprobs",  # its schema has no null for the first token
            "completion: token ids",
            "completion: several prompts",
            "completion: n",
            "completion: top_p, top_k, min_p",
            "chat: n",
            "chat: json_object",
            "chat: top_p, top_k",
        }
    )

    def agent(self, api: str, stream: bool) -> str:
        """See Client: a tool that the first step must call."""
        return str(self._do("agent", api, {"stream": stream}))
