"""Documents from anywhere, read lazily: named sets, files, directories, the hub, the Python installation.

A document comes as one or more pieces; only plain text files are cut, at line ends, so that memory stays bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bd3_ds.runtime.errors import UserError, did_you_mean
from data_prep import local
from data_prep.catalog import EMBEDDED_SETS, NAMED_SETS, NamedSet, check_split
from data_prep.files import PIECE_CHARACTERS, cut
from data_prep.packing import NONE
from data_prep.pieces import Piece, Position, Source

_LIKE_A_FILE = re.compile(r"\.(txt|jsonl|json|csv|parquet|gz|zst|zip|raw)$")


def open_source(
    spec: str, split: str | None = None, text_field: str | None = None, revision: str | None = None
) -> Source:
    """Find the source that `spec` names: NAME, NAME=PATH, FILE, DIR or OWNER/NAME on the hub.

    `split` None means a named set's default, or everything of any other path. `revision`: the commit of a hub set that
    is to be read, by default the newest. Raises UserError where there is no such source or split; nothing is read or
    downloaded yet.
    """
    name, equals, path = spec.partition("=")
    if equals and not Path(spec).exists():
        if name not in NAMED_SETS:
            raise UserError(f"--source {spec}: unknown set '{name}' before '='; {did_you_mean(name, NAMED_SETS)}")
        if not path:
            raise UserError(f"--source {spec}: no path after '='; give {name}=PATH, or {name} for the hub's copy")
        return local.named_set(name, Path(path).expanduser(), split, text_field, NAMED_SETS[name])
    if spec in EMBEDDED_SETS:
        return _embedded(spec, split)
    if spec in NAMED_SETS:
        return _hub_named(spec, split, text_field, NAMED_SETS[spec], revision)
    path_on_disk = Path(spec).expanduser()
    if spec and path_on_disk.exists():
        return local.any_text(path_on_disk, split, text_field)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec) and not _LIKE_A_FILE.search(spec):
        return _hub(spec, split, text_field, revision)
    known = [*NAMED_SETS, *EMBEDDED_SETS]
    raise UserError(
        f"--source '{spec}' is no file, no directory and no known set ({did_you_mean(spec, known)}); "
        "give a path that exists, a set's name, NAME=PATH, or OWNER/NAME on the hub"
    )


def _embedded(name: str, split: str | None) -> Source:
    chosen = check_split(name, split, EMBEDDED_SETS[name].splits)

    def read(_: Position) -> Iterator[Piece]:
        from data_prep import python_docs

        return (Piece(text, True) for text in python_docs.documents(name, chosen))

    return Source(name, name, chosen, "none", EMBEDDED_SETS[name].frame, 0, read)


def _hub_named(name: str, split: str | None, field: str | None, known: NamedSet, revision: str | None) -> Source:
    from data_prep import hub

    chosen = check_split(name, split, known.splits)
    advice = f"give a local copy with --source {name}=PATH"
    hub_split = known.splits[chosen]
    documents = known.documents[hub_split]
    boundary = documents - known.holdout
    part = (0, documents) if not known.holdout else (0, boundary) if chosen == "train" else (boundary, documents)

    def read(position: Position) -> Iterator[Piece]:
        info = hub.find_commit(known.hub, revision or known.branch, advice)
        folder = known.folder.format(config=known.config, split=hub_split)
        for text in hub.parquet_texts(info, folder, field or known.field, documents, part, position, advice):
            if known.spans:  # the whole split is one document
                yield from cut(text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))
            else:
                yield Piece(text, True)

    def find_revision() -> str | None:
        return hub.find_commit(known.hub, revision or known.branch, advice).sha

    return Source(name, name, chosen, known.detokenizer, known.frame, 0, read, find_revision)


def _hub(spec: str, split: str | None, field: str | None, revision: str | None) -> Source:
    from data_prep import hub

    advice = "if it is meant as a path, no such file exists here; otherwise download it and give --source FILE"
    chosen = split or "train"

    def read(position: Position) -> Iterator[Piece]:
        info = hub.find_commit(spec, revision or "main", advice)
        return (Piece(text, True) for text in hub.any_texts(info, chosen, field or "text", position, advice))

    def find_revision() -> str | None:
        return hub.find_commit(spec, revision or "main", advice).sha

    return Source(spec.split("/")[-1], spec, chosen, "none", NONE, 0, read, find_revision)
