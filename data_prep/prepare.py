"""Make a pack: text -> detokenizer -> tokens -> chunks -> MDS shards.

    python -m data_prep.prepare --source NAME|NAME=PATH|FILE|DIR|'PATTERN*'|HUB ... --tokenizer SPEC --length L --out DIR|s3://...

The same settings give the same pack, to the byte, whatever the number of workers. A directory that already holds the
pack is left as it is; a preparation that was stopped in any way goes on where it was when it is started again.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, did_you_mean, run_command
from data_prep.options import add_sources, output, say_files, whole_number
from data_prep.same_pack import check_same

if TYPE_CHECKING:
    from bd3_ds.data.manifest import Manifest
    from bd3_ds.data.tokenizer_base import Tokenizer
    from data_prep.pieces import Piece, Source

LEAST_LENGTH = 4


def parser() -> Parser:
    """The command's options."""
    parse = Parser("data_prep.prepare", "Tokenize text and pack it into chunks of one length.")
    add = parse.add_argument
    add_sources(parse)
    add("--tokenizer", required=True, help=".model file, directory, hub name such as gpt2, or characters")
    add("--length", required=True, help="tokens in a chunk, frame and padding included")
    add(
        "--out", required=True, help="directory to make, or s3://BUCKET/PREFIX and other addresses that streaming knows"
    )
    add("--split", help="split of a named or hub set; for a directory: the files whose names tell it")
    add("--packing", default="wrap", help="wrap (default): end to end; aligned: documents start on block boundaries; "
        "no-split: a document a chunk")  # fmt: skip
    add("--frame", help="none: EOS after each document; bos-eos: BOS + text + EOS in each chunk (default: the set's)")
    add(
        "--block-size",
        help="aligned: the blocks' size; models of this or a smaller block size that divides it can use it",
    )
    add("--detokenizer", help="rules that undo a set's own tokenisation (default: the set's, else none)")
    add("--text-field", help="key or column that holds the text (default: the set's, else text)")
    add("--revision", help="commit of a hub set (default: the newest)")
    add("--workers", default=str(os.cpu_count() or 1), help="processes that tokenize and write (default: all cores)")
    add("--limit-documents", help="stop after so many documents")
    add(
        "--scratch",
        help="where a pack for a remote --out is made before it is sent (default: the system's temporary place)",
    )
    add("--overwrite", action="store_true", help="replace a pack made with other settings")
    return parse


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError."""
    options = parser().parse(argv)
    length = whole_number("--length", options.length, LEAST_LENGTH, "tokens")
    workers = whole_number("--workers", options.workers, 1)
    limit = None if options.limit_documents is None else whole_number("--limit-documents", options.limit_documents, 1)
    out, remote = output(options.out, options.scratch)
    from data_prep.detokenizers import DETOKENIZERS
    from data_prep.packing import ALIGNED, FRAMES, PACKINGS
    from data_prep.sources import open_sources
    from data_prep.work_directory import drop_work_directory, revision_begun

    _check_name("--packing", options.packing, PACKINGS)
    _check_name("--frame", options.frame, FRAMES)
    _check_name("--detokenizer", options.detokenizer, DETOKENIZERS)
    block_size = _block_size(options, length)
    words = options.source
    revision = options.revision or revision_begun(out, words[0] if len(words) == 1 else shlex.join(words))
    given = [name for name in ("detokenizer", "frame") if getattr(options, name) is not None]
    given += ["frame"] if options.packing == ALIGNED else []  # which has but one
    source = open_sources(words, options.split, options.text_field, revision, given)
    from bd3_ds.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    settings = _settings(options, source, tokenizer, length, block_size, limit)
    if remote is not None:
        from data_prep.upload import already_sent, send

        if already_sent(remote, settings, options.overwrite):
            drop_work_directory(out)
            shutil.rmtree(out, ignore_errors=True)  # a start that was killed once all was sent
            return 0
        if not _made_before(out, settings):
            say_files(source)
            prepare(source, tokenizer, out, settings, workers)
        send(out, remote)
        report(out, options.out)
        say_next(options.out, remote=True)
        shutil.rmtree(out)
        return 0
    if not already_there(out, settings, options.overwrite):
        say_files(source)
        prepare(source, tokenizer, out, settings, workers)
    report(out, options.out)
    say_next(options.out, remote=False)
    return 0


def prepare(source: Source, tokenizer: Tokenizer, out: Path, settings: dict[str, Any], workers: int = 1) -> Manifest:
    """Read `source` to its end, write the pack `out` and return its manifest; `settings` as `main` makes them.

    Finished parts of an earlier start are used again. Raises UserError where there is too little text or disk.
    """
    from data_prep.work_directory import work_directory, work_directory_of

    try:
        with work_directory(out) as work:
            return _prepare(source, tokenizer, out, settings, workers, work)
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


def _prepare(
    source: Source, tokenizer: Tokenizer, out: Path, settings: dict[str, Any], workers: int, work: Path
) -> Manifest:
    from data_prep.packing import Recipe, Tally, pack
    from data_prep.parts import encode_parts, shows_cuts, start_worker
    from data_prep.pieces import Position
    from data_prep.progress import Progress
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
            Progress(source.name, position) as progress,
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


def _check_name(option: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in (names := list(known)):
        raise UserError(f"{option} {value}: unknown; {did_you_mean(value, names)}")


def _block_size(options: Namespace, length: int) -> int | None:
    if options.packing != "aligned":
        if options.block_size is not None:
            raise UserError(f"--block-size {options.block_size}: is for --packing aligned alone; leave it out")
        return None
    if options.block_size is None:
        raise UserError("--packing aligned: needs --block-size, the blocks on whose boundaries documents are to start")
    if options.frame == "bos-eos":
        raise UserError("--packing aligned: has no --frame bos-eos, whose BOS would shift the blocks; leave it out")
    block_size = whole_number("--block-size", options.block_size, 1, "tokens")
    if length % block_size:
        raise UserError(f"--block-size {block_size}: must divide --length {length}")
    return block_size


def _settings(
    options: Namespace, source: Source, tokenizer: Tokenizer, length: int, block_size: int | None, limit: int | None
) -> dict[str, Any]:
    """Everything that decides the chunks; equal settings, equal pack."""
    return {
        "source": list(source.specs) or source.spec,
        "source_bytes": source.size,
        "split": source.split,
        "revision": options.revision,
        "text_field": options.text_field,
        "limit_documents": limit,
        "tokenizer": tokenizer.fingerprint,
        "length": length,
        "packing": options.packing,
        "frame": "none" if options.packing == "aligned" else options.frame or source.frame,
        "block_size": block_size,
        "detokenizer": options.detokenizer or source.detokenizer,
    }


def already_there(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is this very pack; raises UserError for anything else there that may not be replaced."""
    from bd3_ds.data.manifest import MANIFEST, read_manifest
    from bd3_ds.data.shards import read_index
    from bd3_ds.runtime.files import require_writable
    from data_prep.work_directory import drop_work_directory

    if os.path.ismount(out) or out.name in ("", ".."):
        raise UserError(f"--out {out}: a pack takes the place of its directory, which cannot be; name one inside it")
    require_writable(out.parent)
    if not out.exists():
        return False
    if not (out / MANIFEST).is_file():
        if any(out.iterdir()):
            raise UserError(f"--out {out}: exists and is not a data pack, so it is never overwritten; choose another")
        return False
    if overwrite:
        return False
    check_same(str(out), read_manifest(out), settings)
    read_index(out)
    drop_work_directory(out)
    print(f"{out} already holds this pack; nothing to do")
    return True


def _made_before(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the scratch place `out` holds this pack, made by a start that was stopped before all of it was sent."""
    from bd3_ds.data.manifest import MANIFEST, read_manifest

    return (out / MANIFEST).is_file() and read_manifest(out).settings == settings


def report(out: Path, shown: str) -> None:
    """Print what the pack `out` holds, under the name `shown`, and what was left out of it."""
    from bd3_ds.data.manifest import read_manifest

    manifest = read_manifest(out)
    padding = f", {manifest.padding} places of padding" if manifest.padding else ""
    print(
        f"{shown}: {manifest.documents} documents, {manifest.tokens} tokens, {manifest.bytes} bytes, "
        f"{manifest.chunks} chunks of {manifest.length}, {manifest.dropped_tokens} tokens dropped{padding}, "
        f"pack hash {manifest.pack_hash}"
    )
    nulls, blank = manifest.left_out.get("nulls", 0), manifest.left_out.get("blank", 0)
    if nulls or blank:
        print(f"left out because they hold no text: {nulls} null, {blank} empty")


def say_next(shown: str, remote: bool) -> None:
    """Print what is usually done with a pack."""
    place = shlex.quote(shown)
    check = "" if remote else f"`python -m data_prep.verify {place}` checks it; "
    print(f"next: {check}train on it with data.train={place}, or score models on it with eval.sets.NAME={place}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
