"""The kinds of input that are tried: how sound ones are made and changed, and who reads them."""

import json
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

import pvrt
from pvrt.errors import PvrtError
from pvrt.format.folder import MANIFEST_FILE
from pvrt.format.grid import open_checkpoint
from pvrt.hf.declared import check_tensors, read_config_of
from pvrt_server.engine.engine import Engine
from pvrt_server.engine.sampling import SamplingParams
from pvrt_server.opened import open_model
from pvrt_tune.data.source_model import load_skeleton, load_source
from pvrt_tune.settings import EFFORTS, Recipe, TuneJob
from pvrt_tune.settings.files import as_yaml, from_file
from pvrt_tune.store import RUN_FOLDER, Store, choices_of, open_store
from tests.fixtures.gguf_model import write_gguf
from tests.fixtures.toy import toy_model, toy_tokenizer, write_toy, write_toy_grid
from tests.fuzz import mutations as by
from tests.fuzz.corpus import BODIES, FOUND
from tests.fuzz.mutations import Files, Way
from tests.fuzz.trials import Kind, WronglyAccepted
from tests.server.running import Server, post_bytes, scripted_engine, serving

_ANY: list[Way] = [by.cut, by.flipped, by.spliced]
#: Ways to change a file, by the end of its name. Those that come more often stand there more often.
WAYS: dict[str, list[Way]] = {
    ".safetensors": [
        *[by.safetensors_header] * 3,
        by.safetensors_length,
        by.safetensors_values,
        by.cut,
        by.flipped,
    ],
    ".json": [*[by.as_json] * 6, *_ANY],
    ".jsonl": [*[by.as_lines] * 4, *_ANY],
    ".yaml": [*[by.as_yaml] * 6, *_ANY],
    ".jinja": _ANY,
    ".gguf": [*[by.gguf_number] * 5, by.gguf_head, by.gguf_head, by.cut],
}
#: How often a file is chosen among those of its folder, where not once.
OFTEN = {"config.json": 4, "model.safetensors": 3, "tokenizer.json": 2, "tokenizer_config.json": 2}


def contents(folder: Path) -> Files:
    """Every file of a folder, by its path in it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


class Folders:
    """Folders of which one file is changed, or is one of those that were found to do harm."""

    seeds: list[Files]

    def mutant(self, seed: int, folder: Path) -> str:
        """See `Kind`. The first seeds are the corpus."""
        draw = random.Random(seed)
        self.sound = dict(draw.choice(self.seeds))
        found = [each for each in FOUND if each[0] in self.sound]
        if seed < len(found):
            name, content = found[seed]
            files, said = {**self.sound, name: content}, f"{name} of the corpus"
        else:
            names = [n for n in self.sound if Path(n).suffix in WAYS]
            name = draw.choices(names, [OFTEN.get(Path(n).name, 1) for n in names])[0]
            files, said = dict(self.sound), name
            for _ in range(draw.choice([1, 1, 1, 2])):
                way = draw.choice(WAYS[Path(name).suffix])
                try:
                    files[name] = way(files[name], draw)
                except Exception:  # no longer of its format after the first change
                    way = by.flipped
                    files[name] = way(files[name], draw)
                said += f" {way.__name__}"
            if draw.random() < 0.02:
                del files[name]
                said += " lost"
        write(folder, files)
        return said


def tensors_of(files: Mapping[str, bytes]) -> dict[str, Tensor] | None:
    """All tensors by name; None where files cannot be read."""
    tensors: dict[str, Tensor] = {}
    try:
        for name, content in files.items():
            if name.endswith(".safetensors"):
                tensors |= load(content)
    except (SafetensorError, ValueError, KeyError):
        return None
    return tensors


def same(one: Mapping[str, Tensor] | None, two: Mapping[str, Tensor] | None) -> bool:
    """Whether tensors are the same, bit for bit."""
    if one is None or two is None or one.keys() != two.keys():
        return False
    return all(
        a.dtype == two[n].dtype and a.shape == two[n].shape and torch.equal(_bits(a), _bits(two[n]))
        for n, a in one.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Checkpoints(Folders):
    """What pvrt serves: codes with codes at the ends, as published, grids, experts."""

    def __init__(self, place: Path) -> None:
        write_toy(place / "codes", "qwen2", embeddings="2x8g8")
        write_toy(place / "experts", "mixtral")
        write_toy(place / "published", "llama", published=True)
        write_toy_grid(place / "grid", "qwen3", "w4g32")
        self.seeds = [contents(folder) for folder in sorted(place.iterdir())]

    def read(self, folder: Path) -> None:
        """See `Kind`: `inspect --verify`, `pvrt.load`, and the engine, which answers."""
        refused = _refusal(lambda: _verify(folder))
        loaded = _refusal(lambda: _load(folder))
        served = _refusal(lambda: _answer(folder))
        manifest = MANIFEST_FILE in self.sound
        if refused is None and manifest and not same(tensors_of(contents(folder)), self.tensors):
            raise WronglyAccepted("--verify passes tensors that were not written")
        by_hash = refused is not None and MANIFEST_FILE in str(refused)
        if refused is not None and not by_hash and loaded is None:
            raise WronglyAccepted(f"load passes what --verify refuses: {refused}")
        if first := refused or loaded or served:
            raise first

    @property
    def tensors(self) -> dict[str, Tensor] | None:
        """Those of the sound folder."""
        return tensors_of(self.sound)


def _refusal(door: Callable[[], None]) -> PvrtError | None:
    try:
        door()
    except PvrtError as error:
        return error
    return None


def _verify(folder: Path) -> None:
    opened = open_checkpoint(folder)
    check_tensors(opened, read_config_of(opened))
    opened.verify()


def _load(folder: Path) -> None:
    model = pvrt.load(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    if logits.shape[-1] != model.config.get_text_config().vocab_size:
        raise WronglyAccepted(f"logits of shape {list(logits.shape)}")


def _answer(folder: Path) -> None:
    open_model(folder)
    with Engine.load(folder) as engine:
        ids = engine.codec.encode("ab")
        for event in engine.generate(ids, SamplingParams(max_tokens=2, temperature=0)):
            engine.codec.decode([event.token_id] if hasattr(event, "token_id") else [])
        engine.codec.encode_chat([{"role": "user", "content": "a"}])


class Sources(Folders):
    """What pvrt compresses: dense models in one file and in several."""

    def __init__(self, place: Path) -> None:
        for name, architecture, shard in (("one", "llama", "1GB"), ("several", "qwen2", "200KB")):
            toy_model(architecture).save_pretrained(place / name, max_shard_size=shard)
            toy_tokenizer().save_pretrained(place / name)
        self.seeds = [contents(folder) for folder in sorted(place.iterdir())]

    def read(self, folder: Path) -> None:
        """See `Kind`: a plan's skeleton, then tuning's source, a block of which is read."""
        load_skeleton(str(folder))
        _read_source(str(folder))


def _read_source(name: str) -> None:
    source = load_source(name)
    source.tokenizer("a b").input_ids  # noqa: B018 (that it can)
    source.dense()


class Ggufs(Folders):
    """The same as a GGUF file."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True)
        self.seeds = [{"model.gguf": write_gguf(place / "model.gguf").read_bytes()}]

    def read(self, folder: Path) -> None:
        """See `Kind`."""
        for file in folder.glob("*.gguf"):
            load_skeleton(str(file))
            _read_source(str(file))


class Recipes(Folders):
    """Files for --config, in the spelling of today and of version 0.1."""

    def __init__(self, place: Path) -> None:
        self.seeds = [{"recipe.yaml": as_yaml(recipe).encode()} for recipe in EFFORTS.values()]
        self.seeds.append({"recipe.yaml": b"scheme: 1x8g8\npv: {steps: 8, pv: {fraction: 0.5}}\n"})

    def read(self, folder: Path) -> None:
        """See `Kind`. What is accepted must be the same after it was written."""
        for file in folder.glob("*.yaml"):
            recipe = from_file(file, EFFORTS["quick"], _silent)
            file.write_text(as_yaml(recipe))
            if from_file(file, Recipe(), _silent) != recipe:
                raise WronglyAccepted("it is another recipe once it is written")


def _silent(line: str) -> None:
    pass


PIECES = {
    f"block-0000{i}": {"codes": torch.arange(64) + i, "scales": torch.ones(4)} for i in (0, 1)
}
REPORT: dict[str, Any] = {"errors": {"q_proj": 0.25}, "scheme": "2x8g8"}
FINGERPRINT = {"model": "ab" * 32, "data": "sampled", "recipe": EFFORTS["standard"].record()}
VERSIONS = {"pvrt": "1", "torch": "2"}


class Runs(Folders):
    """Folders of runs at work: journal, fingerprint, recipe and pieces."""

    def __init__(self, place: Path) -> None:
        store = self._open(place)
        store.put("config.yaml", as_yaml(Recipe()).encode())
        for name, tensors in PIECES.items():
            store.save(name, tensors, REPORT)
        self.events = store.events
        self.seeds = [{k: v for k, v in contents(place).items() if not k.endswith("lock")}]

    def _open(self, folder: Path) -> Store:
        return open_store(TuneJob("m", folder, Recipe()), FINGERPRINT, VERSIONS, _silent)

    def read(self, folder: Path) -> None:
        """See `Kind`. Pieces are as they were saved, or are made again."""
        if (folder / RUN_FOLDER).is_dir():
            choices_of(folder)
        store = self._open(folder)
        for name, tensors in PIECES.items():
            store.names("block")
            piece = store.load(name)
            if piece is not None and not (same(piece.tensors, tensors) and piece.report == REPORT):
                raise WronglyAccepted(f"{name} is not what was saved")
        store.save("block-00000", PIECES["block-00000"], REPORT)
        again = self._open(folder).load("block-00000")
        if again is None or not same(again.tensors, PIECES["block-00000"]):
            raise WronglyAccepted("what is saved after it is not found")


class Requests:
    """Bodies and bytes that are sent to the embedded engine's server."""

    def __init__(self, place: Path) -> None:
        write_toy(place)
        self._folder, self._open = place, ExitStack()
        self._server: Server | None = None
        self._body, self._path = b"", "/"

    def mutant(self, seed: int, folder: Path) -> str:
        """See `Kind`."""
        draw = random.Random(seed)
        self._path, body = draw.choice(BODIES)
        self._body = json.dumps(body).encode()
        self._raw = draw.random() < 0.2
        if self._raw:
            way = draw.choice(_ANY)
            self._body = way(post_bytes(self._path, self._body), draw)
            return f"{self._path} {way.__name__}"
        said = self._path
        for _ in range(draw.choice([1, 1, 2])):
            way = draw.choice(WAYS[".json"])
            try:
                self._body = way(self._body, draw)
            except Exception:
                self._body = by.flipped(self._body, draw)
            said += f" {way.__name__}"
        return f"{said} {self._body[:300]!r}"

    def read(self, folder: Path) -> None:
        """See `Kind`: an answer of 2xx or a refusal of 4xx with a sentence; the server lives."""
        server = self._serve()
        if self._raw:
            self._send(server)
            if server.get("/health").status_code != 200:
                raise WronglyAccepted("the server is not well afterwards")
            return
        header = {"Content-Type": "application/json"}
        answer = httpx.post(
            f"{server.url}{self._path}", content=self._body, headers=header, timeout=50
        )
        if answer.status_code >= 500:
            raise AssertionError(answer.text)
        if answer.status_code >= 400:
            raise PvrtError(answer.json()["error"]["message"].replace("\n", " "))

    def _serve(self) -> Server:
        if self._server is None:  # in the process that tries mutants
            engine, _ = scripted_engine(self._folder, '{"a": 1} one two')
            self._server = self._open.enter_context(serving(engine, request_seconds=1))
        return self._server

    def _send(self, server: Server) -> None:
        with server.connect() as connection:
            received = b""
            try:
                connection.sendall(self._body)
                connection.shutdown(1)
                while piece := connection.recv(65536):
                    received += piece
            except ConnectionError:
                return
        if received and received.split()[1].startswith(b"5"):
            raise AssertionError(received[:2000])


KINDS: dict[str, type[Kind]] = {
    "checkpoints": Checkpoints,
    "sources": Sources,
    "gguf": Ggufs,
    "recipes": Recipes,
    "runs": Runs,
    "requests": Requests,
}
