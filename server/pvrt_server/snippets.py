"""What to paste after the start: curl, the openai client, Open WebUI."""

import json
import shlex


def snippets(url: str, model: str, *, keyed: bool, chat: bool) -> str:
    """Calls of the server at `url` (http://host:port), ready to paste into a shell or Python.

    keyed: the server wants a key, which is not shown. chat: the model has a chat template.
    """
    key = "YOUR_KEY" if keyed else "none"
    header = f' -H "Authorization: Bearer {key}"' if keyed else ""
    path, asked = "completions", '"prompt": "Hello"'
    call, text = 'completions.create(model={}, prompt="Hello")', "text"
    if chat:
        path, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
        call = 'chat.completions.create(\n    model={}, messages=[{{"role": "user", "content": '
        call += '"Hello"}}]\n)'
        text = "message.content"
    body = f'{{"model": {json.dumps(model)}, {asked}}}'
    return f"""
# curl
curl {url}/v1/{path} -H "Content-Type: application/json"{header} \\
  -d {shlex.quote(body)}

# Python (pip install openai)
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.{call.format(repr(model))}
print(answer.choices[0].{text})

# Open WebUI (pip install open-webui), then http://127.0.0.1:3000
ENABLE_OLLAMA_API=false OPENAI_API_BASE_URL={url}/v1 OPENAI_API_KEY={key} \\
  open-webui serve --port 3000
"""
