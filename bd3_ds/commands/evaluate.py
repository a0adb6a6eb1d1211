"""`run.py evaluate EXPORT --sets lambada,wikitext2=DIR …`: perplexities of one export, as a table and as JSON.

With --record they stand in the run's records as well, one line per (export, set), the newest (`results.py`).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.check import estimator_used
from bd3_ds.config.registries import ESTIMATORS
from bd3_ds.config.schema import EvalConfig, block_size
from bd3_ds.data.manifest import read_manifest
from bd3_ds.evaluation import figures
from bd3_ds.evaluation.exports import open_export
from bd3_ds.evaluation.options import DEVICES, number_of_chunks, open_device
from bd3_ds.evaluation.packs import check_pack, choose_sets
from bd3_ds.evaluation.results import EvaluationRecords
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import EXIT_INTERRUPTED, UserError, did_you_mean
from bd3_ds.runtime.files import require_writable, write_json
from bd3_ds.runtime.run_dir import EVALUATIONS, EXPORTS, RECORDS, is_run
from bd3_ds.runtime.tables import console_table

if TYPE_CHECKING:
    from bd3_ds.checkpoint.export import Export


def main(argv: list[str]) -> int:
    """Check all sets first, then score them one by one; what is scored is kept, whatever ends the command."""
    options = _parser().parse(argv)
    if options.estimator is not None and options.estimator not in ESTIMATORS:
        raise UserError(f"--estimator {options.estimator} is unknown; {did_you_mean(options.estimator, ESTIMATORS)}")
    if options.json is not None:
        require_writable(options.json.resolve().parent)

    export = open_export(options.export)
    sets = choose_sets(options.sets.split(",") if options.sets is not None else None, export, options.packs)
    wanted = _wanted(options, export)
    _check_sets(options, export, sets, wanted)
    results = _records_of(export, sets) if options.record else None

    from bd3_ds.diffusion.likelihood import Estimator
    from bd3_ds.evaluation.network import load_model
    from bd3_ds.evaluation.perplexity import evaluate_pack

    device = open_device(options.device)
    model = load_model(export, device)
    estimator = Estimator(wanted.estimator, wanted.views, at_once=wanted.batch)
    records: list[dict[str, Any]] = []
    try:
        for name, directory in sets.items():
            with _Bar(name) as bar:
                records.append(evaluate_pack(model, export, directory, name, estimator, wanted.max_chunks, bar))
            if options.json is not None:
                write_json(options.json, records)
            if results is not None:
                results.replace(records[-1])
    except KeyboardInterrupt:
        kept = [str(options.json)] * (options.json is not None) + ["the run's records"] * (results is not None)
        where = f"; kept in {' and '.join(kept)}" if kept and records else ""
        print(f"stopped: {len(records)} of {len(sets)} sets are scored{where}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    finally:
        if records:
            print(f"{export.path} (step {export.step}): {_meaning(export)}; ± one standard error of the estimator")
            print(format_table(records))
    if results is not None:
        print(f"on record in {_run_dir(export) / EVALUATIONS}")
    return 0


def _wanted(options: Any, export: Export) -> EvalConfig:
    """How sets are scored: as the run does, but for what the options say."""
    given = {"estimator": options.estimator, "views": options.views, "batch": options.batch}
    given["max_chunks"] = options.max_chunks
    return dataclasses.replace(export.run.eval, **{key: value for key, value in given.items() if value is not None})


def _check_sets(options: Any, export: Export, sets: dict[str, str], wanted: EvalConfig) -> None:
    """Raise UserError for a set that the export cannot read, or the estimator cannot score."""
    option = "--estimator" if options.estimator else "eval.estimator"
    for name, directory in sets.items():
        manifest = check_pack(export, name, directory)
        chunks = min(manifest.chunks, wanted.max_chunks or manifest.chunks)
        estimator_used(export.run, wanted.estimator, option, chunks * (manifest.length - 1))


def _run_dir(export: Export) -> Path:
    return export.path.resolve().parent.parent


def _records_of(export: Export, sets: dict[str, str]) -> EvaluationRecords:
    """The records of the export's run; raises UserError for an export outside a run, and for a set under false name."""
    if export.path.resolve().parent.name != EXPORTS or not is_run(_run_dir(export)):
        raise UserError(
            f"--record adds to the records of a run, and {export.path} lies in none; leave it out and use --json FILE"
        )
    for name, directory in sets.items():
        configured = export.run.eval.sets.get(name)
        if configured is None or Path(configured).resolve() == Path(directory).resolve():
            continue
        if read_manifest(configured).pack_hash != read_manifest(directory).pack_hash:
            raise UserError(
                f"--record: the run calls another text {name} ({configured}), and its curve would mix the two; give "
                f"{directory} another name, such as {name}2={directory}"
            )
    require_writable(_run_dir(export) / RECORDS)
    return EvaluationRecords(_run_dir(export))


def _meaning(export: Export) -> str:
    """What the perplexities are."""
    if block_size(export.run) == 1:
        return "perplexity by the likelihood itself"
    return "perplexity = exp of a bound, at or above that of the likelihood"


def format_table(records: list[dict[str, Any]]) -> str:
    """Records as aligned columns: set, nats per token and perplexity with their errors, and what they are of."""
    report = "report_loss" in records[0]
    extra = ("report's loss", "its exp (no bound)") if report else ()
    rows: list[tuple[str, ...]] = [
        ("set", "nelbo (nats/token)", "ppl", "tokens", "sequences", "estimator", "pack", *extra)
    ]
    for record in records:
        rows.append(
            (
                record["set"],
                figures.nats(record),
                figures.perplexity(record),
                f"{record['tokens']:,}",
                figures.sequences(record),
                figures.estimator(record),
                record["pack_hash"][:8],
                *((f"{record['report_loss']:.4f}", f"{record['report_ppl']:.2f}") if report else ()),
            )
        )
    return console_table(rows[0], rows[1:], left=(0, 5, 6))


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
    add(
        "export",
        metavar="EXPORT",
        help="directory under RUN_DIR/exports, RUN_DIR for its newest, or what --to hf wrote",
    )
    add("--sets", help="NAME or NAME=DIR, separated by commas (default: all of the run's eval.sets)")
    add("--packs", type=Path, metavar="DIR", help="where a NAME that the run does not know is looked for, as DIR/NAME")
    add("--estimator", metavar="|".join(ESTIMATORS), help="default: the run's eval.estimator")
    add("--views", type=at_least_one, metavar="K", help="noisy views per sequence for stratified and mc")
    add("--batch", type=at_least_one, metavar="N", help="noisy sequences per forward pass")
    add("--max-chunks", type=number_of_chunks, metavar="N|all", help="score the first N sequences of each set")
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write the records there, full precision, set by set")
    add(
        "--record",
        action="store_true",
        help="add to the records of the export's run, which `report` reads, in place of what they have for it",
    )
    return parser
