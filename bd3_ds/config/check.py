"""Whether a configuration can be trained: the schema's rule for each value, then rules that compare values.

All problems are collected, so that one run of `check` shows them all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from bd3_ds.config.check_data import data_problems
from bd3_ds.config.check_diffusion import (
    EXACT_ALWAYS,
    EXACT_LIMIT,
    EXACT_TOKENS,
    diffusion_choices,
    diffusion_ranges,
    diffusion_shapes,
    exported_sizes,
)
from bd3_ds.config.keys import flat, schema_keys
from bd3_ds.config.registries import ATTENTION, AUTO_ATTENTION, ESTIMATORS, OBJECTIVES, OPTIMIZERS, parameter_problems
from bd3_ds.config.schema import AUTO, RunConfig, block_size
from bd3_ds.runtime.errors import UserError, did_you_mean


def check_run(run: RunConfig, world_size: int) -> None:
    """Raise UserError with every impossible value or combination for a run on `world_size` ranks."""
    problems = [*_single_values(run), *_names(run), *diffusion_ranges(run), *data_problems(run.data)]
    problems = problems or [*_shapes(run), *_sequence_parallel(run), *_batch(run, world_size), *_optim(run)]
    if problems:
        raise UserError(*problems)


def accumulation_steps(run: RunConfig, world_size: int) -> int:
    """Micro-batches per rank and optimizer step; `check_run` has made sure that it is whole."""
    return run.train.global_batch * run.train.sequence_parallel // (run.train.micro_batch * world_size)


def ranks_at_work(run: RunConfig, world_size: int) -> str:
    """The number of ranks that have sequences of their own, as a term of the batch arithmetic in a message."""
    share = run.train.sequence_parallel
    return f"{world_size} ranks" + (f" / train.sequence_parallel={share}" if share > 1 else "")


def estimator_used(
    run: RunConfig, asked: str, option: str, tokens: int | None = None, together: int | None = None
) -> str:
    """What scores `tokens` tokens of this run when `option` asks for `asked`; raises UserError.

    AR is exact whatever is asked. Exact values of larger blocks are given for few tokens only; None: any number. No
    block holds more than `together` of them; None: its size.
    """
    problems = _estimator(run, asked, option, tokens, together)
    if problems:
        raise UserError(*problems)
    return "exact" if OBJECTIVES[run.objective.name].causal else asked


def _estimator(run: RunConfig, asked: str, option: str, tokens: int | None, together: int | None = None) -> list[str]:
    if asked not in ESTIMATORS:
        return [f"{option}={asked} is unknown; {did_you_mean(asked, ESTIMATORS)}"]
    objective = OBJECTIVES[run.objective.name]
    if asked not in objective.estimators:
        able = " or ".join(objective.estimators)
        return [f"{option}={asked} cannot score objective.name={run.objective.name}; use {able}"]
    size = block_size(run) if together is None else together
    if objective.causal or asked != "exact" or size <= EXACT_ALWAYS:
        return []
    # In words of what the user wrote: full diffusion has no block size.
    what = f"objective.block_size is {size}"
    if together is not None:
        what = f"{size} tokens of one block are to be scored"
    elif size == run.data.length:
        what = f"{run.objective.name} denoises all {size} tokens of a sequence together here"
    if size > EXACT_LIMIT:
        return [f"{option}=exact tries all sets of masks of up to {EXACT_LIMIT} tokens, and {what}; use stratified"]
    if tokens is None or tokens > EXACT_TOKENS:
        return [
            f"{option}=exact needs {2**size - 1:,} noisy views, as {what}, and takes at most {EXACT_TOKENS:,} tokens, "
            f"not {'a whole set' if tokens is None else f'{tokens:,}'}; use stratified"
        ]
    return []


def _single_values(run: RunConfig) -> list[str]:
    """What the rules of the schema say of each value by itself; null is a value of its own."""
    values = flat(run)
    return [
        problem
        for key, one in schema_keys().items()
        if one.rule is not None and values[key] is not None
        for problem in one.rule.problems(key, values[key])
    ]


def _names(run: RunConfig) -> list[str]:
    """Names that are known elsewhere than in the schema."""
    choices: list[tuple[str, str, Iterable[str]]] = [
        ("objective.name", run.objective.name, OBJECTIVES),
        ("model.attention", run.model.attention, (AUTO_ATTENTION, *ATTENTION)),
        ("optim.name", run.optim.name, OPTIMIZERS),
        *diffusion_choices(run),
    ]
    problems = [
        f"{key}={value} is unknown; {did_you_mean(value, known)}" for key, value, known in choices if value not in known
    ]
    if (name := run.train.validate_set) is not None and name not in run.eval.sets:
        hint = did_you_mean(name, run.eval.sets) if run.eval.sets else "eval.sets is empty, name its directory there"
        problems.append(f"train.validate_set={name} is not one of eval.sets; {hint}")
    # A set's name becomes a part of file names and of TensorBoard's tags.
    problems += [
        f"eval.sets has the name '{name}'; use letters, digits, '.', '_' and '-'"
        for name in run.eval.sets
        if not re.fullmatch(r"[\w.-]+", name)
    ]
    if run.eval.variance_batches == 1:
        problems.append("eval.variance_batches=1 has no variance; use 0 (none) or at least 2")
    return problems


def _shapes(run: RunConfig) -> list[str]:
    model, length, size = run.model, run.data.length, run.objective.block_size
    problems = []
    if model.hidden_size % model.heads:
        problems.append(f"model.hidden_size={model.hidden_size} must be a multiple of model.heads={model.heads}")
    elif (model.hidden_size // model.heads) % 2:
        problems.append(
            f"model.hidden_size / model.heads = {model.hidden_size // model.heads} must be even: "
            "rotary positions turn pairs"
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        problems.append(f"model.kv_heads={model.kv_heads} must divide model.heads={model.heads}")
    if model.positions == "learned" and (model.max_positions or 0) < length:
        given = "null" if model.max_positions is None else model.max_positions
        problems.append(
            f"model.positions=learned needs model.max_positions of data.length={length} at least, not {given}"
        )
    has_blocks = OBJECTIVES[run.objective.name].has_blocks
    if run.objective.views > 1 and not has_blocks:
        problems.append(
            f"objective.views={run.objective.views} belongs to objective.name=bd3, whose views share a clean pass, not "
            f"{run.objective.name}; raise train.micro_batch instead"
        )
    if size is not None and not has_blocks and size != block_size(run):
        problems.append(
            f"objective.block_size={size} belongs to objective.name=bd3, not {run.objective.name}; set it to null"
        )
    elif length % block_size(run):
        divisors = [d for d in range(1, length + 1) if length % d == 0]
        near = min(divisors, key=lambda d: abs(d - block_size(run)))
        problems.append(
            f"objective.block_size={size} must divide data.length={length}; the nearest that does is {near}"
        )
    else:
        scored = None if run.eval.max_chunks is None else run.eval.max_chunks * (length - 1)
        problems += diffusion_shapes(run)
        for size in exported_sizes(run):
            at_size = dataclasses.replace(run, objective=dataclasses.replace(run.objective, block_size=size))
            problems += _estimator(at_size, run.eval.estimator, "eval.estimator", scored)
    if run.eval.sample_length is not None and run.eval.sample_length > length:
        problems.append(f"eval.sample_length={run.eval.sample_length} must not exceed data.length={length}")
    return problems


def _batch(run: RunConfig, world_size: int) -> list[str]:
    train, share = run.train, run.train.sequence_parallel
    if world_size % share:
        return [
            f"train.sequence_parallel={share} does not divide the number of ranks, {world_size}; start the run on a "
            f"multiple of {share} ranks, or set train.sequence_parallel=1"
        ]
    groups, given, ranks = world_size // share, train.micro_batch, ranks_at_work(run, world_size)
    part = groups * (1 if given == AUTO else given)
    if train.global_batch % part == 0:
        return []
    near = max(part, round(train.global_batch / part) * part)
    other = f"or, as another training, the nearest train.global_batch that is: {near}"
    if train.global_batch % groups == 0:
        fits = max(size for size in divisors(train.global_batch // groups) if size <= given)
        return [
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={given} x {ranks} = "
            f"{part}; set train.micro_batch={fits}, or auto; {other}"
        ]
    fewer = share * max(size for size in divisors(train.global_batch) if size < groups)
    return [
        f"train.global_batch={train.global_batch} is not a multiple of {ranks}, whatever train.micro_batch is; start "
        f"{fewer} ranks, {other}"
    ]


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it, in ascending order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _sequence_parallel(run: RunConfig) -> list[str]:
    """Ranks that share a sequence take equal parts of its text, and of the heads."""
    share = run.train.sequence_parallel
    return [
        f"train.sequence_parallel={share} must divide {key}={value}; "
        f"the largest below it that does is {max(n for n in range(1, share + 1) if value % n == 0)}"
        for key, value in (("model.heads", run.model.heads), ("data.length", run.data.length))
        if value % share
    ]


def unreached(run: RunConfig) -> list[str]:
    """Sentences for what the run ends before, as a short trial of a long recipe does; nothing of it is an error."""
    total, optim, search = run.train.total_steps, run.optim, run.objective.clip_search
    notes = []
    if optim.warmup_steps >= total:
        notes.append(
            f"optim.warmup_steps={optim.warmup_steps:,} is not below train.total_steps={total:,}: the learning rate "
            f"only rises, to {optim.lr * total / optim.warmup_steps:.3g}"
        )
    if stages := [step for step in run.objective.block_schedule if step >= total]:
        notes.append(
            f"objective.block_schedule changes at step {min(stages):,}, and train.total_steps={total:,} ends before"
        )
    if search.method != "none" and search.every > total:
        notes.append(
            f"objective.clip_search.every={search.every:,} is more than train.total_steps={total:,}: no search is made"
        )
    frequency = run.objective.frequency
    if frequency.power and frequency.curriculum_steps >= total:
        notes.append(
            f"objective.frequency.curriculum_steps={frequency.curriculum_steps:,} is not below "
            f"train.total_steps={total:,}: the power {frequency.power:g} is not reached"
        )
    return notes


def _optim(run: RunConfig) -> list[str]:
    known = OPTIMIZERS[run.optim.name].parameters
    problems = parameter_problems("this optimizer", known, "optim.parameters", run.optim.parameters)
    if run.optim.min_lr > run.optim.lr:
        problems.append(f"optim.min_lr={run.optim.min_lr} must not exceed optim.lr={run.optim.lr}")
    if run.optim.decay == "constant" and run.optim.decay_share != 1:
        problems.append(
            f"optim.decay_share={run.optim.decay_share:g} needs optim.decay=linear or cosine; constant has no fall"
        )
    return problems
