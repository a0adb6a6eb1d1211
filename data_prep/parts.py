"""First stage of a preparation: the source in parts of some million characters, each tokenized into a file.

Where a part ends is decided only by the text, so the number of workers changes nothing. A part's file appears whole
or not at all and names the text that it holds, so that a preparation which is started again keeps what fits.
"""

from __future__ import annotations

import io
import itertools
import os
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np

    from bd3_ds.data.tokenizer_base import Tokenizer
    from data_prep.packing import Encoded
    from data_prep.pieces import Piece
    from data_prep.workers import Workers

PART_CHARACTERS = 1 << 21  # half a million tokens: half a second of work


class Part(NamedTuple):
    """Tokens of a part; `bytes` of text after the detokenizer; `fresh` where it was tokenized in this start."""

    run: Encoded
    bytes: int
    fresh: bool


def encode_parts(pieces: Iterable[Piece], workers: Workers, folder: Path, made_by: str) -> Iterator[Part]:
    """The parts of `pieces` in their order, tokenized by `workers`, which were started with `start_worker`.

    `made_by` names what decides the tokens of a text. As many parts as keep the workers busy are in memory.
    """
    waiting: deque[tuple[Path, Future[Any] | None]] = deque()
    for index, part in enumerate(cut(pieces)):
        file, digest = folder / f"{index:06d}.npz", _digest(part, made_by)
        done = _digest_in(file) == digest
        waiting.append((file, None if done else workers.submit(encode_part, part, file, digest)))
        if len(waiting) > 2 * workers.count:
            yield _load(*waiting.popleft())
    while waiting:
        yield _load(*waiting.popleft())


def cut(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in parts of at least PART_CHARACTERS characters, but for the last."""
    part, size = [], 0
    for piece in pieces:
        part.append(piece)
        size += len(piece.text)
        if size >= PART_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


_worker: tuple[Any, Any] | None = None


def start_worker(tokenizer_dir: str, detokenizer: str) -> None:
    """Load what `encode_part` needs in this process."""
    from bd3_ds.data.tokenizer import load_tokenizer
    from data_prep.detokenizers import DETOKENIZERS

    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = load_tokenizer(tokenizer_dir), DETOKENIZERS[detokenizer]


def encode_part(part: list[Piece], file: Path, digest: str) -> None:
    """Tokenize a part into `file`; a document without a token is no document."""
    import numpy as np

    from bd3_ds.runtime.files import write_bytes

    assert _worker is not None
    tokenizer, detokenize = _worker
    texts = [detokenize(piece.text) for piece in part]
    encoded = encode_pieces(tokenizer, texts, [piece.starts for piece in part])
    lengths = np.array([len(ids) for ids in encoded])
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype, int(lengths.sum()))
    begins = np.array([piece.starts for piece in part]) & (lengths > 0)
    starts = (np.cumsum(lengths) - lengths)[begins]
    size = sum(len(text.encode()) for text in texts)
    content = io.BytesIO()
    np.savez(content, ids=ids, starts=starts, bytes=size, digest=digest)
    write_bytes(file, content.getvalue())


_CUTS = ("\n", " ", "\n\n")  # what a piece that goes on with a document begins with
_BEFORE = ("a", ".", "0", "\n")


def shows_cuts(tokenizer: Tokenizer) -> bool:
    """Whether a text that is cut in pieces has other tokens than the whole, such as a space in front of each piece."""
    texts = [text for cut in _CUTS for text in ("a" + cut + "b", "a", cut + "b")]
    try:
        ids = tokenizer.encode_batch(texts)
    except UserError:  # one of single characters, which has not all of these
        return False
    return any(ids[i] != ids[i + 1] + ids[i + 2] for i in range(0, len(ids), 3))


def encode_pieces(tokenizer: Tokenizer, texts: list[str], starts: list[bool]) -> list[list[int]]:
    """The tokens of pieces, such that those of a document's pieces are the document's own.

    Where the tokenizer puts something in front of a text, a piece that goes on is encoded after a character, whose
    tokens are then left out. Raises UserError where no character stays by itself.
    """
    if all(starts) or not shows_cuts(tokenizer):
        return tokenizer.encode_batch(texts)
    found = tokenizer.encode_batch([text if start else "" for text, start in zip(texts, starts, strict=True)])
    for i, text in enumerate(texts):
        if starts[i]:
            continue
        for before in _BEFORE:
            alone, both = tokenizer.encode_batch([before, before + text])
            if both[: len(alone)] == alone:
                found[i] = both[len(alone) :]
                break
        else:
            raise UserError(
                "--tokenizer: puts something in front of each text that it reads, so that a long text cannot be cut "
                "for it; give a .jsonl file with a document a line, or another tokenizer"
            )
    return found


def _digest(part: list[Piece], made_by: str) -> str:
    from xxhash import xxh3_128

    digest = xxh3_128(made_by)
    for piece in part:
        text = piece.text.encode()
        digest.update(b"%d %d\n" % (piece.starts, len(text)))
        digest.update(text)
    return digest.hexdigest()


def _digest_in(file: Path) -> str | None:
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as stored:
            return str(stored["digest"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _load(file: Path, future: Future[Any] | None) -> Part:
    import numpy as np

    from data_prep.packing import Encoded
    from data_prep.workers import result

    if future is not None:
        result(future)
    with np.load(file, allow_pickle=False) as stored:
        ids: np.ndarray = stored["ids"].astype(np.int64)
        return Part(Encoded(ids, stored["starts"]), int(stored["bytes"]), future is not None)
