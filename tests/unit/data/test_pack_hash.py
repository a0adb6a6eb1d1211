"""The pack hash tells protocols apart, and packs and records of before there were two hashes are still known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bd3_ds.data.manifest import Manifest, is_same_pack, read_manifest
from bd3_ds.data.pack_hash import PackHash
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.runtime.errors import UserError
from data_prep import prepare, verify
from data_prep.pack_writer import write_pack


def chunks(rows: list[list[int]], pads: dict[int, tuple[int, int]] | None = None) -> list[tuple[np.ndarray, ...]]:
    """Chunks with padding from one place to before another (a document starts there, where the chunk goes on)."""
    found = []
    for i, row in enumerate(rows):
        begin, end = (pads or {}).get(i, (None, None))
        starts = [place for place in (0, end) if place is not None and place != begin and place < len(row)]
        found.append((np.array(row), np.array(starts), np.array([] if begin is None else [begin], np.int64)))
    return found


def made(out: Path, rows: list[list[int]], pads: dict[int, tuple[int, int]] | None = None) -> Manifest:
    write_pack(out, chunks(rows, pads), number_tokenizer(16), len(rows[0]), name="n")
    verify.verify(out)
    return read_manifest(out)


def as_before(out: Path) -> Manifest:
    """Make the pack's manifest what was written when there was the hash of the content alone."""
    path = out / "manifest.json"
    value: dict[str, Any] = json.loads(path.read_text())
    value["pack_hash"] = value.pop("content_hash")
    del value["files"], value["left_out"]
    path.write_text(json.dumps(value))
    return read_manifest(out)


def test_one_text_of_two_lengths_has_two_hashes(tmp_path: Path) -> None:
    short = made(tmp_path / "4", [[1, 2, 3, 4], [5, 6, 7, 8]])
    long = made(tmp_path / "8", [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert short.content_hash == long.content_hash
    assert short.pack_hash != long.pack_hash and short.pack_hash != short.content_hash


def test_frame_and_places_of_padding_are_in_it(tmp_path: Path) -> None:
    rows = [[1, 2, 16, 16], [16, 16, 3, 4]]
    manifests = [
        made(tmp_path / "none", rows),
        made(tmp_path / "first", rows, {0: (2, 4)}),
        made(tmp_path / "second", rows, {1: (0, 2)}),
        made(tmp_path / "both", rows, {0: (2, 4), 1: (0, 2)}),
        made(tmp_path / "less", rows, {0: (3, 4)}),
    ]
    assert len({manifest.content_hash for manifest in manifests}) == 1
    assert len({manifest.pack_hash for manifest in manifests}) == 5
    digest = PackHash()
    digest.add(np.array(rows))
    assert digest.pack(4, "none") == manifests[0].pack_hash != digest.pack(4, "bos-eos")


def test_it_does_not_depend_on_how_chunks_come(tmp_path: Path) -> None:
    tokens, padded = np.arange(40).reshape(10, 4), np.zeros((10, 4), bool)
    padded[[3, 7], 2:] = True
    whole, single = PackHash(), PackHash()
    whole.add(tokens, padded)
    for i in range(10):
        single.add(tokens[i : i + 1], padded[i : i + 1] if i in (3, 7) else None)
    assert whole.pack(4, "none") == single.pack(4, "none") and whole.content() == single.content()


def test_packs_of_before_are_known_by_both(tmp_path: Path) -> None:
    now = made(tmp_path / "pack", [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert as_before(tmp_path / "pack") == dataclasses.replace(now, files=(), left_out={})
    verify.verify(tmp_path / "pack")
    padded = made(tmp_path / "padded", [[1, 2, 16, 16]], {0: (2, 4)})
    before = as_before(tmp_path / "padded")
    assert before.pack_hash == before.content_hash == padded.content_hash
    verify.verify(tmp_path / "padded")


@pytest.mark.parametrize("pads", [None, {0: (2, 4)}])
def test_what_was_kept_of_a_pack_fits_it_whenever_either_was_made(tmp_path: Path, pads: Any) -> None:
    rows = [[1, 2, 16, 16], [5, 6, 7, 8]]
    now = made(tmp_path / "pack", rows, pads)
    other = made(tmp_path / "other", [[1, 2, 16, 16], [5, 6, 7, 9]], pads)
    length = made(tmp_path / "length", [[*rows[0], *rows[1]]])
    before = as_before(tmp_path / "pack")
    for manifest in (now, before):
        assert is_same_pack(now.content_hash, None, manifest)  # kept by a run of before
        assert is_same_pack(now.pack_hash, now.content_hash, manifest)
        assert is_same_pack(before.pack_hash, before.content_hash, manifest)
        assert not is_same_pack(other.pack_hash, other.content_hash, manifest)
        assert not is_same_pack(other.content_hash, None, manifest)
    assert not is_same_pack(length.pack_hash, length.content_hash, now)


def test_a_changed_hash_is_seen(tmp_path: Path) -> None:
    made(tmp_path / "pack", [[1, 2, 3, 4]])
    path = tmp_path / "pack" / "manifest.json"
    value = json.loads(path.read_text())
    for name in ("pack_hash", "content_hash"):
        path.write_text(json.dumps(value | {name: "0" * 64}))
        with pytest.raises(UserError, match="do not have the manifest's hash"):
            verify.verify(tmp_path / "pack")


def test_prepare_of_two_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15")
    number_tokenizer(16).save(tmp_path / "tokenizer")
    hashes = set()
    for length in ("4", "8", "16"):
        words = ["--source", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer"), "--length", length]
        assert prepare.main([*words, "--workers", "1", "--out", str(tmp_path / length)]) == 0
        hashes.add((read_manifest(tmp_path / length).content_hash, read_manifest(tmp_path / length).pack_hash))
    assert len({content for content, _ in hashes}) == 1 and len({of_pack for _, of_pack in hashes}) == 3
