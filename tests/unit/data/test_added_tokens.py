"""Tokens that were added to a tokenizer count, whatever file lists them; [MASK] is never written over one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bd3_ds.data.tokenizer import load_tokenizer
from bd3_ds.interop.tokenizer import write_auto_tokenizer
from bd3_ds.runtime.errors import UserError

TEXT = "the model reads <gene> and writes<gene> a text"
ROLES = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
SIZE = 301


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """GPT-2's form, vocab.json and merges.txt, of 301 tokens, the last of them the end."""
    backend: Any = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 1, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(["the model reads a text and writes another text " * 9] * 9, trainer)
    folder = tmp_path / "slow"
    folder.mkdir()
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert len(vocabulary) < SIZE
    for extra in range(len(vocabulary), SIZE - 1):
        vocabulary[f"unused{extra}"] = extra
    vocabulary["<|endoftext|>"] = SIZE - 1
    write(folder, "vocab", vocabulary)
    write(folder, "tokenizer_config", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **ROLES})
    return folder


def write(folder: Path, name: str, value: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(value))


def entry(content: str, special: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": special, "normalized": not special, **flags}


def in_a_file(folder: Path) -> None:
    write(folder, "added_tokens", {"<gene>": SIZE, "[PAD]": SIZE + 1})
    write(folder, "special_tokens_map", {**ROLES, "pad_token": "[PAD]"})


def in_the_configuration(folder: Path) -> None:
    decoder = {str(SIZE): entry("<gene>", False), str(SIZE + 1): entry("[PAD]", True)}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "pad_token": "[PAD]", **ROLES}
    write(folder, "tokenizer_config", {**config, "added_tokens_decoder": decoder})


def in_both(folder: Path) -> None:
    in_the_configuration(folder)
    in_a_file(folder)


@pytest.mark.parametrize("added", [in_a_file, in_the_configuration, in_both])
def test_added_tokens_count(slow: Path, added: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = load_tokenizer(str(slow))
    assert (before.vocab_size, before.mask_id, before.pad_id) == (SIZE + 1, SIZE, SIZE - 1)
    added(slow)
    ours = load_tokenizer(str(slow))
    assert (ours.vocab_size, ours.mask_id, ours.pad_id, ours.eos_id) == (SIZE + 3, SIZE + 2, SIZE + 1, SIZE - 1)
    ids = ours.encode_batch([TEXT])[0]
    assert ids.count(SIZE) == 2 and ours.decode(ids) == TEXT and ours.fingerprint != before.fingerprint
    assert ids == AutoTokenizer.from_pretrained(slow)(TEXT, add_special_tokens=False)["input_ids"]
    forged = ours.encode_batch(["[PAD] <|endoftext|> [MASK]"])[0]  # special tokens are text where a text has them
    assert not {ours.pad_id, ours.eos_id, ours.mask_id} & set(forged)
    # What a pack and an export keep, and what our Hugging Face folder has.
    ours.save(tmp_path / "saved")
    copy = load_tokenizer(str(tmp_path / "saved"))
    assert copy.fingerprint == ours.fingerprint and copy.vocab_size == ours.vocab_size
    (tmp_path / "auto").mkdir()
    assert write_auto_tokenizer(tmp_path / "saved", tmp_path / "auto") is None
    theirs = AutoTokenizer.from_pretrained(tmp_path / "auto")
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids and theirs.mask_token_id == ours.mask_id


def test_roles_that_the_vocabulary_lacks_are_added_as_transformers_adds_them(slow: Path) -> None:
    from transformers import AutoTokenizer

    write(slow, "special_tokens_map", {**ROLES, "additional_special_tokens": ["<x>"], "pad_token": "[PAD]"})
    ours, theirs = load_tokenizer(str(slow)), AutoTokenizer.from_pretrained(slow)
    assert (ours.pad_id, ours.mask_id) == (SIZE, SIZE + 2)
    assert (theirs.convert_tokens_to_ids("[PAD]"), theirs.convert_tokens_to_ids("<x>")) == (SIZE, SIZE + 1)


def test_a_named_mask_is_the_id_that_it_always_was(slow: Path) -> None:
    before = load_tokenizer(str(slow))
    write(slow, "special_tokens_map", {**ROLES, "mask_token": "[MASK]"})
    now = load_tokenizer(str(slow))
    assert (now.mask_id, now.vocab_size, now.fingerprint) == (SIZE, SIZE + 1, before.fingerprint)


def test_tokens_beside_a_tokenizer_json(slow: Path, tmp_path: Path) -> None:
    load_tokenizer(str(slow)).save(tmp_path / "fast")
    (tmp_path / "fast" / "added_tokens.json").write_text(json.dumps({"<gene>": SIZE}))
    ours = load_tokenizer(str(tmp_path / "fast"))
    assert (ours.vocab_size, ours.mask_id) == (SIZE + 2, SIZE + 1) and SIZE in ours.encode_batch([TEXT])[0]


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ({"<gene>": SIZE + 5}, rf"'<gene>' is to have the id {SIZE + 5}, but its place is {SIZE}"),
        ({"<gene>": 5}, "'<gene>' is to have the id 5, which is that of"),
        ({"<gene>": "x"}, "added_tokens.json is damaged"),
        ([], "added_tokens.json is damaged"),
    ],
)
def test_ids_that_cannot_be(slow: Path, tokens: Any, sentence: str) -> None:
    write(slow, "added_tokens", tokens)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(str(slow))


def test_files_that_contradict_one_another(slow: Path) -> None:
    in_the_configuration(slow)
    write(slow, "added_tokens", {"<gene>": SIZE + 1})
    with pytest.raises(UserError, match=rf"'<gene>' has the id {SIZE + 1} in added_tokens.json and {SIZE} in"):
        load_tokenizer(str(slow))


def test_wordpiece(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "reads"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    write(tmp_path, "added_tokens", {"<gene>": 7})
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode_batch(["the <gene> reads [MASK]"])[0][:3] == [5, 7, 6]
    assert (ours.mask_id, ours.vocab_size) == (4, 8)


def test_a_sentencepiece_model_cannot_take_them(tmp_path: Path) -> None:
    from data_prep.train_tokenizer import train

    (tmp_path / "tokenizer.model").write_bytes(train(["the model reads a text and writes another text"] * 40, 290))
    before = load_tokenizer(str(tmp_path))
    # Those that it holds itself are no news.
    write(tmp_path, "tokenizer_config", {"added_tokens_decoder": {"0": entry("<unk>", True), "1": entry("</s>", True)}})
    assert load_tokenizer(str(tmp_path)).fingerprint == before.fingerprint
    write(tmp_path, "added_tokens", {"<gene>": 290})
    with pytest.raises(UserError, match=r"'<gene>' \(id 290\) was added to the sentencepiece model"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path / "tokenizer.model")).mask_id == 290
