"""What the values under `objective` must be: schedules, weights, frequencies, clip search, block sizes."""

from __future__ import annotations

from collections.abc import Iterable

from bd3_ds.config.registries import OBJECTIVES, SCHEDULES, WEIGHTS, parameter_problems
from bd3_ds.config.schema import RunConfig, block_size

CLIP_SEARCHES = ("none", "grid", "moments")
# Values with which a key of `objective` changes nothing.
_NEUTRAL = {
    "schedule.name": "log_linear",
    "schedule.defensive": 0,
    "weight.name": "elbo",
    "frequency.power": 0,
    "clip_search.method": "none",
}
EXACT_ALWAYS, EXACT_LIMIT = 8, 16  # block sizes scored exactly: any number of tokens, and
EXACT_TOKENS = 4096  # at most so many


def diffusion_choices(run: RunConfig) -> list[tuple[str, str, Iterable[str]]]:
    """(key, value, known values)."""
    objective = run.objective
    return [
        ("objective.schedule.name", objective.schedule.name, SCHEDULES),
        ("objective.weight.name", objective.weight.name, WEIGHTS),
        ("objective.clip_search.method", objective.clip_search.method, CLIP_SEARCHES),
    ]


def diffusion_ranges(run: RunConfig) -> list[str]:
    """Problems with the interval of times and the parameters of the schedule."""
    schedule, problems = run.objective.schedule, []
    if not 0 <= schedule.t_min <= schedule.t_max <= 1 or schedule.t_max == 0:
        problems.append(
            f"objective.schedule.t_min={schedule.t_min} and t_max={schedule.t_max} must satisfy "
            "0 <= t_min <= t_max <= 1 and 0 < t_max"
        )
    if schedule.name in SCHEDULES:
        known = SCHEDULES[schedule.name].parameters
        problems += parameter_problems("this schedule", known, "objective.schedule.parameters", schedule.parameters)
    return problems


def diffusion_shapes(run: RunConfig) -> list[str]:
    """Problems between values; each is fine by itself."""
    return [*_block_schedule(run), *_ignored(run), *_search(run)]


def _block_schedule(run: RunConfig) -> list[str]:
    stages, length = run.objective.block_schedule, run.data.length
    if not stages:
        return []
    key = "objective.block_schedule"
    if not OBJECTIVES[run.objective.name].has_blocks:
        return [f"{key} belongs to objective.name=bd3, not {run.objective.name}; set it to {{}}"]
    problems = []
    if 0 not in stages:
        problems.append(f"{key} begins at step {min(stages)}; give the block sizes from step 0 on")
    problems += [f"{key} has the step {step}; steps are counted from 0" for step in stages if step < 0]
    problems += [f"{key} gives no block size at step {step}" for step, sizes in stages.items() if not sizes]
    problems += [
        f"{key} has the block size {size} at step {step}; it must divide data.length={length}"
        for step, sizes in stages.items()
        for size in sizes
        if size < 1 or length % size
    ]
    problems = problems or [
        f"objective.block_size={_given_size(run)} is what the exports of the stage from step {step} on are scored and "
        f"sampled with, but {key} trains {', '.join(map(str, sizes))} there; make it one of them"
        for step, sizes in stages.items()
        if (len(sizes) > 1 or step == max(stages)) and block_size(run) not in sizes
    ]
    return problems


def _given_size(run: RunConfig) -> str:
    size = run.objective.block_size
    return f"null (all {run.data.length} tokens)" if size is None else str(size)


def exported_sizes(run: RunConfig) -> list[int | None]:
    """The values of objective.block_size that exports of the run can have."""
    stages = run.objective.block_schedule.values()
    return list(dict.fromkeys([*(sizes[0] for sizes in stages if len(sizes) == 1), run.objective.block_size]))


def _ignored(run: RunConfig) -> list[str]:
    """Settings that change the noise but not for this objective."""
    objective = run.objective
    values = {
        "schedule.name": objective.schedule.name,
        "schedule.defensive": objective.schedule.defensive,
        "weight.name": objective.weight.name,
        "frequency.power": objective.frequency.power,
        "clip_search.method": objective.clip_search.method,
    }
    if OBJECTIVES[objective.name].causal:
        return [
            f"objective.{key}={value} is for diffusion; objective.name={objective.name} masks nothing: set it to "
            f"{_NEUTRAL[key]}"
            for key, value in values.items()
            if value != _NEUTRAL[key]
        ]
    sizes = {size for stage in objective.block_schedule.values() for size in stage} or {block_size(run)}
    if objective.frequency.power and sizes == {1}:
        return [
            f"objective.frequency.power={objective.frequency.power} moves masks between the tokens of a block, and "
            "blocks of 1 have but one; set it to 0"
        ]
    if OBJECTIVES[objective.name].timed and objective.frequency.power:
        return [
            f"objective.frequency.power={objective.frequency.power} gives tokens rates of their own, but "
            f"objective.name={objective.name} is conditioned on one noise level; use bd3 or mdlm"
        ]
    return []


def _search(run: RunConfig) -> list[str]:
    schedule, search = run.objective.schedule, run.objective.clip_search
    if schedule.t_min == schedule.t_max and schedule.defensive > 0:
        return [
            f"objective.schedule.t_min=t_max={schedule.t_min} draws a single rate, which has no density to mix with "
            f"objective.schedule.defensive={schedule.defensive}; make t_min smaller or defensive 0"
        ]
    if schedule.t_min == schedule.t_max and not WEIGHTS[run.objective.weight.name].single_rate:
        return [
            f"objective.schedule.t_min=t_max={schedule.t_min} trains at a single rate, where "
            f"objective.weight.name={run.objective.weight.name} is but a factor; set it to elbo"
        ]
    if search.method == "none":
        return []
    problems = []
    if schedule.t_min == schedule.t_max:
        problems.append(
            f"objective.clip_search.method={search.method} starts from the interval t_min < t_max, but both are "
            f"{schedule.t_min}; set objective.schedule.t_min=0.001"
        )
    if search.method == "grid" and search.set not in run.eval.sets:
        known = ", ".join(run.eval.sets) or "none"
        problems.append(
            f"objective.clip_search.set={search.set} is not one of eval.sets ({known}); the grid search needs held-out "
            "text, or use objective.clip_search.method=moments"
        )
    if search.method == "moments" and schedule.defensive > 0:
        problems.append(
            "objective.clip_search.method=moments sees to rates outside the clip by objective.clip_search.explore; set "
            f"objective.schedule.defensive={schedule.defensive} to 0"
        )
    if not search.widths:
        problems.append("objective.clip_search.widths is empty, so there is no interval to try; give one such as [0.5]")
    return problems
