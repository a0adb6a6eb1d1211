"""`run.py variance EXPORT …`: how noisy an export's training would be under its own schedule, and under others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.evaluation.options import DEVICES, open_device
from bd3_ds.evaluation.packs import check_pack, choose_sets
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable, write_json
from bd3_ds.runtime.tables import console_table

if TYPE_CHECKING:
    from bd3_ds.checkpoint.export import Export
    from bd3_ds.config.schema import RunConfig
    from bd3_ds.diffusion.proposal import Interval

FREE = ("objective.schedule.", "objective.weight.", "objective.frequency.")


def main(argv: list[str]) -> int:
    """Check, measure each interval on the same batches, print a table."""
    options = _parser().parse(argv)
    if options.batches < 2:
        raise UserError(f"--batches {options.batches}: a variance needs at least 2 batches")
    if options.json is not None:
        require_writable(options.json.resolve().parent)
    intervals = [_interval(word) for word in options.intervals.split(",")] if options.intervals else [None]

    from bd3_ds.config.check import check_run
    from bd3_ds.config.load import override
    from bd3_ds.evaluation.exports import open_export

    export = open_export(options.export)
    run = override(as_trained_now(export.run), options.overrides, FREE)
    check_run(run, world_size=run.train.sequence_parallel)  # measured on one device, however many share a sequence
    if options.intervals and OBJECTIVES[run.objective.name].causal:
        raise UserError(
            f"--intervals {options.intervals}: objective.name={run.objective.name} masks nothing, so there is nothing "
            "to clip"
        )
    name, directory = next(iter(choose_sets([options.set] if options.set else None, export, None).items()))
    check_pack(export, name, directory)
    records = _measure(options, export, run, name, directory, intervals)
    print(
        f"{export.path} (step {export.step}), schedule {run.objective.schedule.name}, weight "
        f"{run.objective.weight.name}, {options.batches} batches of {records[0]['sequences']} sequences of {name}"
    )
    print(format_variances(records))
    if options.json is not None:
        write_json(options.json, records)
    return 0


def _measure(
    options: Any, export: Export, run: RunConfig, name: str, directory: str, intervals: Sequence[Interval | None]
) -> list[dict[str, Any]]:
    """A record for each interval, all on the same text and random numbers; None is the schedule's own interval."""
    from bd3_ds.data.data_facts import read_pack_facts
    from bd3_ds.evaluation.arguments import check_seed
    from bd3_ds.evaluation.network import load_model
    from bd3_ds.evaluation.perplexity import read_texts
    from bd3_ds.evaluation.variance import BatchPlan, variances

    by_frequency = run.objective.frequency.power > 0
    train = run.data.train
    counts = read_pack_facts(train, run.data.cache, check_files=False).token_counts if by_frequency else None
    check_seed(options.seed)
    device = open_device(options.device)
    texts = read_texts(directory, apart=run.data.document_mask)
    model = load_model(export, device)
    plan = BatchPlan(options.batches, options.batch, options.at_once or run.eval.batch, options.gradients, options.seed)
    records = []
    for interval in intervals:
        measured = variances(model, run, texts, plan, interval=interval, step=export.step, token_counts=counts)
        t_min, t_max = interval or (run.objective.schedule.t_min, run.objective.schedule.t_max)
        records.append({"set": name, "t_min": t_min, "t_max": t_max, **dataclasses.asdict(measured)})
    return records


def as_trained_now(run: RunConfig) -> RunConfig:
    """An export's run without what only matters to training on: stages of block sizes and the search for a clip.

    Its block size and interval are those in force when the export was written.
    """
    search = dataclasses.replace(run.objective.clip_search, method="none")
    objective = dataclasses.replace(run.objective, block_schedule={}, clip_search=search)
    return dataclasses.replace(run, objective=objective)


def format_variances(records: list[dict[str, Any]]) -> str:
    """One line an interval; nats per token and their squares."""
    rows = [
        (
            f"[{record['t_min']:g}, {record['t_max']:g}]",
            f"{record['var_nelbo']:.4g} ± {record['var_nelbo_stderr']:.2g}",
            *("" if record[key] is None else f"{record[key]:.4g}" for key in ("var_block", "var_gradient")),
        )
        for record in records
    ]
    return console_table(("t in", "Var. NELBO", "var of a block", "var of gradient"), rows, left=())


def _interval(word: str) -> Interval:
    low, dash, high = word.partition("-")
    try:
        interval = (float(low), float(high))
    except ValueError:
        interval = (1.0, 0.0)
    if not dash or not 0 <= interval[0] <= interval[1] <= 1 or interval[1] == 0:
        raise UserError(f"--intervals: '{word}' is not an interval of times within 0 … 1; write 0.3-0.8,0.45-0.95")
    return interval


def _parser() -> Parser:
    parser = Parser(
        prog="run.py variance",
        description="Variance of a batch's NELBO and of its gradient, for an export's schedule and weight or others.",
    )
    add = parser.add_argument
    add("export", metavar="EXPORT", help="directory under RUN_DIR/exports, or RUN_DIR for its newest")
    add("overrides", nargs="*", metavar="key=value", help=f"other schedules and weights: {'*, '.join(FREE)}*")
    add("--set", metavar="NAME|NAME=DIR", help="where batches come from (default: the first of the run's eval.sets)")
    add("--batches", type=at_least_one, default=32, metavar="M", help="default 32")
    add("--batch", type=at_least_one, default=16, metavar="K", help="sequences of a batch (default 16)")
    add("--at-once", type=at_least_one, metavar="N", help="sequences of a forward pass (default: the run's eval.batch)")
    add("--intervals", metavar="A-B,C-D", help="clip intervals to compare, on the same text and random numbers")
    add("--gradients", action="store_true", help="the variance of the gradient too: a backward pass for each forward")
    add("--seed", type=int, default=0)
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write the records there, full precision")
    return parser
