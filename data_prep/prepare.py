"""Make a pack: text -> detokenizer -> tokens -> chunks -> MDS shards.

    python -m data_prep.prepare --source NAME|NAME=PATH|FILE|DIR|HUB --tokenizer SPEC --length L --out DIR

The same settings give the same chunks, and the same pack hash, whatever the number of workers. A directory that
already holds the pack is left as it is.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, did_you_mean, run_command
from data_prep.options import local_directory, whole_number

if TYPE_CHECKING:
    import numpy as np

    from bd3_ds.data.pack import Manifest
    from bd3_ds.data.tokenizer import Tokenizer
    from data_prep.files import Piece
    from data_prep.packing import Chunk, Encoded, Tally
    from data_prep.sources import Source

SHARD_BYTES = 1 << 24  # unpacked; one shard is what random access unpacks at a time
BATCH_CHARACTERS = 1 << 19  # text handed to a worker at once
LEAST_LENGTH = 4


def parser() -> Parser:
    """The command's options."""
    parse = Parser("data_prep.prepare", "Tokenize text and pack it into chunks of one length.")
    add = parse.add_argument
    add("--source", required=True, help="named set, NAME=PATH (a named set's local copy), FILE, DIR, OWNER/NAME (hub)")
    add("--tokenizer", required=True, help=".model file, directory, or hub name such as gpt2")
    add("--length", required=True, help="tokens in a chunk, frame included")
    add("--out", required=True, help="directory to make")
    add("--split", help="split of a named or hub set; for a directory: the files whose names begin with it")
    add("--frame", help="none: EOS after each document; bos-eos: BOS + length - 2 tokens + EOS (default: the set's)")
    add("--detokenizer", help="rules that undo a set's own tokenisation (default: the set's, else none)")
    add("--text-field", help="key or column that holds the text (default: the set's, else text)")
    add("--workers", default=str(os.cpu_count() or 1), help="processes that tokenize (default: all cores)")
    add("--limit-documents", help="stop after so many documents")
    add("--overwrite", action="store_true", help="replace a pack made with other settings")
    return parse


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError."""
    options = parser().parse(argv)
    length = whole_number("--length", options.length, LEAST_LENGTH, "tokens")
    workers = whole_number("--workers", options.workers, 1)
    limit = None if options.limit_documents is None else whole_number("--limit-documents", options.limit_documents, 1)
    out = local_directory("--out", options.out)
    from data_prep.detokenizers import DETOKENIZERS
    from data_prep.packing import FRAMES
    from data_prep.sources import open_source

    _check_name("--frame", options.frame, FRAMES)
    _check_name("--detokenizer", options.detokenizer, DETOKENIZERS)
    source = open_source(options.source, options.split, options.text_field)
    from bd3_ds.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    settings = _settings(options, source, tokenizer, length, limit)
    if already_there(out, settings, options.overwrite):
        return 0
    manifest = prepare(source, tokenizer, out, settings, workers, options.overwrite)
    report(manifest, out)
    return 0


def prepare(
    source: Source, tokenizer: Tokenizer, out: Path, settings: dict[str, Any], workers: int = 1, overwrite: bool = False
) -> Manifest:
    """Read `source` to its end, write the pack `out` and return its manifest; `settings` as `main` makes them."""
    from data_prep.packing import Tally, wrap

    tally = Tally()
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(Path(saved))
        pieces = _limited(source.pieces(), settings["limit_documents"])
        runs = _progress(encode(pieces, saved, settings["detokenizer"], workers, tally), tally)
        chunks = wrap(runs, settings["length"], settings["frame"], tokenizer.bos_id, tokenizer.eos_id, tally)
        first = next(chunks, None)  # before the directory is made and the slow libraries are loaded
        if tally.documents == 0:
            raise UserError(f"--source {source.spec}: holds no text")
        if first is None:
            raise UserError(
                f"--source {source.spec}: its {tally.tokens} tokens do not fill one chunk of {settings['length']}; "
                "give more text or a smaller --length"
            )
        return write_pack(
            out,
            itertools.chain([first], chunks),
            tokenizer,
            settings["length"],
            name=source.name,
            source=source.spec,
            frame=settings["frame"],
            detokenizer=settings["detokenizer"],
            tally=tally,
            settings=settings,
            overwrite=overwrite,
        )


def encode(
    pieces: Iterable[Piece], tokenizer_dir: str, detokenizer: str, workers: int, tally: Tally
) -> Iterator[Encoded]:
    """Tokenize pieces in their order with `workers` processes, a batch a run; counts bytes in `tally`."""
    batches = _batches(pieces)
    if workers == 1:
        _start_worker(tokenizer_dir, detokenizer)
        for size, run in map(_encode_batch, batches):
            tally.bytes += size
            yield run
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (tokenizer_dir, detokenizer)) as pool:
        # A pool reads its input as fast as it can, so the waiting batches are bounded here.
        waiting: list[Any] = []
        for batch in batches:
            waiting.append(pool.apply_async(_encode_batch, (batch,)))
            if len(waiting) > 2 * workers:
                size, run = waiting.pop(0).get()
                tally.bytes += size
                yield run
        for result in waiting:
            size, run = result.get()
            tally.bytes += size
            yield run


def write_pack(
    out: Path,
    chunks: Iterable[Chunk | tuple[np.ndarray, np.ndarray]],
    tokenizer: Tokenizer,
    length: int,
    *,
    name: str,
    source: str = "arrays",
    frame: str = "none",
    detokenizer: str = "none",
    tally: Tally | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write chunks (tokens [length], offsets at which documents begin) as the pack `out`, which appears whole or not.

    Without a `tally`, documents and tokens are counted from the chunks and bytes is 0. Raises UserError if `out`
    exists and `overwrite` is not set, ValueError for a chunk of another length, with an id outside the vocabulary or
    with the mask id.
    """
    import numpy as np

    from bd3_ds.data.pack import COUNTS, FORMAT, MANIFEST, TOKENIZER_DIR, Manifest, PackHash, TokenizerInfo
    from bd3_ds.data.streaming_import import import_streaming
    from bd3_ds.runtime.files import new_directory, write_json

    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    columns = {"tokens": f"ndarray:{dtype}:{length}", "doc_starts": "bytes", "pad_starts": "bytes"}
    streaming = import_streaming()
    digest, count, documents = PackHash(), 0, 0
    occurrences = np.zeros(tokenizer.vocab_size, np.int64)
    with new_directory(Path(out), replace=overwrite) as directory:
        with streaming.MDSWriter(
            out=str(directory), columns=columns, compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES
        ) as writer:
            for tokens, starts, *pads in chunks:
                tokens = np.asarray(tokens)
                if tokens.shape != (length,) or tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
                    raise ValueError(f"chunk {count}: not {length} ids below {tokenizer.vocab_size}")
                if (tokens == tokenizer.mask_id).any():
                    raise ValueError(f"chunk {count} holds the mask id {tokenizer.mask_id}")
                writer.write(
                    {
                        "tokens": tokens.astype(dtype),
                        "doc_starts": np.asarray(starts).astype("<u4").tobytes(),
                        "pad_starts": np.concatenate([[], *pads]).astype("<u4").tobytes(),
                    }
                )
                digest.add(tokens)
                occurrences += np.bincount(tokens, minlength=tokenizer.vocab_size)
                count += 1
                documents += len(starts)
        np.save(directory / COUNTS, occurrences)
        tokenizer.save(directory / TOKENIZER_DIR)
        manifest = Manifest(
            format=FORMAT,
            name=name,
            source=source,
            tokenizer=TokenizerInfo.of(tokenizer),
            length=length,
            packing="wrap",
            frame=frame,
            detokenizer=detokenizer,
            revision=None,
            padding=0,
            documents=tally.documents if tally else documents,
            tokens=tally.tokens if tally else count * length,
            bytes=tally.bytes if tally else 0,
            dropped_tokens=tally.dropped_tokens if tally else 0,
            chunks=count,
            dtype=dtype,
            pack_hash=digest.hexdigest(),
            settings=settings or {},
        )
        write_json(directory / MANIFEST, manifest.to_json())
    return manifest


_worker: tuple[Any, Any] | None = None


def _start_worker(tokenizer_dir: str, detokenizer: str) -> None:
    from bd3_ds.data.tokenizer import load_tokenizer
    from data_prep.detokenizers import DETOKENIZERS

    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = load_tokenizer(tokenizer_dir), DETOKENIZERS[detokenizer]


def _encode_batch(batch: list[Piece]) -> tuple[int, Encoded]:
    """The batch's bytes of text and its tokens; a document without a token is no document."""
    import numpy as np

    from data_prep.packing import Encoded

    assert _worker is not None
    tokenizer, detokenize = _worker
    texts = [detokenize(piece.text) for piece in batch]
    encoded = tokenizer.encode_batch(texts)
    lengths = np.array([len(ids) for ids in encoded])
    ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, int(lengths.sum()))
    begins = np.array([piece.starts for piece in batch]) & (lengths > 0)
    return sum(len(text.encode()) for text in texts), Encoded(ids, (np.cumsum(lengths) - lengths)[begins])


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _limited(pieces: Iterable[Piece], documents: int | None) -> Iterator[Piece]:
    seen = 0
    for piece in pieces:
        seen += piece.starts
        if documents is not None and seen > documents:
            return
        yield piece


def _progress(runs: Iterator[Encoded], tally: Tally) -> Iterator[Encoded]:
    from tqdm import tqdm

    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, disable=None) as bar:
        for run in runs:
            yield run
            bar.set_postfix(documents=tally.documents, refresh=False)
            bar.update(len(run.ids))


def _check_name(option: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in (names := list(known)):
        raise UserError(f"{option} {value}: unknown; {did_you_mean(value, names)}")


def _settings(
    options: Namespace, source: Source, tokenizer: Tokenizer, length: int, limit: int | None
) -> dict[str, Any]:
    """Everything that decides the chunks; equal settings, equal pack."""
    return {
        "source": source.spec,
        "source_bytes": source.size,
        "split": source.split,
        "text_field": options.text_field,
        "limit_documents": limit,
        "tokenizer": tokenizer.fingerprint,
        "length": length,
        "frame": options.frame or source.frame,
        "detokenizer": options.detokenizer or source.detokenizer,
    }


def already_there(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is this very pack; raises UserError for anything else there that may not be replaced."""
    from bd3_ds.data.pack import MANIFEST, read_index, read_manifest
    from bd3_ds.runtime.files import require_writable

    require_writable(out.parent)
    if not out.exists():
        return False
    if not (out / MANIFEST).is_file():
        if any(out.iterdir()):
            raise UserError(f"--out {out}: exists and is not a data pack, so it is never overwritten; choose another")
        out.rmdir()
        return False
    if overwrite:
        return False
    manifest = read_manifest(out)
    if manifest.settings != settings:
        changed = [key for key in settings if manifest.settings.get(key) != settings[key]]
        raise UserError(
            f"--out {out}: holds a pack made with another {', '.join(changed)}; choose another directory or give "
            "--overwrite"
        )
    read_index(out)
    print(f"{out} already holds this pack; nothing to do")
    report(manifest, out)
    return True


def report(manifest: Manifest, out: Path) -> None:
    """Print what a pack holds."""
    print(
        f"{out}: {manifest.documents} documents, {manifest.tokens} tokens, {manifest.bytes} bytes, "
        f"{manifest.chunks} chunks of {manifest.length}, {manifest.dropped_tokens} tokens dropped, "
        f"pack hash {manifest.pack_hash}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
