"""Make a pack of a source whose entropy is known: `bd3_ds.data.synthetic.MarkovSource`.

    python -m data_prep.synthetic --symbols 16 --length 64 --chunks 16384 --seed 1 --out DIR

Its tokenizer writes the symbols as numbers. The manifest's settings rebuild the source: `MarkovSource.of`. Another
--part of the same seed is other text of the same source, such as a held-out set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, run_command
from data_prep.options import LEAST_LENGTH, local_directory, whole_number
from data_prep.pack_report import report
from data_prep.same_pack import already_there

if TYPE_CHECKING:
    from bd3_ds.data.synthetic import MarkovSource
    from data_prep.packing import Chunk

MOST_SYMBOLS = 1024  # the transition matrix and the rows drawn at once grow with them
MOST_SEED = 2**63 - 1
ROWS_AT_ONCE = 1024


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError."""
    parse = Parser("data_prep.synthetic", "Make a pack of a Markov chain whose entropy rate is known.")
    parse.add_argument("--symbols", default="16", help="size of the alphabet (default: 16)")
    parse.add_argument("--length", required=True, help="tokens in a chunk; each chunk is a stretch of its own")
    parse.add_argument("--chunks", required=True, help="how many")
    parse.add_argument("--seed", default="1", help="decides the source and its text (default: 1)")
    parse.add_argument("--part", default="0", help="other text of the same source, for held-out sets (default: 0)")
    parse.add_argument("--out", required=True, help="directory to make")
    parse.add_argument("--overwrite", action="store_true", help="replace a pack made with other settings")
    options = parse.parse(argv)
    symbols = whole_number("--symbols", options.symbols, 2)
    length = whole_number("--length", options.length, LEAST_LENGTH, "tokens")
    chunks = whole_number("--chunks", options.chunks, 1)
    seed, part = whole_number("--seed", options.seed, 0), whole_number("--part", options.part, 0)
    out = local_directory("--out", options.out)
    if symbols > MOST_SYMBOLS:
        raise UserError(f"--symbols {symbols}: must be at most {MOST_SYMBOLS}")
    for option, value in (("--seed", seed), ("--part", part)):
        if value > MOST_SEED:
            raise UserError(f"{option} {value}: must be at most {MOST_SEED}")
    from bd3_ds.data.synthetic import MarkovSource
    from bd3_ds.data.tokenizer import number_tokenizer
    from data_prep.pack_writer import write_pack

    source = MarkovSource(symbols, seed)
    settings = {"source": "markov", **source.settings(), "part": part, "length": length, "chunks": chunks}
    if not already_there(out, settings, options.overwrite):
        write_pack(
            out,
            stretches(source, chunks, length, part),
            number_tokenizer(symbols),
            length,
            name=f"markov-{symbols}",
            source="markov",
            settings=settings,
        )
    report(out, options.out)
    print(f"entropy rate {source.entropy_rate:.6f} nats a token")
    return 0


def stretches(source: MarkovSource, chunks: int, length: int, part: int) -> Iterator[Chunk]:
    """Chunks as `write_pack` takes them, each a document of its own."""
    import numpy as np

    from data_prep.packing import Chunk

    for piece, first in enumerate(range(0, chunks, ROWS_AT_ONCE)):
        rows = source.sample(min(ROWS_AT_ONCE, chunks - first), length, part, piece)
        yield from (Chunk(row, np.array([0])) for row in rows)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
