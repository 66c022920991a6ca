import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pvrt_server.engine.grammar import GrammarCompiler
from pvrt_server.engine.loading import load_codec
from pvrt_server.engine.text import StopFilter, TextCodec
from pvrt_server.errors import RequestError
from tests.fixtures.toy import toy_tokenizer, write_toy

TEXTS = [
    "plain words",
    "Grüße, naïve façade",
    "数据库里的字" * 20,
    "😀👩‍👩‍👧‍👦 family" * 8,
    "mixed é数😀 a" * 10,
]


@pytest.fixture(scope="module")
def byte_level() -> TextCodec:
    return TextCodec(toy_tokenizer())


@pytest.fixture(scope="module")
def byte_fallback() -> TextCodec:
    """A sentencepiece-like tokenizer that knows few words and writes the rest as bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def stream_text(codec: TextCodec, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = codec.stream(prompt or [])
    return [stream.push(token) for token in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_text_and_never_hold_half_a_character(
    byte_level: TextCodec, text: str
) -> None:
    pieces = stream_text(byte_level, byte_level.encode(text))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback_tokens_stream_as_whole_characters(
    byte_fallback: TextCodec, text: str
) -> None:
    pieces = stream_text(byte_fallback, byte_fallback.encode(text.replace(" ", "▁")))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_the_first_word_keeps_its_space_behind_a_prompt(byte_fallback: TextCodec) -> None:
    assert stream_text(byte_fallback, byte_fallback.encode("▁a")) == ["a"]
    prompt = byte_fallback.encode("▁a▁a")
    assert stream_text(byte_fallback, byte_fallback.encode("▁a"), prompt) == [" a"]


def test_random_bytes_stream_as_they_decode(byte_level: TextCodec) -> None:
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(256) for _ in range(60)]
        streamed = "".join(stream_text(byte_level, ids))
        whole = byte_level.decode(ids)
        assert whole.rstrip("�") == streamed.rstrip("�")


def test_a_run_of_broken_bytes_does_not_wait_for_ever(byte_level: TextCodec) -> None:
    broken = byte_level.encode("é")[:1]
    pieces = stream_text(byte_level, broken * 40)
    assert len("".join(pieces)) > 20


def test_a_character_begun_in_the_prompt_is_finished(byte_level: TextCodec) -> None:
    ids = byte_level.encode("x😀")
    assert stream_text(byte_level, ids[3:], prompt=ids[:3]) == ["", "😀"]


def test_special_tokens_and_unused_ids_have_no_text(byte_level: TextCodec) -> None:
    assert stream_text(byte_level, [257, 300, 383]) == ["", "", ""]
    assert byte_level.token_text(257) == "<|end|>"
    assert byte_level.token_bytes(300) == b""


def test_tokens_know_their_bytes(byte_level: TextCodec, byte_fallback: TextCodec) -> None:
    for codec in (byte_level, byte_fallback):
        raw = b"".join(codec.token_bytes(token) for token in codec.encode("é▁a😀"))
        assert raw.decode().replace("▁", " ") == "é a😀"


def test_a_text_beyond_the_bound_is_refused_before_it_is_tokenized() -> None:
    codec = TextCodec(toy_tokenizer())
    codec.bound(10)  # the longest token is <|assistant|>
    assert len(codec.encode("x" * 130)) == 130
    with pytest.raises(RequestError, match="131 characters") as caught:
        codec.encode("x" * 131)
    assert caught.value.code == "context_length_exceeded"


def test_a_template_that_refuses_is_the_clients_error() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        TextCodec(tokenizer).encode_chat([{"role": "user", "content": "x"}])


def test_a_request_cannot_bring_its_own_template(byte_level: TextCodec) -> None:
    with pytest.raises(RequestError, match="chat_template_kwargs must not set chat_template"):
        byte_level.encode_chat([], template_kwargs={"chat_template": "{{ 1 }}"})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_are_found_across_pieces(size: int) -> None:
    text = "alpha beta END gamma"
    stops = StopFilter(["END", "gamma"])
    shown = ""
    for start in range(0, len(text), size):
        piece, stopped = stops.push(text[start : start + size])
        shown += piece
        if stopped:
            break
    assert stopped
    assert shown == "alpha beta "


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    stops = StopFilter(["<end>"])
    assert stops.push("a<en") == ("a", False)
    assert stops.push("x<e") == ("<enx", False)
    assert stops.flush() == "<e"


def test_a_false_start_inside_a_stop_string_does_not_hide_it() -> None:
    stops = StopFilter(["aab"])
    assert [stops.push(char) for char in "aaab"] == [
        ("", False),
        ("", False),
        ("a", False),
        ("", True),
    ]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A <|end|>", "$A <|end|>"])
def test_prompts_begin_as_texts_do_and_are_never_ended(template: str) -> None:
    tokenizer = toy_tokenizer()
    specials = [("<s>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=specials
    )
    codec, plain = TextCodec(tokenizer), tokenizer("ab", add_special_tokens=False).input_ids
    start = [tokenizer.bos_token_id] if "<s>" in template else []
    assert codec.encode("ab") == [*start, *plain]
    assert codec.encode("") == start
    assert codec.encode("ab", special=False) == plain


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_mistrals_tokenizer_file_serves_chats_and_grammars(tmp_path: Path, both: bool) -> None:
    mistral_common = pytest.importorskip("mistral_common", reason="vLLM brings mistral-common")
    data = Path(mistral_common.__file__).with_name("data")
    write_toy(tmp_path / "toy", "mistral")
    folder = tmp_path / "mistral"
    folder.mkdir()
    shutil.copy(tmp_path / "toy" / "config.json", folder)
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    if both:
        tokenizer = load_codec(folder).tokenizer
        tokenizer.chat_template = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
        tokenizer.save_pretrained(folder)
    codec = load_codec(folder)
    ids = codec.encode_chat([{"role": "user", "content": "Hello é"}])
    begin, end = codec.tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])
    assert begin in ids and ids[-1] == end
    assert codec.decode(codec.encode("Hello é😀")) == "Hello é😀"
    compiler = GrammarCompiler(
        codec.tokenizer, len(codec.tokenizer), frozenset({codec.eos_id or 2})
    )
    assert compiler.json_schema({"type": "object"}, "response_format")() is not None
