"""One change at random to a sound file, aware of its format. A seed gives the same change again."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import yaml

#: A folder, as the bytes of its files by name.
Files = dict[str, bytes]
#: Changes the bytes of one file.
Way = Callable[[bytes, random.Random], bytes]

VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 5, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf")),
    *("", "x", "nosuch", "\ud800x", "../x", "/dev/zero", "a\nb", "\0", [], {}, [1, 2], {"a": 1}),
    *([[]], ["model"], [None], [[[1]]] * 3, "float16", "float64", "bfloat16", 3, 127, 129, 256),
]
NUMBERS = [0, 1, 2, 7, 31, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value that has parts, one of them changed, left out, moved or wrapped."""
    found = list(places(value)) if isinstance(value, dict | list) else []
    if not found or draw.random() < 0.02:
        return draw.choice(VALUES)
    container, key = draw.choice(found)
    way = draw.randrange(6)
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[draw.choice(list(container))] = container[key]
    elif way == 2:
        deep = container[key]
        for _ in range(draw.choice([1, 2, 50, 400])):
            deep = [deep] if draw.random() < 0.5 else {"a": deep}
        container[key] = deep
    elif way == 3 and isinstance(container[key], int | float):
        container[key] = draw.choice([container[key] + 1, -container[key], container[key] * 2])
    else:
        container[key] = draw.choice(VALUES)
    return value


def as_json(data: bytes, draw: random.Random) -> bytes:
    """JSON with one of its values changed."""
    return json.dumps(changed(json.loads(data), draw)).encode()


def as_yaml(data: bytes, draw: random.Random) -> bytes:
    """YAML with one of its values changed."""
    return yaml.safe_dump(changed(yaml.safe_load(data), draw)).encode()


def as_lines(data: bytes, draw: random.Random) -> bytes:
    """Lines of JSON with one changed, lost, doubled, or put elsewhere."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    way = draw.randrange(4)
    if way == 0:
        lines[at] = as_json(lines[at], draw) + b"\n"
    elif way == 1:
        del lines[at]
    elif way == 2:
        lines.insert(draw.randrange(len(lines)), lines[at])
    else:
        draw.shuffle(lines)
    return b"".join(lines)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The beginning of a file."""
    return data[: draw.randrange(len(data) + 1)]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One to three bits flipped."""
    after = bytearray(data)
    for _ in range(draw.randrange(1, 4) if after else 0):
        after[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(after)


TOKENS = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xff\xfe",
    b"\0",
    b"nan",
    b"1e999",
    b"- - - -",
    b"&a [*a]",
]
TOKENS += [b"9" * 5000, b"\xef\xbb\xbf", b"\r", b"{{", b"{% for x in range(9) %}", b"!!python/x 1"]


def spliced(data: bytes, draw: random.Random) -> bytes:
    """What readers dislike, put in; or a piece taken out, doubled, or zeroed."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice([0, 1, 8, 64]))
    piece = data[start:end]
    middle = draw.choice([draw.choice(TOKENS), b"", piece * 2, bytes(len(piece))])
    return data[:start] + middle + data[end:]


def safetensors_header(data: bytes, draw: random.Random) -> bytes:
    """safetensors with one value of its header changed."""
    (length,) = struct.unpack("<Q", data[:8])
    header = as_json(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def safetensors_length(data: bytes, draw: random.Random) -> bytes:
    """safetensors whose header is said to be of another length."""
    return struct.pack("<Q", draw.choice(NUMBERS) % 2**64) + data[8:]


def safetensors_values(data: bytes, draw: random.Random) -> bytes:
    """safetensors with four bytes of its tensors set to what is no number, or is large."""
    after = bytearray(data)
    place = draw.randrange(len(data) // 2, len(data) - 4) // 4 * 4
    number = draw.choice([float("nan"), float("inf"), -3e38, 0.0])
    after[place : place + 4] = struct.pack("<f", number)
    return bytes(after)


_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_GGUF_SCALARS[12] = "d"


def gguf_fields(data: bytes) -> Iterator[tuple[int, str]]:
    """(offset, struct format) of every number of a GGUF header: counts, lengths, types, values."""
    yield 4, "I"
    yield 8, "Q"
    yield 16, "Q"
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    at = 24

    def text(at: int) -> int:
        length: int = struct.unpack_from("<Q", data, at)[0]
        return at + 8 + length

    def value(at: int, kind: int) -> Iterator[tuple[int, str]]:
        """The last one is where what follows begins, with no format."""
        if at > len(data):
            raise ValueError("no longer a GGUF header")
        if kind == 8:
            yield at, "Q"
            yield text(at), ""
        elif kind == 9:
            of, count = struct.unpack_from("<IQ", data, at)
            yield at, "I"
            yield at + 4, "Q"
            at += 12
            for index in range(count):
                *inside, (at, _) = value(at, of)
                if index < 2:
                    yield from inside
            yield at, ""
        else:
            yield at, _GGUF_SCALARS[kind]
            yield at + struct.calcsize(_GGUF_SCALARS[kind]), ""

    for _ in range(pairs):
        yield at, "Q"
        at = text(at)
        yield at, "I"
        (kind,) = struct.unpack_from("<I", data, at)
        *inside, (at, _) = value(at + 4, kind)
        yield from inside
    for _ in range(tensors):
        yield at, "Q"
        at = text(at)
        yield at, "I"
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > len(data):
            raise ValueError("no longer a GGUF header")
        for index in range(dimensions):
            yield at + 4 + 8 * index, "Q"
        at += 4 + 8 * dimensions
        yield at, "I"
        yield at + 4, "Q"
        at += 12


def gguf_number(data: bytes, draw: random.Random) -> bytes:
    """GGUF with one number of its header changed."""
    at, form = draw.choice(list(gguf_fields(data)))
    after = bytearray(data)
    if form in "fd":
        struct.pack_into(f"<{form}", after, at, draw.choice([float("nan"), float("inf"), 0, -1, 9]))
    else:
        size = struct.calcsize(form)
        number = draw.choice([*NUMBERS, *range(40), after[at] + 1, max(0, after[at] - 1)])
        after[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(after)


def gguf_head(data: bytes, draw: random.Random) -> bytes:
    """GGUF changed somewhere in its header, where few bytes would be met by chance."""
    end = max(at for at, _ in gguf_fields(data))
    return draw.choice([flipped, spliced])(data[:end], draw) + data[end:]
