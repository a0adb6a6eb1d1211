"""From text files to a verified pack and back, through the real commands."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from bd3_ds.data.manifest import check_same_tokenizer, read_manifest
from bd3_ds.data.pack import open_pack
from bd3_ds.data.tokenizer import load_tokenizer, number_tokenizer
from bd3_ds.runtime.errors import UserError
from data_prep import parts, prepare, train_tokenizer, verify
from data_prep.pack_writer import write_pack
from data_prep.sources import open_source

SHARED = Path(os.environ.get("BD3_SHARED", "../shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data (BD3_SHARED)")
DOCUMENTS = [f"Document {i} tells a story.\n\nIt has {i * i} parts; “one” is naïve.\n" * (1 + i % 4) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer") / "sp"
    text = directory.parent / "text.txt"
    text.write_text("".join(DOCUMENTS))
    assert train_tokenizer.main(["--source", str(text), "--vocab-size", "330", "--out", str(directory)]) == 0
    return str(directory)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return file


def pack(source: Path | str, tokenizer: str, out: Path, *more: str) -> str:
    """Prepare with length 32 and one worker and return the pack hash."""
    arguments = ["--source", str(source), "--tokenizer", tokenizer, "--length", "32", "--out", str(out)]
    assert prepare.main([*arguments, *(() if "--workers" in more else ("--workers", "1")), *more]) == 0
    return read_manifest(out).pack_hash


def test_pack_holds_the_text(jsonl: Path, tokenizer: str, tmp_path: Path) -> None:
    pack(jsonl, tokenizer, tmp_path / "pack")
    opened = open_pack(tmp_path / "pack")
    manifest, loaded = opened.manifest, opened.tokenizer
    stream = [token for ids in loaded.encode_batch(DOCUMENTS) for token in [*ids, loaded.eos_id]]
    assert (manifest.documents, manifest.tokens) == (60, len(stream))
    assert manifest.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert manifest.chunks * 32 + manifest.dropped_tokens == manifest.tokens
    tokens = opened.all_tokens()
    assert tokens.dtype == np.int64 and tokens.ravel().tolist() == stream[: tokens.size]
    assert opened.all_tokens(limit=3).shape == (3, 32) and (opened.tokens(2) == tokens[2]).all()
    for i in range(1, len(opened)):
        before = np.concatenate([tokens[i - 1][-1:], tokens[i][:-1]])
        assert opened.doc_starts(i).tolist() == np.flatnonzero(before == loaded.eos_id).tolist()


def test_workers_do_not_matter(jsonl: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_CHARACTERS", 500)  # many batches of this small text
    one = pack(jsonl, tokenizer, tmp_path / "one")
    assert pack(jsonl, tokenizer, tmp_path / "two", "--workers", "2") == one
    monkeypatch.undo()
    assert pack(jsonl, tokenizer, tmp_path / "large") == one


def test_containers_do_not_matter(jsonl: Path, tokenizer: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    plain = pack(jsonl, tokenizer, tmp_path / "plain")
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    with pyarrow.output_stream(str(tmp_path / "text.jsonl.zst"), compression="zstd") as stream:
        stream.write(jsonl.read_bytes())
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "text.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("not data")
    lines = jsonl.read_text().splitlines(keepends=True)
    (folder / "part-1.jsonl").write_text("".join(lines[:20]))
    (folder / "part-2.jsonl").write_text("".join(lines[20:]))
    for name in ("text.jsonl.gz", "text.jsonl.zst", "text.parquet", "folder"):
        assert pack(tmp_path / name, tokenizer, tmp_path / f"out-{name}") == plain, name


def test_half_a_surrogate_pair_becomes_a_character(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "crawl.jsonl").write_text(
        '{"text": "Document 1 \\ud83d tells a story. It is \\ud83d\\ude00. ' + "It has 9 parts. " * 9 + '"}\n'
    )
    pack(tmp_path / "crawl.jsonl", tokenizer, tmp_path / "out")
    text = open_pack(tmp_path / "out").tokenizer.decode(open_pack(tmp_path / "out").all_tokens().ravel())
    assert text.startswith("Document 1 \ufffd tells a story. It is \U0001f600.")


def test_long_text_is_one_document(tokenizer: str, tmp_path: Path) -> None:
    text = "".join(DOCUMENTS) * 20
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    pieces = list(open_source(str(tmp_path / "long.txt")).pieces())
    assert len(pieces) > 1 and "".join(piece.text for piece in pieces) == text
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert pack(tmp_path / "long.txt", tokenizer, tmp_path / "a") == pack(
        tmp_path / "long.jsonl", tokenizer, tmp_path / "b"
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_cuts_change_no_token_of_a_tokenizer_that_begins_with_a_space(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("".join(DOCUMENTS).split("\n")),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=330,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            minloglevel=2,
        )
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        letters = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=letters, special_tokens=special, show_progress=False
        )
        backend.train_from_iterator(DOCUMENTS, trainer)
        backend.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    assert parts.shows_cuts(loaded)
    text = "".join(DOCUMENTS) * 40
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    assert len(list(open_source(str(tmp_path / "long.txt")).pieces())) > 4
    pack(tmp_path / "long.txt", str(folder), tmp_path / "a")
    pack(tmp_path / "long.jsonl", str(folder), tmp_path / "b")
    manifest, whole = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert (manifest.tokens, manifest.pack_hash) == (whole.tokens, whole.pack_hash)
    assert manifest.tokens == len(loaded.encode_batch([text])[0]) + 1


def test_named_sets_bring_their_protocol(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text(" = Title = \n \n He , too . \n")
    source = open_source(f"wikitext2={tmp_path / 'w.txt'}")
    assert [piece.text for piece in source.pieces()] == [" = Title = \n", " He , too . \n"]
    assert (source.frame, source.detokenizer) == ("bos-eos", "wikitext")
    (tmp_path / "ag.csv").write_text('"3","Title","Body, with ""quotes"""\n"4","B","C"\n')
    assert [piece.text for piece in open_source(f"ag_news={tmp_path / 'ag.csv'}").pieces()] == [
        'Title Body, with "quotes"',
        "B C",
    ]


def test_frame_and_limits(jsonl: Path, tokenizer: str, tmp_path: Path) -> None:
    pack(jsonl, tokenizer, tmp_path / "pack", "--frame", "bos-eos", "--limit-documents", "9")
    opened = open_pack(tmp_path / "pack")
    loaded = opened.tokenizer
    tokens = opened.all_tokens()
    assert opened.manifest.documents == 9
    assert (tokens[:, 0] == loaded.bos_id).all() and (tokens[:, -1] == loaded.eos_id).all()
    assert not (tokens[:, 1:-1] == loaded.eos_id).any()


def test_directory_splits(tokenizer: str, tmp_path: Path) -> None:
    for split, words in (("train", "a b c"), ("valid", "d e f")):
        (tmp_path / f"{split}-0.txt").write_text(words)
    assert [piece.text for piece in open_source(str(tmp_path), "valid").pieces()] == ["d e f"]


def test_again_is_nothing_to_do(
    jsonl: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    pack(jsonl, tokenizer, out)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    pack(jsonl, tokenizer, out)
    assert "nothing to do" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(UserError, match=r"another frame.*--overwrite"):
        pack(jsonl, tokenizer, out, "--frame", "bos-eos")
    pack(jsonl, tokenizer, out, "--frame", "bos-eos", "--overwrite")
    assert read_manifest(out).frame == "bos-eos"


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_verify_names_the_damaged_shard(jsonl: Path, tokenizer: str, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "pack"
    whole = pack(jsonl, tokenizer, out)
    verify.verify(out)
    shard = next(out.rglob("shard.*"))
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data if damage == "flipped" else data[:-7])
    with pytest.raises(UserError, match=f"(?s){shard.parent.name}/{shard.name}.*1 shards are broken") as caught:
        verify.verify(out)
    words = shlex.split(caught.value.messages[-1].splitlines()[-1])
    assert prepare.main(words[words.index("--source") :]) == 0  # the command that it names mends the pack
    verify.verify(out)
    assert read_manifest(out).pack_hash == whole


def test_prose_is_told_from_code_and_tables() -> None:
    from data_prep.python_docs import prose

    docstring = """Return the mean of the values, ignoring those that are missing from the list.

    Args:
        values (`list`, *optional*): The values to look at, in any order
            that the caller likes.
        axis : int

    >>> mean([1, 2, 3])
    2

    ======  ======
    name    number
    ======  ======

    x = f(y) + g(z[0]) * h(a_b, c_d) / 12.5 - k(m)
    """
    assert list(prose(inspect.cleandoc(docstring))) == [
        "Return the mean of the values, ignoring those that are missing from the list.",
        "The values to look at, in any order that the caller likes.",
    ]


def test_trained_tokenizer_is_deterministic() -> None:
    assert train_tokenizer.train(DOCUMENTS, 330) == train_tokenizer.train(DOCUMENTS, 330)


def test_write_pack_from_arrays(tmp_path: Path) -> None:
    numbers = number_tokenizer(16)
    chunks = [(np.arange(8) + i, np.array([0, 3]) if i else np.array([])) for i in range(8)]
    manifest = write_pack(tmp_path / "pack", chunks, numbers, 8, name="numbers")
    opened = open_pack(tmp_path / "pack")
    assert (manifest.chunks, manifest.documents, len(opened)) == (8, 14, 8)
    assert (opened.all_tokens() == np.arange(8) + np.arange(8)[:, None]).all()
    assert opened.doc_starts(0).tolist() == [] and opened.doc_starts(5).tolist() == [0, 3]
    with pytest.raises(ValueError, match="mask id"):
        write_pack(tmp_path / "bad", [(np.full(8, numbers.mask_id), np.array([0]))], numbers, 8, name="bad")
    assert not (tmp_path / "bad").exists()


def test_other_tokenizers_are_told_apart(tmp_path: Path) -> None:
    made = [
        write_pack(tmp_path / str(n), [(np.arange(8), np.array([0]))], number_tokenizer(n), 8, name=str(n))
        for n in (16, 17)
    ]
    check_same_tokenizer(made[0], made[0])
    with pytest.raises(UserError, match="different tokenizers"):
        check_same_tokenizer(*made)


@needs_shared
def test_real_text_in_parts_gives_the_tokens_of_the_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "gpt2"))
    text = (SHARED / "small" / "tiny_shakespeare.txt").read_text()[:300_000]
    file = tmp_path / "play.txt"
    file.write_text(text)
    pieces = [piece.text for piece in open_source(str(file)).pieces()]
    parts = [token for ids in tokenizer.encode_batch(pieces) for token in ids]
    assert len(pieces) > 4 and parts == tokenizer.encode_batch([text])[0]


@needs_shared
@pytest.mark.parametrize(
    ("source", "file", "documents", "tokens"),
    [("lambada", "eval/lambada/test.txt", 5153, 424559), ("wikitext2", "eval/wikitext2/wiki.test.raw", 2891, 270438)],
)
def test_real_sets(tmp_path: Path, source: str, file: str, documents: int, tokens: int) -> None:
    gpt2 = str(SHARED / "tokenizers" / "gpt2")
    arguments = ["--source", f"{source}={SHARED / file}", "--tokenizer", gpt2, "--length", "1024", "--workers", "1"]
    assert prepare.main([*arguments, "--out", str(tmp_path / "pack")]) == 0
    manifest = read_manifest(tmp_path / "pack")
    assert (manifest.documents, manifest.tokens) == (documents, tokens)
    assert manifest.chunks == tokens // 1022 and manifest.dropped_tokens == tokens % 1022
