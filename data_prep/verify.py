"""Check a pack from its index to its last token, and show what is in it.

python -m data_prep.verify DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, run_command

SAMPLES, SAMPLE_CHARACTERS, FREQUENT = 2, 400, 10


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError naming the first damaged shard."""
    parse = Parser("data_prep.verify", "Check every shard of a pack.")
    parse.add_argument("directory", help="a directory that data_prep.prepare made")
    verify(Path(parse.parse(argv).directory))
    return 0


def verify(directory: Path) -> None:
    """Check sizes, hashes, counts, token range, tokenizer and pack hash, and print the findings; raises UserError."""
    import numpy as np

    from bd3_ds.data.pack import COUNTS, PackHash, TokenizerInfo, open_pack, read_token_counts

    pack = open_pack(directory)
    manifest = pack.manifest
    tokenizer = pack.tokenizer
    if TokenizerInfo.of(tokenizer) != manifest.tokenizer:
        raise UserError(f"{directory}: its tokenizer/ is not the tokenizer of its manifest; make the pack again")
    digest, counts, starts = PackHash(), np.zeros(tokenizer.vocab_size, np.int64), 0
    for i in range(len(pack)):
        tokens = pack.tokens(i)
        digest.add(tokens)
        if tokens.max() >= tokenizer.vocab_size:
            raise UserError(f"{directory}: chunk {i} holds token {tokens.max()}, outside the vocabulary")
        counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
        starts += len(pack.doc_starts(i))
    if digest.hexdigest() != manifest.pack_hash:
        raise UserError(f"{directory}: its chunks do not have the manifest's hash; make the pack again")
    if (directory / COUNTS).is_file() and (read_token_counts(directory) != counts).any():
        raise UserError(f"{directory}: its {COUNTS} does not count its tokens; make the pack again")
    print(f"{directory}: {len(pack.index)} shards, {len(pack)} chunks of {manifest.length}, {starts} document starts")
    print(f"source {manifest.source}, frame {manifest.frame}, detokenizer {manifest.detokenizer}")
    print(f"vocabulary {manifest.tokenizer.vocab_size}, of which {int((counts > 0).sum())} occur")
    total = counts.sum()
    for token in np.argsort(-counts, kind="stable")[:FREQUENT]:
        shown = tokenizer.decode([int(token)]) or "(special)"
        print(f"  {token:6d} {shown!r:14} {100 * counts[token] / total:5.2f} %")
    for i in np.linspace(0, len(pack) - 1, min(SAMPLES, len(pack))).astype(int):
        print(f"--- chunk {i}\n{tokenizer.decode(pack.tokens(int(i)))[:SAMPLE_CHARACTERS]}")
    print(f"ok, pack hash {manifest.pack_hash}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
