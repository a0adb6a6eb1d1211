"""`run.py evaluate EXPORT --sets lambada,wikitext2=DIR …`: perplexities of one export, as a table and as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bd3_ds.config.check import ESTIMATORS, estimator_used
from bd3_ds.evaluation.options import DEVICES, number_of_chunks, open_device
from bd3_ds.evaluation.packs import check_pack, choose_sets
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.runtime.files import require_writable, write_json


def main(argv: list[str]) -> int:
    """Check all sets first, then score them one by one."""
    options = _parser().parse(argv)
    if options.estimator is not None and options.estimator not in ESTIMATORS:
        raise UserError(f"--estimator {options.estimator} is unknown; {did_you_mean(options.estimator, ESTIMATORS)}")
    if options.json is not None:
        require_writable(options.json.resolve().parent)

    from bd3_ds.checkpoint.export import find_export

    export = find_export(options.export)
    defaults = export.run.eval
    estimator = options.estimator or defaults.estimator
    sets = choose_sets(options.sets.split(",") if options.sets else None, export, options.packs)
    option = "--estimator" if options.estimator else "eval.estimator"
    for name, directory in sets.items():
        manifest = check_pack(export, name, directory)
        chunks = min(manifest.chunks, options.max_chunks or defaults.max_chunks or manifest.chunks)
        estimator_used(export.run, estimator, option, chunks * (manifest.length - 1))

    from bd3_ds.evaluation.network import load_model
    from bd3_ds.evaluation.perplexity import evaluate_pack

    device = open_device(options.device)
    model = load_model(export, device)
    records = []
    for name, directory in sets.items():
        with _Bar(name) as bar:
            record = evaluate_pack(
                model,
                export,
                directory,
                name,
                estimator=estimator,
                views=options.views or defaults.views,
                batch=options.batch or defaults.batch,
                max_chunks=options.max_chunks or defaults.max_chunks,
                device=device,
                progress=bar,
            )
        records.append(record)
    print(f"{export.path} (step {export.step}), estimator {records[0]['estimator']}")
    print(format_table(records))
    if options.json is not None:
        write_json(options.json, records)
    return 0


def format_table(records: list[dict[str, Any]]) -> str:
    """Records as aligned columns: set, nats per token with their standard error, perplexity, tokens, pack."""
    report = "report_loss" in records[0]
    extra = ("report's loss", "its exp") if report else ()
    rows: list[tuple[str, ...]] = [("set", "nelbo (nats/token)", "ppl", "tokens", "pack", *extra)]
    for record in records:
        rows.append(
            (
                record["set"],
                f"{record['nelbo']:.4f} ± {record['stderr']:.4f}",
                f"{record['ppl']:.2f}",
                f"{record['tokens']:,}",
                record["pack_hash"][:8],
                *((f"{record['report_loss']:.4f}", f"{record['report_ppl']:.2f}") if report else ()),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align = (str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, *(str.rjust for _ in extra))
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)).rstrip()
        for row in rows
    )


class _Bar:
    """A tqdm bar on stderr that `evaluate_pack` moves; its length is known after the first batch."""

    def __init__(self, name: str):
        from tqdm import tqdm

        self._bar: Any = tqdm(desc=name, unit="seq", file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10.0)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def _parser() -> Parser:
    parser = Parser(
        prog="run.py evaluate", description="Perplexity of an export on frozen sets, with its standard error."
    )
    add = parser.add_argument
    add("export", metavar="EXPORT", help="directory under RUN_DIR/exports, or RUN_DIR for its newest")
    add("--sets", help="NAME or NAME=DIR, separated by commas (default: all of the run's eval.sets)")
    add("--packs", type=Path, metavar="DIR", help="where a NAME that the run does not know is looked for, as DIR/NAME")
    add("--estimator", metavar="|".join(ESTIMATORS), help="default: the run's eval.estimator")
    add("--views", type=at_least_one, metavar="K", help="noisy views per sequence for stratified and mc")
    add("--batch", type=at_least_one, metavar="N", help="noisy sequences per forward pass")
    add("--max-chunks", type=number_of_chunks, metavar="N|all", help="score the first N sequences of each set")
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write the records there, full precision")
    return parser
