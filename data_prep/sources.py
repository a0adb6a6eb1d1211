"""Documents from anywhere, read lazily: named sets, files, directories, the hub, the Python installation.

A document comes as one or more pieces; only plain text files are cut, at line ends, so that memory stays bounded.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bd3_ds.runtime.errors import UserError, did_you_mean
from data_prep import local
from data_prep.catalog import EMBEDDED_SETS, NAMED_SETS, NamedSet, check_split
from data_prep.find import near_by
from data_prep.formats import FORMATS, suffixes
from data_prep.packing import NONE
from data_prep.pieces import Piece, Position, Source, document
from data_prep.plain_text import PIECE_CHARACTERS, cut

_LIKE_A_FILE = re.compile(r"\.(txt|jsonl|json|csv|parquet|gz|zst|zip|raw)$")


def open_source(
    spec: str, split: str | None = None, text_field: str | None = None, revision: str | None = None
) -> Source:
    """Find the source that `spec` names: NAME, NAME=PATH, FILE, DIR, a pattern of files, or OWNER/NAME on the hub.

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
        if glob.has_magic(path) and not Path(path).exists():
            raise UserError(f"--source {spec}: {name} takes one path, no pattern; give the directory of its files")
        return local.named_set(name, Path(path).expanduser(), split, text_field, NAMED_SETS[name])
    if spec in EMBEDDED_SETS:
        return _embedded(spec, split)
    if spec in NAMED_SETS:
        return _hub_named(spec, split, text_field, NAMED_SETS[spec], revision)
    path_on_disk = Path(spec).expanduser()
    if spec and (path_on_disk.exists() or path_on_disk.is_symlink()):
        return local.any_text(path_on_disk, split, text_field)
    if glob.has_magic(spec):
        return local.matching(str(path_on_disk), split, text_field)
    if _is_hub_name(spec):
        return _hub(spec, split, text_field, revision)
    raise UserError(
        f"--source '{spec}' is no file, no directory and no known set ({_meant(spec)}); "
        "give a path that exists, a set's name, NAME=PATH, or OWNER/NAME on the hub"
    )


def open_sources(
    specs: Sequence[str],
    split: str | None = None,
    text_field: str | None = None,
    revision: str | None = None,
    given: Collection[str] = (),
) -> Source:
    """One source of all that `specs` name, read in their order; each is what `open_source` takes.

    `given` are those of its defaults ("detokenizer", "frame") that need not be of one mind. Raises UserError where they
    differ in others, where a file is named twice, and for more than one set of the hub.
    """
    opened = [open_source(spec, split, text_field, revision) for spec in specs]
    if len(opened) == 1:
        return opened[0]
    for what in ("detokenizer", "frame"):
        values = {getattr(source, what): source.spec for source in opened}
        if len(values) > 1 and what not in given:
            listed = ", ".join(f"{value} for {spec}" for value, spec in values.items())
            raise UserError(
                f"--source: these have another {what} by default ({listed}); give one for all with --{what}"
            )
    hub_sets = [source.spec for source in opened if not source.files and source.spec not in EMBEDDED_SETS]
    if len(hub_sets) > 1:
        raise UserError(
            f"--source: {' and '.join(hub_sets)} are both sets of the hub, of which a pack reads one; make a pack of "
            "each, which training mixes by data.mix"
        )
    files = [file for source in opened for file in source.files]
    _require_distinct(files)
    names = list(dict.fromkeys(source.name for source in opened))
    sized = all(source.files for source in opened)

    def read(position: Position) -> Iterator[Piece]:
        for source in opened:
            own, before = Position(total=float(source.size)), position.done
            for piece in source.read(own):
                if sized:
                    position.done = before + own.done
                yield piece
            position.done = before + (own.done if sized else 0.0)

    return replace(
        opened[0],
        name="+".join(names) if len(names) < 4 else f"{names[0]}+{len(names) - 1}",
        spec=shlex.join(specs),
        split=split,
        size=sum(source.size for source in opened) if sized else 0,
        read=read,
        find_revision=lambda: next(filter(None, (source.revision() for source in opened)), None),
        files=tuple(files),
        left_out=tuple(name for source in opened for name in source.left_out),
        specs=tuple(source.spec for source in opened),
    )


def _require_distinct(files: list[Path]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        status = file.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), file)
        if first is not file:
            also = "" if first == file else f", also as {first}"
            raise UserError(f"--source: {file} is named twice{also}; name it once, or its text would count twice")


def _is_hub_name(spec: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec)) and not _LIKE_A_FILE.search(spec)


def _meant(spec: str) -> str:
    """A half-sentence with the sets or the file that a wrong name may stand for."""
    known = sorted([*NAMED_SETS, *EMBEDDED_SETS])
    begun = [name for name in known if len(spec) > 2 and name.startswith(spec.lower())]
    if begun:
        return f"did you mean {' or '.join(repr(name) for name in begun)}?"
    near = near_by(Path(spec).expanduser())
    if near is not None and (near.is_dir() or suffixes(near)[0] in FORMATS):
        return f"did you mean '{near}'?"
    return did_you_mean(spec, known)


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
                whole = text or ""
                yield from cut(whole[at : at + PIECE_CHARACTERS] for at in range(0, len(whole), PIECE_CHARACTERS))
            else:
                yield document(text)

    def find_revision() -> str | None:
        return hub.find_commit(known.hub, revision or known.branch, advice).sha

    return Source(name, name, chosen, known.detokenizer, known.frame, 0, read, find_revision)


def _hub(spec: str, split: str | None, field: str | None, revision: str | None) -> Source:
    from data_prep import hub

    near = near_by(Path(spec))
    there = f" (but {near} does)" if near else ""
    advice = f"if it is meant as a path, no such file exists here{there}; otherwise download it and give --source FILE"
    chosen = split or "train"

    def read(position: Position) -> Iterator[Piece]:
        info = hub.find_commit(spec, revision or "main", advice)
        return map(document, hub.any_texts(info, chosen, field or "text", position, advice))

    def find_revision() -> str | None:
        return hub.find_commit(spec, revision or "main", advice).sha

    return Source(spec.split("/")[-1], spec, chosen, "none", NONE, 0, read, find_revision)
