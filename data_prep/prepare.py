"""Make a pack: text -> detokenizer -> tokens -> chunks -> MDS shards.

    python -m data_prep.prepare --source NAME|NAME=PATH|FILE|DIR|'PATTERN*'|HUB ... --tokenizer SPEC --length L --out DIR|s3://...

The same settings give the same pack, to the byte, whatever the number of workers. A directory that already holds the
pack is left as it is; a preparation that was stopped in any way goes on where it was when it is started again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, did_you_mean, run_command
from data_prep.make_pack import make_pack
from data_prep.options import LEAST_LENGTH, add_sources, output, say_files, whole_number
from data_prep.pack_report import report, say_next
from data_prep.same_pack import already_there, made_before

if TYPE_CHECKING:
    from bd3_ds.data.tokenizer_base import Tokenizer
    from data_prep.pieces import Source


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
        if not made_before(out, settings):
            say_files(source)
            make_pack(source, tokenizer, out, settings, workers)
        send(out, remote)
        report(out, options.out)
        say_next(options.out, remote=True)
        shutil.rmtree(out)
        return 0
    if not already_there(out, settings, options.overwrite):
        say_files(source)
        make_pack(source, tokenizer, out, settings, workers)
    report(out, options.out)
    say_next(options.out, remote=False)
    return 0


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


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
