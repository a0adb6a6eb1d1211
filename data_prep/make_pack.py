"""Makes a pack from a source: read, tokenize, chunk, write; a preparation that was stopped is resumed."""

from __future__ import annotations

import errno
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from bd3_ds.data.manifest import Manifest
    from bd3_ds.data.tokenizer_base import Tokenizer
    from data_prep.pieces import Piece, Source


def make_pack(source: Source, tokenizer: Tokenizer, out: Path, settings: dict[str, Any], workers: int = 1) -> Manifest:
    """Read `source` to its end, write the pack `out` and return its manifest; `settings` as `prepare` makes them.

    Finished parts of an earlier start are used again. Raises UserError where there is too little text or disk.
    """
    from data_prep.work_directory import work_directory, work_directory_of

    try:
        with work_directory(out) as work:
            return _make(source, tokenizer, out, settings, workers, work)
    except KeyboardInterrupt:
        kept = "what is finished is kept: the same command goes on from there"
        raise KeyboardInterrupt(
            f"stopped; {kept if work_directory_of(out).exists() else 'nothing was finished yet'}"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"--out {out}: no room is left on the disk ({error.strerror}); make room, or choose a directory on another "
            "disk, and give the same command again: what is finished is kept"
        ) from None


def _make(
    source: Source, tokenizer: Tokenizer, out: Path, settings: dict[str, Any], workers: int, work: Path
) -> Manifest:
    from data_prep.packing import Recipe, Tally, pack
    from data_prep.parts import encode_parts, shows_cuts, start_worker
    from data_prep.pieces import Position
    from data_prep.progress import PreparationProgress
    from data_prep.work_directory import keep_revision, put_in_place
    from data_prep.workers import Workers

    wanted = {key: settings[key] for key in ("packing", "frame", "length", "block_size")}
    recipe = Recipe(**wanted, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    joined = " joined" if shows_cuts(tokenizer) else ""  # unlike parts that were made when cuts were seen in them
    tally, made_by = Tally(), f"{settings['tokenizer']} {settings['detokenizer']}{joined}"
    parts_folder = work / "parts"
    parts_folder.mkdir(exist_ok=True)
    keep_revision(work, source.spec, source.revision())
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(Path(saved))
        position = Position()
        pieces = _limited(source.pieces(position), settings["limit_documents"])
        with (
            Workers(workers, start_worker, saved, settings["detokenizer"]) as pool,
            PreparationProgress(source.name, position) as progress,
        ):
            parts = encode_parts(pieces, pool, parts_folder, made_by)
            chunks = pack(progress.watch(parts, tally), recipe, tally)
            first = next(chunks, None)  # before slow libraries are loaded
            if first is None:
                shutil.rmtree(work)
                if tally.documents == 0:
                    raise UserError(f"--source {source.spec}: holds no text")
                raise UserError(
                    f"--source {source.spec}: its {tally.tokens} tokens do not fill one chunk of {recipe.length}; "
                    "give more text or a smaller --length"
                )
            from data_prep.pack_writer import PackWriter, facts

            writer = PackWriter(work, tokenizer, recipe.length, pool)
            writer.add(first)
            for chunk in chunks:
                writer.add(chunk)
            spec = shlex.join(source.specs) or source.spec
            about = replace(
                facts(tokenizer, recipe.length, tally, name=source.name, source=spec, settings=settings),
                packing=recipe.packing,
                frame=recipe.frame,
                detokenizer=settings["detokenizer"],
                revision=source.revision(),
                files=[(str(file), file.stat().st_size) for file in source.files],
                left_out={"nulls": position.nulls, "blank": position.blank},
            )
            manifest = writer.finish(about)
            put_in_place(work / "pack", out)
            return manifest


def _limited(pieces: Iterable[Piece], documents: int | None) -> Iterator[Piece]:
    seen = 0
    for piece in pieces:
        seen += piece.starts
        if documents is not None and seen > documents:
            return
        yield piece
