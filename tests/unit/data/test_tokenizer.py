"""One interface over sentencepiece and Hugging Face tokenizers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bd3_ds.data.characters import CharacterTokenizer
from bd3_ds.data.tokenizer import load_tokenizer, number_tokenizer
from bd3_ds.data.tokenizer_base import Tokenizer
from bd3_ds.runtime.errors import UserError

SHARED = Path(os.environ.get("BD3_SHARED", "../shared")) / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared tokenizers (BD3_SHARED)")
SPECIAL = "[MASK] <mask> <|endoftext|> </s> <pad> [PAD]"
TEXT = "Hello world, it's a test.\n\n  Two  spaces, naïve — 数字.\n"


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_prep.train_tokenizer import train

    words = "the model reads a text and writes another text which the reader of the first one has not seen before"
    lines = [" ".join(words.split()[i % 7 : i % 13 + 5]) + f" number {i}." for i in range(400)]
    file = tmp_path_factory.mktemp("sp") / "small.model"
    file.write_bytes(train(lines, 320))
    return file


@pytest.fixture(params=["sentencepiece", "gpt2", "bert-base-uncased", "numbers", "characters"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_file: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(str(sentencepiece_file))
    if request.param == "numbers":
        return number_tokenizer(16)
    if request.param == "characters":
        # Of any alphabet, so that it takes the text that the others take.
        return CharacterTokenizer("".join(sorted(set(TEXT + SPECIAL))))
    if not SHARED.is_dir():
        pytest.skip("needs the shared tokenizers (BD3_SHARED)")
    return load_tokenizer(str(SHARED / request.param))


def test_saved_is_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    for name in ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id", "mask_id"):
        assert getattr(copy, name) == getattr(tokenizer, name)
    assert copy.encode_batch([TEXT, ""]) == tokenizer.encode_batch([TEXT, ""])


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.mask_id not in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert max(tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) < tokenizer.vocab_size
    ids = tokenizer.encode_batch([TEXT + SPECIAL])[0]
    assert not {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    framed = [tokenizer.bos_id, *ids, tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(framed) == tokenizer.decode(ids)


def test_sentencepiece_keeps_every_character(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_file))
    assert tokenizer.vocab_size == 321 and tokenizer.mask_id == 320 and tokenizer.bos_id == tokenizer.eos_id
    for text in (TEXT, " leading", "\n\n", "a\tb"):
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@needs_shared
def test_gpt2() -> None:
    tokenizer = load_tokenizer(str(SHARED / "gpt2"))
    assert tokenizer.encode_batch(["Hello world"]) == [[15496, 995]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size) == (50256, 50256, 50257, 50258)
    assert tokenizer.decode(tokenizer.encode_batch([TEXT])[0]) == TEXT


@needs_shared
def test_bert() -> None:
    tokenizer = load_tokenizer(str(SHARED / "bert-base-uncased"))
    assert tokenizer.encode_batch(["Hello world"]) == [[7592, 2088]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size) == (101, 102, 103, 30522)


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased"])
def test_same_ids_as_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SHARED / name)
    ours = load_tokenizer(str(SHARED / name))
    texts = [TEXT, "", " x", "don't 123 Ünïcödé\r\n\t", "a" * 300]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]


def test_named_tokens_and_config_objects(tmp_path: Path) -> None:
    number_tokenizer(8).save(tmp_path)
    config = {"bos_token": {"content": "0"}, "eos_token": {"content": "1"}, "mask_token": {"content": "7"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 7)


def test_mask_never_equals_eos(tmp_path: Path) -> None:
    number_tokenizer(8).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "3", "mask_token": "3"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.bos_id == tokenizer.eos_id == 3
    assert tokenizer.mask_id == tokenizer.vocab_size - 1 == 9


@pytest.mark.parametrize("mask", ["3", "5"])
def test_mask_never_equals_padding(tmp_path: Path, mask: str) -> None:
    number_tokenizer(8).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "3", "pad_token": "5", "mask_token": mask})
    )
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (3, 5, 9, 10)
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert (copy.eos_id, copy.pad_id, copy.mask_id, copy.vocab_size) == (3, 5, 9, 10)


def test_mask_never_equals_a_sentencepiece_padding(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the model reads a text and writes another text"] * 20),
        model_prefix=str(tmp_path / "small"),
        vocab_size=24,
        model_type="char",
        pad_id=3,
        pad_piece="<mask>",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(str(tmp_path / "small.model"))
    assert tokenizer.pad_id == 3
    assert tokenizer.mask_id == tokenizer.vocab_size - 1 > 3


def test_text8() -> None:
    tokenizer = load_tokenizer("characters")
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size)
    assert ids == (27, 27, 27, 28, 29)
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    assert tokenizer.encode_batch([alphabet, "", "zed a"]) == [list(range(27)), [], [25, 4, 3, 26, 0]]
    assert tokenizer.decode([27, *range(27), 28, 27]) == alphabet


@pytest.mark.parametrize(
    ("text", "place"), [("anarchism Is", 10), ("naïve", 2), ("数", 0), ("a\nb", 1), ("a\ud800", 1), ("ab`{", 2)]
)
def test_text8_names_a_foreign_character(text: str, place: int) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer("characters").encode_batch(["fine", text])
    assert repr(text[place]) in str(error.value) and f"place {place}" in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"characters": ""}', '{"characters": "aba"}', '{"characters": 3}'])
def test_a_damaged_alphabet_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "characters.json").write_text(content)
    with pytest.raises(UserError, match=r"characters\.json is not a character tokenizer"):
        load_tokenizer(str(tmp_path))


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="not found"):
        load_tokenizer("./no/such/directory")
