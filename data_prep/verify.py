"""Verifies a pack from its index to its last token, and shows samples of it.

python -m data_prep.verify DIR
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.tables import console_table
from data_prep.packing import BOS_EOS

if TYPE_CHECKING:
    import numpy as np

    from bd3_ds.data.manifest import Manifest
    from bd3_ds.data.pack import Pack

SAMPLES, SAMPLE_CHARACTERS, FREQUENT = 2, 400, 10


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError naming each damaged shard."""
    parse = Parser("data_prep.verify", "Check every shard of a pack.")
    parse.add_argument("directory", help="a directory that data_prep.prepare made")
    directory = Path(parse.parse(argv).directory)
    try:
        verify(directory)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {directory} is not wholly checked, and as it was") from None
    return 0


def verify(directory: Path) -> None:
    """Check shards, counts, token range, tokenizer and pack hash, and print the findings.

    Raises UserError with a sentence for each broken shard, and one that says how to mend them.
    """
    import numpy as np
    from tqdm import tqdm

    from bd3_ds.data.documents import document_numbers
    from bd3_ds.data.manifest import TokenizerInfo, read_manifest
    from bd3_ds.data.pack import open_pack
    from bd3_ds.data.pack_hash import PackHash
    from bd3_ds.data.token_counts import COUNTS, read_token_counts

    fix = f"to mend it, copy it anew from where it is whole, or make it again:\n{command(directory)}"
    manifest = read_manifest(directory)
    if broken := broken_shards(directory):
        raise UserError(*broken, f"{directory}: {len(broken)} shards are broken; {fix}")
    pack = open_pack(directory)
    tokenizer = pack.tokenizer
    if TokenizerInfo.of(tokenizer) != manifest.tokenizer:
        raise UserError(f"{directory}: its tokenizer/ is not the tokenizer of its manifest; {fix}")
    digest, counts, starts, padding = PackHash(), np.zeros(tokenizer.vocab_size, np.int64), 0, 0
    for i in tqdm(range(len(pack)), desc=f"verifying {directory}", unit="chunk", disable=None, leave=False):
        tokens = pack.tokens(i)
        if tokens.max() >= tokenizer.vocab_size:
            raise UserError(f"{directory}: chunk {i} holds token {tokens.max()}, outside the vocabulary; {fix}")
        numbers = document_numbers([pack.doc_starts(i)], [pack.pad_starts(i)], manifest.length)[0]
        digest.add(tokens[None], numbers[None] < 0)
        counts += np.bincount(tokens[numbers >= 0], minlength=tokenizer.vocab_size)
        starts += len(pack.doc_starts(i))
        padding += int((numbers < 0).sum())
    whole = digest.pack(manifest.length, manifest.frame)
    # An old pack with padding has the hash of its content under both names.
    if digest.content() != manifest.content_hash or manifest.pack_hash not in (whole, digest.content()):
        raise UserError(f"{directory}: its chunks do not have the manifest's hash; {fix}")
    framed = 2 * len(pack) if manifest.frame == BOS_EOS else 0
    kept = len(pack) * manifest.length - padding - framed
    if padding != manifest.padding or starts > manifest.documents or kept != manifest.tokens - manifest.dropped_tokens:
        raise UserError(
            f"{directory}: holds {kept} tokens of text, {padding} places of padding and {starts} document starts, "
            f"which does not fit the {manifest.tokens} tokens ({manifest.dropped_tokens} dropped), {manifest.padding} "
            f"places and {manifest.documents} documents of its manifest; {fix}"
        )
    if (directory / COUNTS).is_file() and (read_token_counts(directory, manifest) != counts).any():
        raise UserError(f"{directory}: its {COUNTS} does not count its tokens; {fix}")
    _show(directory, manifest, pack, counts, starts, padding)


def _show(directory: Path, manifest: Manifest, pack: Pack, counts: np.ndarray, starts: int, padding: int) -> None:
    """Print what is in a pack that is whole."""
    import numpy as np

    tokenizer = pack.tokenizer
    print(f"{directory}: {len(pack.index)} shards, {len(pack)} chunks of {manifest.length}, {starts} document starts")
    print(
        f"source {manifest.source}{f' at {manifest.revision}' if manifest.revision else ''}, "
        f"packing {manifest.packing}, frame {manifest.frame}, detokenizer {manifest.detokenizer}"
    )
    print(f"{manifest.tokens} tokens, {manifest.dropped_tokens} of them dropped; {padding} places of padding")
    print(f"vocabulary {manifest.tokenizer.vocab_size}, of which {int((counts > 0).sum())} occur")
    total = counts.sum()
    frequent = [
        (token, repr(tokenizer.decode([int(token)]) or "(special)"), f"{100 * counts[token] / total:.2f} %")
        for token in np.argsort(-counts, kind="stable")[:FREQUENT]
    ]
    print(console_table(("token", "text", "share"), frequent, left=(1,)))
    for i in np.linspace(0, len(pack) - 1, min(SAMPLES, len(pack))).astype(int):
        print(f"--- chunk {i}\n{tokenizer.decode(pack.tokens(int(i)))[:SAMPLE_CHARACTERS]}")
    print(f"ok, pack hash {manifest.pack_hash}, of its tokens alone {manifest.content_hash}")


def broken_shards(directory: Path) -> list[str]:
    """A sentence for each shard that is missing, cut, or other than its hash says."""
    from tqdm import tqdm

    from bd3_ds.data.shards import list_shards, read_shard_file

    broken = []
    for shard in tqdm(list_shards(directory), desc=f"reading {directory}", unit="shard", disable=None, leave=False):
        try:
            read_shard_file(directory, shard)
        except UserError as error:
            broken.append(str(error).partition(";")[0])
    return broken


def command(directory: Path) -> str:
    """The command that makes the pack again, as far as its manifest tells."""
    from bd3_ds.data.manifest import read_manifest
    from bd3_ds.data.pack import TOKENIZER_DIR

    manifest = read_manifest(directory)
    made = manifest.settings
    sources = made.get("source", manifest.source)
    given = ["--source", *([sources] if isinstance(sources, str) else sources)]
    if "packing" not in made:
        return f"the program that made it ({manifest.source})"
    if manifest.revision is not None:
        given += ["--revision", manifest.revision]
    for option in ("split", "text_field", "limit_documents", "packing", "block_size", "frame", "detokenizer"):
        if made[option] is not None:
            given += [f"--{option.replace('_', '-')}", str(made[option])]
    given += ["--tokenizer", str(directory / TOKENIZER_DIR), "--length", str(manifest.length), "--out", str(directory)]
    return shlex.join(["python", "-m", "data_prep.prepare", *given, "--overwrite"])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
