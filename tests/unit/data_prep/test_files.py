"""Files are read to their end, whatever packs them, and what is damaged stops the reading."""

from __future__ import annotations

import gzip
import random
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bd3_ds.runtime.errors import UserError
from tests.unit.data_prep.test_sources import TEXTS, jsonl, texts, zstd

PACK = {"gz": gzip.compress, "zst": zstd}


@pytest.mark.parametrize("ending", PACK)
def test_archives_of_several_frames_are_read_to_their_end(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.jsonl.{ending}"
    file.write_bytes(b"".join(PACK[ending](jsonl(TEXTS[i : i + 10])) for i in range(0, 50, 10)))
    assert texts(str(file)) == TEXTS


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_cut_archive_is_never_a_shorter_one(tmp_path: Path, ending: str, frames: int) -> None:
    frame = PACK[ending](random.Random(1).randbytes(20_000).hex().encode())
    file = tmp_path / f"a.txt.{ending}"
    for lost in (1, 4, 100, len(frame) // 2, len(frame) - 1):
        file.write_bytes((frame * frames)[:-lost])
        with pytest.raises(UserError, match=rf"{file.name} cannot be read"):
            texts(str(file))
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"{file.name} is empty"):
        texts(str(file))


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(jsonl(TEXTS)))
    data[-6] ^= 1  # of the checksum
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        texts(str(tmp_path / "a.jsonl.gz"))


def test_zip_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/a.jsonl", jsonl(TEXTS))
    assert texts(str(file)) == TEXTS
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.zip cannot be read"):
        texts(str(file))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "")
        archive.writestr("b", "")
    with pytest.raises(UserError, match="holds 2 files; unpack it"):
        texts(str(file))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            r"is a \.gz file, which its name does not say; let its name end in \.gz",
        ),
        ("a.jsonl.gz", zstd(b"text"), r"is a \.zst file"),
        ("a.csv", b"PAR1...PAR1", r"is a \.parquet file"),
        ("a.txt", b"\xfd7zXZ\0\0\0", "unpack it first"),
        ("a.parquet", b"text", "not a Parquet file"),
        ("a.parquet", b"PAR1 but no more", "not a Parquet file or damaged"),
        ("a.json", b"[1, 2]\n", "line 1 is no JSON object"),
        ("a.pdf", b"%PDF", "none of the known endings"),
    ],
)
def test_wrong_content(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"(?s){name}.*{sentence}") as caught:
        texts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_in_a_line(tmp_path: Path) -> None:
    """Neither of both texts wins in silence."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "text": "three"}\n')
    with pytest.raises(UserError, match=r"line 2 has the key 'text' twice, and only one can be meant"):
        texts(str(tmp_path / "a.jsonl"))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [random.Random(i).randbytes(50).hex() for i in range(2000)]})
    pyarrow.parquet.write_table(table, file, row_group_size=500, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file or damaged"):
        texts(str(file))


@pytest.mark.parametrize("members", [1, 3])
def test_zeros_after_the_end_of_gzip_are_passed_over(tmp_path: Path, members: int) -> None:
    """As backup tapes and some stores pad files; what is no zero is no end."""
    step = 50 // members + 1
    whole = b"".join(gzip.compress(jsonl(TEXTS[i : i + step])) for i in range(0, 50, step))
    file = tmp_path / "a.jsonl.gz"
    for zeros in (1, 511, 100_000):
        file.write_bytes(whole + bytes(zeros))
        assert texts(str(file)) == TEXTS
    file.write_bytes(whole + bytes(8) + b"more")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        texts(str(file))


def test_a_window_that_is_too_long_is_named(tmp_path: Path) -> None:
    """The frame's header alone: a window of 2 GiB (RFC 8878, 3.1.1.1.2: 2^(10 + 21)), one raw block of five bytes."""
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + (5 << 3 | 1).to_bytes(3, "little") + b"words")
    with pytest.raises(UserError, match=r"a\.txt\.zst was packed with a longer window .*`zstd -d --long=31 "):
        texts(str(file))
