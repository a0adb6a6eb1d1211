"""Text is what a file holds as text: other types are refused, nulls are left out and counted, in every kind of file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.runtime.errors import UserError
from data_prep import hub, prepare
from data_prep.pieces import Position, document
from data_prep.sources import open_source

WORDS = [f"{i} 2 3 4 5 6 7" for i in range(8)]
NO_TEXT: list[tuple[pyarrow.DataType, list[Any]]] = [
    (pyarrow.list_(pyarrow.string()), [["a", "b"], ["c"]]),
    (pyarrow.binary(), [b"a", b"b"]),
    (pyarrow.large_binary(), [b"a", b"b"]),
    (pyarrow.int64(), [1, 2]),
    (pyarrow.float32(), [1.0, 2.0]),
    (pyarrow.bool_(), [True, False]),
    (pyarrow.struct([("a", pyarrow.string())]), [{"a": "b"}, {"a": "c"}]),
    (pyarrow.timestamp("s"), [0, 1]),
    (pyarrow.dictionary(pyarrow.int32(), pyarrow.int64()), [1, 2]),
]


def texts(path: Path, field: str | None = None) -> list[str]:
    return [piece.text for piece in open_source(str(path), None, field).pieces()]


def write(file: Path, **columns: pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


@pytest.mark.parametrize(("kind", "values"), NO_TEXT, ids=lambda value: str(value))
def test_a_column_of_another_type_is_refused(tmp_path: Path, kind: pyarrow.DataType, values: list[Any]) -> None:
    column = pyarrow.array(values, kind)
    file = write(tmp_path / "a.parquet", text=column, body=pyarrow.array(WORDS[:2]), n=pyarrow.array([1, 2]))
    with pytest.raises(UserError) as caught:
        texts(file)
    stored = pyarrow.parquet.read_schema(file).field("text").type
    assert f"--text-field text: {file} has the type {stored} there, which is no text" in str(caught.value)
    assert "name a column of strings (body)" in str(caught.value)
    assert ("cast this one to string" in str(caught.value)) == ("binary" in str(kind))
    assert texts(file, "body") == WORDS[:2]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(WORDS),
        pyarrow.array(WORDS, pyarrow.large_string()),
        pyarrow.array(WORDS, pyarrow.string_view()),
        pyarrow.array(WORDS).dictionary_encode(),
        pyarrow.array(WORDS, pyarrow.large_string()).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_all_kinds_of_strings_are_text(tmp_path: Path, column: pyarrow.Array) -> None:
    assert texts(write(tmp_path / "a.parquet", text=column)) == WORDS


@pytest.mark.parametrize(("kind", "values"), NO_TEXT[:4], ids=lambda value: str(value))
def test_the_hub_reader_refuses_them_too(
    monkeypatch: pytest.MonkeyPatch, kind: pyarrow.DataType, values: list[Any]
) -> None:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), content)
    info = _hub_file(content, monkeypatch)
    with pytest.raises(UserError, match=r"someone/set has the type .* there, which is no text"):
        list(hub.parquet_texts(info, "data/train/", "text", 2, (0, 2), Position(), "advice"))


def test_the_hub_reader_tells_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), content)
    info = _hub_file(content, monkeypatch)
    found = list(hub.parquet_texts(info, "data/train/", "text", 4, (0, 4), Position(), "advice"))
    assert found == ["a", None, "", "b"]
    assert [document(text).null for text in found] == [False, True, False, False]


def _hub_file(content: io.BytesIO, monkeypatch: pytest.MonkeyPatch) -> Any:
    from huggingface_hub.hf_api import DatasetInfo

    monkeypatch.setattr(hub, "_open", lambda *_: io.BytesIO(content.getvalue()))
    return DatasetInfo(id="someone/set", sha="0" * 40, siblings=[{"rfilename": "data/train/0.parquet"}], tags=[])


@pytest.mark.parametrize(
    ("value", "kind"), [("1.5", "a number"), ("[1]", "a list"), ('{"a": 1}', "an object"), ("true", "true or false")]
)
def test_json_of_another_type_is_refused(tmp_path: Path, value: str, kind: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{{"text": {value}}}\n')
    with pytest.raises(UserError, match=f"a.jsonl line 2 holds no string there but {kind}; name the key"):
        texts(file)


def test_a_json_key_given_twice(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "1 2", "id": 1}\n{"text": "one", "id": 2, "text": "other"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 2 has the key 'text' twice, and only one can be meant"):
        texts(file)
    # Of other keys, or within other objects, it changes no text.
    file.write_text('{"text": "1 2", "id": 1, "id": 2, "meta": {"text": 1, "text": 2}}\n')
    assert texts(file) == ["1 2"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"text": "a"},\n{"text": "b"}]\n', "line 1 is no JSON object but begins an array; give one object a line"),
        ("[\n  {\n", "line 1 is no JSON object but begins an array"),
        ('[{"text": "a"}, {"text": "b"}]\n', "line 1 is no JSON object but an array"),
        ('"a text"\n', "line 1 is no JSON object but a single value"),
        ('{\n  "text": "a"\n}\n', "line 1 is not valid JSON .*; give one object a line, such as `jq -c . "),
        ("[" * 100_000, "line 1 is no JSON object"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "line 1 is not valid JSON"),
    ],
)
def test_other_forms_of_json(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"a\.json {sentence}") as caught:
        texts(tmp_path / "a.json")
    if content[0] == "[":
        assert f"`jq -c '.[]' {tmp_path / 'a.json'}`" in str(caught.value)


def test_a_column_named_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match=r"--text-field text: .*a\.csv has 2 columns of this name"):
        texts(tmp_path / "a.csv")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"--text-field text: .*a\.parquet has 2 columns of this name"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_nulls_are_left_out_counted_and_said(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, documents = tmp_path / f"a.{kind}", [*WORDS[:3], None, "", None, *WORDS[3:], "  "]
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    elif kind == "parquet":
        write(file, text=pyarrow.array(documents))
    else:  # which knows no null
        file.write_text("text,n\n" + "".join(f"{text or ''},1\n" for text in documents))
    position = Position()
    assert [piece.text for piece in open_source(str(file)).pieces(position)] == WORDS
    assert (position.nulls, position.blank) == ((0, 4) if kind == "csv" else (2, 2))
    number_tokenizer(16).save(tmp_path / "tokenizer")
    words = ["--source", str(file), "--tokenizer", str(tmp_path / "tokenizer"), "--length", "8", "--workers", "1"]
    assert prepare.main([*words, "--out", str(tmp_path / "pack")]) == 0
    said = f"left out because they hold no text: {position.nulls} null, {position.blank} empty"
    assert said in capsys.readouterr().out


def test_a_column_of_nulls_alone_holds_no_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.parquet", text=pyarrow.nulls(3))) == []
