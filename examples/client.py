"""Ask a running `pvrt serve`: `python examples/client.py [URL]`.

First with OpenAI's own client, streamed; then with LangChain, which fills a form: the answer is
JSON of a schema, whatever the model would like to write.
"""

import argparse

from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """A form for an answer. Its bounds keep a small model from writing on and on."""

    name: str = Field(max_length=24)
    country: str = Field(max_length=24)


def main() -> None:
    """Print two answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="what `pvrt serve --api-key` was given")
    asked = parser.parse_args()

    client = OpenAI(base_url=asked.url, api_key=asked.key)
    model = client.models.list().data[0].id
    print(f"{model}: ", end="")
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    for piece in answer:
        if piece.choices:
            print(piece.choices[0].delta.content or "", end="", flush=True)
    print()

    chat = ChatOpenAI(
        base_url=asked.url, api_key=lambda: asked.key, model=model, temperature=0, max_tokens=256
    )
    form = chat.with_structured_output(City, method="json_schema")
    print(repr(form.invoke("Name the capital of France.")))


if __name__ == "__main__":
    main()
