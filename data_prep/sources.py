"""Documents from anywhere, read lazily: named sets, files, directories, the hub, the Python installation.

A document comes as one or more pieces; only plain text files are cut, at line ends, so that memory stays bounded.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bd3_ds.runtime.errors import UserError, did_you_mean
from data_prep.catalog import EMBEDDED_SETS, NAMED_SETS, NamedSet
from data_prep.files import Piece, find_files, read_file, whole
from data_prep.packing import NONE


@dataclass(frozen=True)
class Source:
    """A source that was found but not yet read. `size` is its bytes on disk, 0 where that is unknown.

    `detokenizer` and `frame` are its defaults; `pieces()` starts reading from the beginning at each call.
    """

    name: str
    spec: str
    split: str | None
    detokenizer: str
    frame: str
    size: int
    pieces: Callable[[], Iterator[Piece]]


def open_source(spec: str, split: str | None = None, text_field: str | None = None) -> Source:
    """Find the source that `spec` names: NAME, NAME=PATH, FILE, DIR or OWNER/NAME on the hub.

    `split` None means the named set's default, or everything of a local path. Raises UserError where there is no such
    source or split; nothing is read or downloaded yet.
    """
    name, equals, path = spec.partition("=")
    if equals and not Path(spec).exists():
        if name not in NAMED_SETS:
            raise UserError(f"--source {spec}: unknown set '{name}' before '='; {did_you_mean(name, NAMED_SETS)}")
        return _local(name, Path(path), split, text_field, NAMED_SETS[name])
    if spec in EMBEDDED_SETS:
        return _embedded(spec, split)
    if spec in NAMED_SETS:
        return _hub_named(spec, split, text_field)
    local = Path(spec).expanduser()
    if spec and local.exists():
        return _local(local.name.split(".")[0] or "text", local, split, text_field, None)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec) and not re.search(r"\.(txt|jsonl|csv|parquet|gz|zst|raw)$", spec):
        return _hub(spec, split, text_field)
    known = [*NAMED_SETS, *EMBEDDED_SETS]
    raise UserError(
        f"--source '{spec}' is no file, no directory and no known set ({did_you_mean(spec, known)}); "
        "give a path that exists, a set's name, NAME=PATH, or OWNER/NAME on the hub"
    )


def _check_split(spec: str, split: str | None, known: Iterable[str]) -> str:
    known = list(known)
    if split is not None and split not in known:
        raise UserError(f"--split {split}: {spec} has no such split; {did_you_mean(split, known)}")
    return split or known[0]


def _embedded(name: str, split: str | None) -> Source:
    chosen = _check_split(name, split, EMBEDDED_SETS[name].splits)

    def pieces() -> Iterator[Piece]:
        from data_prep import python_docs

        return whole(python_docs.documents(name, chosen))

    return Source(name, name, chosen, "none", EMBEDDED_SETS[name].frame, 0, pieces)


def _local(name: str, path: Path, split: str | None, field: str | None, known: NamedSet | None) -> Source:
    path = path.expanduser().resolve()
    held_out = known is not None and known.holdout > 0
    if held_out and split is not None and known:
        _check_split(name, split, known.splits)
    elif split is not None and not path.is_dir():
        raise UserError(f"--split {split}: {path} is one file and has no splits; leave --split out")
    files = find_files(path, None if held_out else split)
    text_field = field or (known.field if known else "text")
    spec = f"{name}={path}" if known else str(path)

    def pieces() -> Iterator[Piece]:
        lines, newline = (known.lines, known.keep_newline) if known else (False, False)
        return itertools.chain.from_iterable(read_file(file, text_field, lines, newline) for file in files)

    def held() -> Iterator[Piece]:
        assert known is not None
        documents = sum(piece.starts for piece in pieces())
        if documents <= known.holdout:
            raise UserError(
                f"--split {split}: {name} keeps its last {known.holdout} documents for validation, but {path} holds "
                f"{documents} in all; leave --split out to take everything"
            )
        return _slice_documents(pieces(), documents - known.holdout, split == "train")

    size = sum(file.stat().st_size for file in files)
    detokenizer, frame = (known.detokenizer, known.frame) if known else ("none", NONE)
    return Source(name, spec, split, detokenizer, frame, size, held if held_out and split else pieces)


def _slice_documents(pieces: Iterator[Piece], boundary: int, before: bool) -> Iterator[Piece]:
    seen = 0
    for piece in pieces:
        seen += piece.starts
        if seen > boundary and before:
            return
        if (seen <= boundary) == before:
            yield piece


def _hub_named(name: str, split: str | None, field: str | None) -> Source:
    from data_prep import hub

    known = NAMED_SETS[name]
    chosen = _check_split(name, split, known.splits)

    def pieces() -> Iterator[Piece]:
        texts = hub.texts(
            known.hub,
            known.config,
            known.splits[chosen],
            field or known.field,
            known.parquet,
            advice=f"give a local copy with --source {name}=PATH",
        )
        if known.holdout:
            boundary = known.documents - known.holdout
            texts = itertools.islice(texts, boundary) if chosen == "train" else itertools.islice(texts, boundary, None)
        return whole(texts)

    return Source(name, name, chosen, known.detokenizer, known.frame, 0, pieces)


def _hub(spec: str, split: str | None, field: str | None) -> Source:
    from data_prep import hub

    def pieces() -> Iterator[Piece]:
        advice = "if it is meant as a path, no such file exists here; otherwise download it and give --source FILE"
        return whole(hub.texts(spec, None, split or "train", field or "text", False, advice))

    return Source(spec.split("/")[-1], spec, split or "train", "none", NONE, 0, pieces)
