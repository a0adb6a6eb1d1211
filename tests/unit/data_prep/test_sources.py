"""Sources give every document of their split once, in one order, and say where they are."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bd3_ds.runtime.errors import UserError
from data_prep.catalog import NAMED_SETS
from data_prep.pieces import Piece, Position
from data_prep.plain_text import PIECE_CHARACTERS
from data_prep.sources import open_source

TEXTS = [f"Document {i} speaks of {i * i}.\n\nIt is “naïve”." for i in range(50)]


def texts(spec: str, split: str | None = None, field: str | None = None) -> list[str]:
    return [piece.text for piece in open_source(spec, split, field).pieces()]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def written(folder: Path) -> Path:
    """A directory with a file of each format."""
    folder.mkdir()
    (folder / "b.jsonl").write_bytes(jsonl(TEXTS[:10]))
    (folder / "c.jsonl.zst").write_bytes(zstd(jsonl(TEXTS[10:20])))
    (folder / "a.csv").write_text('text,n\n"one\nfile",1\n')
    table = pyarrow.table({"text": [*TEXTS[20:30], None, " "]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=3)
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"word " * 60_000))
    return folder


def test_order_and_repetition(tmp_path: Path) -> None:
    source = open_source(str(written(tmp_path / "folder")))
    once = list(source.pieces())
    assert list(source.pieces()) == once and list(open_source(source.spec).pieces()) == once
    assert [piece.text for piece in once[:31]] == ["one\nfile", *TEXTS[:30]]
    assert all(piece.starts for piece in once[:32]) and not any(piece.starts for piece in once[32:])
    assert source.revision() is None


def test_position_grows_to_the_size(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder")
    source, position = open_source(str(folder)), Position()
    seen = [position.done for _ in source.pieces(position)]
    assert seen == sorted(seen) and len(set(seen)) > 4
    assert position.done == position.total == source.size == sum(file.stat().st_size for file in folder.iterdir())
    next(source.pieces(position))
    assert position.done < source.size  # each reading starts anew


def test_position_of_compressed_text_is_in_compressed_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(random.Random(1).randbytes(1 << 20).hex().encode()))
    position = Position()
    shares = [position.done / position.total for _ in open_source(str(file)).pieces(position)]
    for index, share in enumerate(shares):
        assert abs(share - (index + 1) / len(shares)) < 0.15


def lm1b(folder: Path) -> Path:
    train, held = folder / "training-monolingual.tokenized.shuffled", folder / "heldout-monolingual.tokenized.shuffled"
    for number in (3, 1, 2):
        train.mkdir(parents=True, exist_ok=True)
        (train / f"news.en-{number:05d}-of-00100").write_text(f"Train {number} .\nMore .\n")
    for number in (1, 0):
        held.mkdir(exist_ok=True)
        (held / f"news.en.heldout-{number:05d}-of-00050").write_text(f"Held {number} .\n")
    (held / "news.en-00000-of-00100").write_text("Held 0 .\nHeld 1 .\n")
    (folder / "README").write_text("about\n")
    (folder / "README.corpus_generation").write_text("about\n")
    return folder


def test_lm1b_as_published(tmp_path: Path) -> None:
    folder = lm1b(tmp_path / "1-billion-word")
    held, train = ["Held 0 .", "Held 1 ."], [f"{t}" for n in (1, 2, 3) for t in (f"Train {n} .", "More .")]
    assert texts(f"lm1b={folder}") == texts(f"lm1b={folder}", "test") == held
    assert texts(f"lm1b={folder}", "train") == train
    assert open_source(f"lm1b={folder}").split == "test"
    one = folder / "heldout-monolingual.tokenized.shuffled" / "news.en.heldout-00000-of-00050"
    assert texts(f"lm1b={one}") == held[:1]
    assert texts(f"lm1b={folder / 'training-monolingual.tokenized.shuffled'}", "train") == train
    with pytest.raises(UserError, match=r"no file under .* is of the split 'test'; there is train"):
        texts(f"lm1b={folder / 'training-monolingual.tokenized.shuffled'}")
    with pytest.raises(UserError, match="lm1b has no such split"):
        texts(f"lm1b={folder}", "valid")


@pytest.mark.parametrize(
    ("name", "files", "default"),
    [
        ("ptb", {"train": "ptb.train.txt", "valid": "ptb.valid.txt", "test": "ptb.test.txt"}, "valid"),
        ("wikitext2", {"train": "wiki.train.raw", "valid": "wiki.valid.raw", "test": "wiki.test.raw"}, "valid"),
        ("wikitext103", {"train": "train/0.txt", "valid": "validation/0.txt", "test": "test/0.txt"}, "valid"),
        ("lambada", {"test": "lambada_test_plain_text.txt", "valid": "lambada_development_plain_text.txt"}, "test"),
        ("ag_news", {"train": "train.csv", "test": "test.csv", None: "classes.txt"}, "test"),
    ],
)
def test_splits_of_a_directory_never_mix(tmp_path: Path, name: str, files: dict[str | None, str], default: str) -> None:
    for split, file in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f'"1","{split}","more"\n' if file.endswith("csv") else f"of {split}\n")
    (tmp_path / "readme.txt").write_text("about")
    for split in NAMED_SETS[name].splits:
        if split in files:
            (text,) = texts(f"{name}={tmp_path}", split)
            assert split in text
    (text,) = texts(f"{name}={tmp_path}")
    assert default in text


def test_a_named_directory_whose_names_tell_no_split(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"article": "2"}\n')
    (tmp_path / "a.jsonl").write_text('{"article": "1"}\n')
    assert texts(f"pubmed={tmp_path}") == ["1", "2"]
    with pytest.raises(UserError, match=r"no name under .* tells which files are 'test'"):
        texts(f"pubmed={tmp_path}", "test")
    with pytest.raises(UserError, match="no path after '='"):
        texts("pubmed=")


def test_lines_of_a_set_are_those_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(" a <unk> b \n\n c \n")
    assert texts(f"ptb={tmp_path / 't'}") == ["a <unk> b", "c"]
    assert texts(f"wikitext2={tmp_path / 't'}") == [" a <unk> b \n", " c \n"]


@pytest.fixture
def small_holdout(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(NAMED_SETS["openwebtext"], holdout=7, documents={"train": 50})
    monkeypatch.setitem(NAMED_SETS, "openwebtext", small)


@pytest.mark.usefixtures("small_holdout")
def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    documents = [*TEXTS[:20], "", *TEXTS[20:45], " ", *TEXTS[45:]]  # empty ones count, as in the published split
    lines = jsonl(documents).splitlines(keepends=True)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "lines").mkdir()
    for number, at in enumerate(range(0, 52, 13)):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": documents[at : at + 13]}), tmp_path / "parquet" / f"train-{number:05d}-of-4.parquet"
        )
        (tmp_path / "lines" / f"{number}.jsonl.zst").write_bytes(zstd(b"".join(lines[at : at + 13])))
    for kind in ("parquet", "lines"):
        spec = f"openwebtext={tmp_path / kind}"
        assert texts(spec, "valid") == TEXTS[44:]
        assert texts(spec, "train") == texts(spec) == TEXTS[:44]
        assert open_source(spec).split == "train"
    (tmp_path / "few.jsonl").write_bytes(jsonl(TEXTS[:7]))
    with pytest.raises(UserError, match=r"holds 7 in all; give --source .*few\.jsonl to take everything"):
        texts(f"openwebtext={tmp_path / 'few.jsonl'}")
    assert texts(str(tmp_path / "few.jsonl")) == TEXTS[:7]


@pytest.mark.usefixtures("small_holdout")
def test_own_splits_of_a_set_are_kept(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(TEXTS[:5]))
    (tmp_path / "valid.jsonl").write_bytes(jsonl(TEXTS[5:9]))
    assert texts(f"openwebtext={tmp_path}") == TEXTS[:5] and texts(f"openwebtext={tmp_path}", "valid") == TEXTS[5:9]


@pytest.mark.usefixtures("small_holdout")
def test_holding_out_keeps_no_documents_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(jsonl(["word " * 2000] * 2000)))  # 20 MB
    for split, count in (("train", 1993), ("valid", 7)):
        tracemalloc.start()
        assert sum(1 for _ in open_source(f"openwebtext={file}", split).pieces()) == count
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()


@pytest.fixture(scope="module")
def text8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of as many characters as text8, in the archive that text8 is published as."""
    file = tmp_path_factory.mktemp("text8") / "text8.zip"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("text8", "w") as stream,
    ):
        for start in range(0, 100_000_000, 1_000_000):
            stream.write(b"".join(b" %08dx" % at for at in range(start, start + 1_000_000, 10)))
    return file


@pytest.mark.parametrize(("split", "first", "last"), [
    ("train", 0, 90_000_000), ("valid", 90_000_000, 95_000_000), ("test", 95_000_000, 100_000_000),
])  # fmt: skip
def test_text8_splits(text8: Path, split: str, first: int, last: int) -> None:
    source, position = open_source(f"text8={text8}", split), Position()
    tracemalloc.start()
    count, starts, head, tail = 0, 0, "", ""
    for piece in source.pieces(position):
        head, tail, count, starts = head or piece.text, piece.text, count + len(piece.text), starts + piece.starts
        assert len(piece.text) < 3 * PIECE_CHARACTERS
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert (count, starts) == (last - first, 1)
    assert head.startswith(f" {first:08d}x") and tail.endswith(f" {last - 10:08d}x")
    assert (source.frame, source.detokenizer) == ("none", "none")
    assert position.done == position.total


def test_text8_that_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "text8").write_text("a" * 1000)
    assert open_source(f"text8={tmp_path}").split == "train"
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"text8 has 1000 characters, fewer than \d+0: not the whole set"):
            texts(f"text8={tmp_path / 'text8'}", split)
    (tmp_path / "text8.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 files, but text8 is one; give text8=FILE"):
        texts(f"text8={tmp_path}")


def test_pieces_are_tuples_of_text_and_start(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert list(open_source(str(tmp_path / "a.txt")).pieces()) == [Piece("x", True)]
