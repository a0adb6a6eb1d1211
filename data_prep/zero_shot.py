"""Prepare the zero-shot evaluation sets, all with one tokenizer and length, and print what each pack holds.

    python -m data_prep.zero_shot --tokenizer gpt2 --length 1024 --out data/zero-shot [NAME=PATH ...]

Sets are read from the hub, or from the local copies that are named. Packs that are there already are left alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, did_you_mean, run_command
from data_prep import prepare
from data_prep.options import local_directory

SETS = ("ptb", "wikitext2", "wikitext103", "lm1b", "lambada", "ag_news", "pubmed", "arxiv")


def main(argv: list[str]) -> int:
    """Run the command; returns 0 or raises UserError."""
    parse = Parser("data_prep.zero_shot", "Make the packs of the zero-shot sets.")
    parse.add_argument("sets", nargs="*", metavar="NAME[=PATH]", help=f"default: all of {', '.join(SETS)}")
    parse.add_argument("--tokenizer", required=True, help="as in data_prep.prepare")
    parse.add_argument("--length", required=True, help="as in data_prep.prepare")
    parse.add_argument("--out", required=True, help="directory that is to hold a pack for each set, by its name")
    parse.add_argument("--workers", help="as in data_prep.prepare")
    options = parse.parse(argv)
    chosen = {word.partition("=")[0]: word for word in options.sets or SETS}
    if unknown := [name for name in chosen if name not in SETS]:
        raise UserError(*(f"'{name}' is no zero-shot set; {did_you_mean(name, SETS)}" for name in unknown))
    out = local_directory("--out", options.out)
    workers = [] if options.workers is None else ["--workers", options.workers]
    for name, source in chosen.items():
        words = ["--source", source, "--tokenizer", options.tokenizer, "--length", options.length]
        prepare.main([*words, "--frame", "bos-eos", "--out", str(out / name), *workers])
    print("\n".join(table([out / name for name in chosen])))
    return 0


def table(packs: list[Path]) -> list[str]:
    """Markdown rows: each pack's documents, tokens, chunks, scored positions (all but each chunk's first) and hash."""
    from bd3_ds.data.manifest import read_manifest

    rows = [
        "| set | documents | tokens | chunks | scored | dropped | pack hash | content hash |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pack in packs:
        made = read_manifest(pack)
        scored = made.chunks * (made.length - 1)
        rows.append(
            f"| {pack.name} | {made.documents} | {made.tokens} | {made.chunks} | {scored} | {made.dropped_tokens} | "
            f"{made.pack_hash[:16]} | {made.content_hash[:16]} |"
        )
    return rows


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
