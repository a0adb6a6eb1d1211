"""Reading from the hub, played by local files: one commit, whole splits, one sentence for what goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import requests
from huggingface_hub import HfApi, errors

from bd3_ds.runtime.errors import UserError
from data_prep import hub
from data_prep.catalog import NAMED_SETS
from data_prep.pieces import Position
from data_prep.sources import open_source

TEXTS = [f"Document {i}." for i in range(50)]


class Hub:
    """A folder that answers as the hub does; `opened` are the files that were opened, `asked` the revisions."""

    def __init__(self, folder: Path):
        self.folder, self.opened, self.asked = folder, list[str](), list[str]()

    def dataset_info(self, repository: str, *, revision: str, timeout: float) -> Any:
        self.asked.append(revision)
        names = [str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()]
        siblings = [SimpleNamespace(rfilename=name) for name in sorted(names, reverse=True)]
        commit = revision if revision.startswith("c0ffee") else "c0ffee1"
        return SimpleNamespace(id=repository, sha=commit, siblings=siblings)

    def open(self, info: Any, file: str) -> Any:
        self.opened.append(f"{info.id}@{info.sha}/{file}")
        return open(self.folder / file, "rb")

    def put(self, folder: str, *parts: list[str], column: str = "text") -> None:
        (self.folder / folder).parent.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts):
            name = f"{number:04d}.parquet"
            file = self.folder / (folder + name)
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table({"other": part, column: part}), file, row_group_size=4)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    playing = Hub(tmp_path)
    monkeypatch.setattr(HfApi, "dataset_info", lambda _, *args, **more: playing.dataset_info(*args, **more))
    monkeypatch.setattr(hub, "_open", playing.open)
    hub.find_commit.cache_clear()
    yield playing
    hub.find_commit.cache_clear()


def small(monkeypatch: pytest.MonkeyPatch, name: str, **documents: int) -> None:
    counts = NAMED_SETS[name].documents | documents
    monkeypatch.setitem(NAMED_SETS, name, dataclasses.replace(NAMED_SETS[name], documents=counts))


def texts(spec: str, split: str | None = None, **more: Any) -> list[str]:
    return [piece.text for piece in open_source(spec, split, **more).pieces()]


def test_a_named_set_at_one_commit(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "ptb", validation=50)
    server.put("penn_treebank/validation/", TEXTS[:13], TEXTS[13:40], TEXTS[40:], column="sentence")
    server.put("penn_treebank/test/", ["other"], column="sentence")
    source, position = open_source("ptb"), Position()
    assert source.size == 0 and not server.asked  # nothing is asked before it is needed
    assert source.revision() == "c0ffee1"
    seen = [(piece.text, position.done, position.total) for piece in source.pieces(position)]
    assert seen == [(text, i + 1, 50) for i, text in enumerate(TEXTS)]
    assert server.asked == ["refs/convert/parquet"]
    assert {name.partition("/test")[1] for name in server.opened} == {""}
    assert all(name.startswith("ptb-text-only/ptb_text_only@c0ffee1/") for name in server.opened)
    assert texts("ptb", revision="c0ffee2") == TEXTS
    assert server.asked[-1] == "c0ffee2" and "@c0ffee2/" in server.opened[-1]


def test_the_last_documents_are_held_out(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "openwebtext", train=50)
    monkeypatch.setitem(NAMED_SETS, "openwebtext", dataclasses.replace(NAMED_SETS["openwebtext"], holdout=7))
    server.put("data/train-", TEXTS[:30], TEXTS[30:])
    assert texts("openwebtext", "train") == TEXTS[:43]
    server.opened.clear()
    position = Position()
    assert [piece.text for piece in open_source("openwebtext", "valid").pieces(position)] == TEXTS[43:]
    assert (position.done, position.total) == (7, 7)
    assert server.opened.count("dvruette/openwebtext@c0ffee1/data/train-0000.parquet") == 1  # for its number alone


def test_a_split_that_the_hub_cut_short_is_refused(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("arxiv/partial-train/", TEXTS, column="article")
    server.put("arxiv/partial-validation/", TEXTS, column="article")
    with pytest.raises(UserError, match=r"has 50 of the 203037 documents of 'arxiv/train' .*--source arxiv=PATH"):
        texts("arxiv", "train")
    small(monkeypatch, "arxiv", validation=50)
    assert texts("arxiv") == TEXTS  # named so with its set, but whole
    with pytest.raises(UserError, match="has 0 of the 6440 documents"):
        texts("arxiv", "test")
    with pytest.raises(UserError, match="--text-field body: armanc/scientific_papers has no such field"):
        texts("arxiv", text_field="body")


def test_text8_comes_in_pieces(server: Hub) -> None:
    text = "".join(f" {at:08d}x" for at in range(0, 500_000, 10))
    server.put("default/validation/", [text])
    pieces = list(open_source("text8", "valid").pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1) and len(pieces) > 4


def test_any_set(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load_dataset(repository: str, **more: Any) -> Any:
        asked.append({"repository": repository, **more})
        rows = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in [*TEXTS, " "]))
        rows.info.splits = {"test": SimpleNamespace(num_examples=51)}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, position = open_source("someone/something", "test"), Position()
    assert source.revision() == "c0ffee1"
    assert [piece.text for piece in source.pieces(position)] == TEXTS
    assert (position.done, position.total) == (51, 51)
    assert asked == [{"repository": "someone/something", "split": "test", "streaming": True, "revision": "c0ffee1"}]
    with pytest.raises(UserError, match="--text-field body: someone/something has no such field; it has: text"):
        texts("someone/something", "test", text_field="body")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (requests.ConnectionError("no route"), "the Hugging Face hub cannot be reached from here"),
        (errors.OfflineModeIsEnabled("offline"), "the Hugging Face hub cannot be reached from here"),
        (errors.GatedRepoError("403", response=requests.Response()), "accept them there and set HF_TOKEN"),
        (errors.RepositoryNotFoundError("404", response=requests.Response()), "no such public data set"),
        (errors.RevisionNotFoundError("404", response=requests.Response()), "no revision 'refs/convert/parquet' of it"),
    ],
)
def test_one_sentence(server: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    source = open_source("lambada")
    for use in (source.revision, lambda: list(source.pieces())):
        with pytest.raises(UserError, match=sentence) as caught:
            use()
        assert str(caught.value).endswith("; give a local copy with --source lambada=PATH")
        assert "\n" not in str(caught.value)


def test_a_failure_on_the_way_is_one_sentence(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "lambada", test=50)
    server.put("default/test/", TEXTS)
    data = bytearray((server.folder / "default/test/0000.parquet").read_bytes())
    data[4:200] = bytes(196)
    (server.folder / "default/test/0000.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"'default/test' cannot be read from the hub \(.*; give a local copy"):
        texts("lambada")
