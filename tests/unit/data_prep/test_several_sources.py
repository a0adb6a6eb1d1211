"""Which files a source reads: several sources, patterns, links and splits; none twice, none without a word."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bd3_ds.data.manifest import read_manifest
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.runtime.errors import UserError
from data_prep import prepare, verify
from data_prep.pieces import Position
from data_prep.sources import open_source, open_sources

LINE = "1 2 3 4 5 6 7"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"text": text}) + "\n")
    return file


def texts(*specs: str | Path, split: str | None = None) -> list[str]:
    return [piece.text for piece in open_sources([str(spec) for spec in specs], split).pieces()]


def test_linked_folders_and_files_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl", "a")
    write(tmp_path / "elsewhere" / "b.jsonl", "b")
    write(tmp_path / "elsewhere" / "deep" / "c.jsonl", "c")
    write(tmp_path / "other.jsonl", "d")
    root = tmp_path / "set"
    (root / "more").symlink_to("../elsewhere")
    (root / "again").symlink_to("../elsewhere/deep")
    (root / "loop").symlink_to(".")
    (tmp_path / "elsewhere" / "back").symlink_to("../set")
    (root / "0.jsonl").symlink_to("a.jsonl")
    (root / "other.jsonl").symlink_to("../other.jsonl")
    source = open_source(str(root))
    assert sorted(piece.text for piece in source.pieces()) == ["a", "b", "c", "d"]
    assert source.left_out == (root / "0.jsonl",)
    assert source.size == sum(file.stat().st_size for file in source.files) and len(source.files) == 4


def test_a_folder_keeps_its_own_name_beside_a_link_to_it(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", "a")
    (tmp_path / "latest").symlink_to("train")
    assert texts(tmp_path, split="train") == ["a"]


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    os.link(write(tmp_path / "a.jsonl", "a"), tmp_path / "b.jsonl")
    assert texts(tmp_path) == ["a", "a"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl is a link to gone\.jsonl, which is not there"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"b\.jsonl is a link to gone\.jsonl, which is not there"):
        texts(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl is a link to gone\.jsonl, which is not there"):
        texts(tmp_path / "*.jsonl")


def test_the_name_that_was_given_decides(tmp_path: Path) -> None:
    """As in the hub's cache, where files are links to blobs without an ending."""
    write(tmp_path / "blobs" / "5c2f8e", "a")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "train.jsonl"
    link.symlink_to("../blobs/5c2f8e")
    assert texts(link) == texts(link.parent) == ["a"]
    assert open_source(str(link)).name == "train"


def test_sources_come_in_their_order_and_patterns_in_that_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a", "c", "deep/d"):
        write(tmp_path / f"{name}.jsonl", name)
    (tmp_path / "e.txt").write_text("e")
    monkeypatch.chdir(tmp_path)
    assert texts("c.jsonl", "a.jsonl") == ["c", "a"]
    assert texts("[ab].jsonl") == texts(str(tmp_path / "[ab].jsonl")) == ["a", "b"]
    assert texts("e.txt", "*.jsonl") == ["e", "a", "b", "c"]
    assert texts("**/*.jsonl") == ["a", "b", "c", "deep/d"]
    assert texts("d*") == ["deep/d"]  # as if the shell had written the directory out
    position = Position()
    source = open_sources(["e.txt", "*.jsonl"])
    assert source.size == sum(file.stat().st_size for file in tmp_path.glob("*.*"))
    list(source.pieces(position))
    assert position.done == position.total == source.size


def test_a_bad_list_of_sources(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "a")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for again in (file, tmp_path / "link.jsonl", tmp_path / "a*"):
        with pytest.raises(UserError, match="is named twice"):
            texts(file, again)
    with pytest.raises(UserError, match="no file matches it"):
        texts(tmp_path / "*.parquet")
    with pytest.raises(UserError, match=r"another detokenizer by default .*--detokenizer"):
        texts(f"wikitext2={file}", tmp_path / "a*")
    with pytest.raises(UserError, match="both sets of the hub"):
        texts("openwebtext", "someone/texts")
    with pytest.raises(UserError, match="takes one path, no pattern"):
        texts(f"lm1b={tmp_path}/*")


def test_prepare_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.jsonl", LINE)
    number_tokenizer(16).save(tmp_path / "tokenizer")
    rest = ["--tokenizer", str(tmp_path / "tokenizer"), "--length", "8", "--workers", "1", "--out"]
    several = ["--source", f"{tmp_path}/c.jsonl", f"{tmp_path}/[ab].jsonl"]
    repeated = ["--source", f"{tmp_path}/c.jsonl", "--source", f"{tmp_path}/[ab].jsonl"]
    assert prepare.main([*several, *rest, str(tmp_path / "pack")]) == 0
    said = capsys.readouterr().out
    assert f"reads 3 files, 78 bytes: {tmp_path}/c.jsonl, a.jsonl, b.jsonl\n" in said
    assert f"next: `python -m data_prep.verify {tmp_path}/pack` checks it; train on it with data.train=" in said
    manifest = read_manifest(tmp_path / "pack")
    assert [tuple(file) for file in manifest.files] == [(f"{tmp_path}/{name}.jsonl", 26) for name in "cab"]
    assert manifest.settings["source"] == [f"{tmp_path}/c.jsonl", f"{tmp_path}/[ab].jsonl"]
    assert prepare.main([*repeated, *rest, str(tmp_path / "pack")]) == 0
    assert "already holds this pack" in capsys.readouterr().out
    again = verify.command(tmp_path / "pack").split()
    assert again[:7] == [
        "python",
        "-m",
        "data_prep.prepare",
        "--source",
        f"{tmp_path}/c.jsonl",
        f"'{tmp_path}/[ab].jsonl'",
        "--packing",
    ]
    with pytest.raises(UserError, match="another source"):
        prepare.main([*repeated[:2], *rest, str(tmp_path / "pack")])


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "valid.jsonl"],
        ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "test-0.jsonl"],
        ["train/0.jsonl", "validation/0.jsonl"],
        ["c4-train.0.jsonl", "c4-dev.0.jsonl"],
    ],
)
def test_a_directory_of_several_splits_needs_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, name)
    with pytest.raises(UserError, match=r"holds files of several splits .*--split train, or .*\*'"):
        texts(tmp_path)
    assert texts(tmp_path, split="train") == [name for name in names if "train" in name]
    assert sorted(texts(tmp_path / "*")) == sorted(names)  # asked for by name


def test_one_split_alone_is_read_as_it_is(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "more.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path) == ["more.jsonl", "train-0.jsonl", "train-1.jsonl"]
    for name in ("trainset.jsonl", "wiki.train.jsonl", "train/valid-0.jsonl"):
        write(tmp_path / name, name)
    assert texts(tmp_path, split="train") == ["train-0.jsonl", "train-1.jsonl", "trainset.jsonl", "wiki.train.jsonl"]
    assert texts(tmp_path, split="validation") == ["train/valid-0.jsonl"]


def test_what_a_directory_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "set" / "a.jsonl", LINE)
    for name in ("README.txt", "notes.md", "b.json"):
        (tmp_path / "set" / name).write_text("{}")
    number_tokenizer(16).save(tmp_path / "tokenizer")
    words = ["--source", str(tmp_path / "set"), "--tokenizer", str(tmp_path / "tokenizer"), "--length", "8"]
    assert prepare.main([*words, "--workers", "1", "--out", str(tmp_path / "pack")]) == 0
    assert f"leaves out 3 files: {tmp_path}/set/README.txt, b.json, notes.md\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("wikitext", "did you mean 'wikitext103' or 'wikitext2'?"),
        ("open", "did you mean 'openwebtext'?"),
        ("lambda", "did you mean 'lambada'?"),
        ("texts/trian.jsonl", "did you mean 'texts/train.jsonl'?"),
        ("trian.jsonl.gz", "did you mean 'train.jsonl.gz'?"),
        ("lambada=texts/trian.jsonl", "train.jsonl'?"),
    ],
)
def test_a_name_nearly_right(spec: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "texts" / "train.jsonl", "a")
    write(tmp_path / "train.jsonl.gz", "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(spec)
    assert meant in str(caught.value)
