"""Kill a rank at random instants, restart, and see whether anything is lost; then the same over changes of shape.

    python -m benchmarks.kills [--kills 30] [--steps 400] [--seed 1] [--json FILE]

First a run on two ranks at ZeRO-2 in bf16 with dropout, undisturbed. Then the same run, of which a rank is killed (-9)
at random instants: in turns while it starts or loads, between steps, and while a checkpoint is being written. Each
time it is started again by the same command: records and weights must be the undisturbed run's to the last bit, and the
newest complete checkpoint never an older one than before. Then runs that are killed and go on at 2 -> 1 -> 2 ranks and
at ZeRO stages 2 -> 3 -> 1: their losses against the undisturbed run of the same precision.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bd3_ds.checkpoint.export import find_export, load_weights
from bd3_ds.checkpoint.store import MANIFEST, complete_checkpoints
from tests.helpers.launch import (
    curve,
    rank_process,
    start_training,
    train,
    train_records,
    wait_for_end,
    wait_for_step,
    wait_until,
)
from tests.helpers.tiny import tiny_run

WHEN = ("starting", "stepping", "saving")
START = 8.0  # seconds from a rank's process to its first step
STEPPING = 1.5  # seconds in which a kill comes after the first step
COMMON = ("train.global_batch=8", "train.export_every=100000", "train.checkpoint_every=3")
EXACT = ("train.precision=bf16", "model.dropout=0.1", "data.workers=1", "train.activation_checkpointing=full")
CHAINS = {
    "2 -> 1 -> 2 ranks": [(2, "zero2"), (1, "zero2"), (2, "zero2")],
    "stage 2 -> 3 -> 1": [(2, "zero2"), (2, "zero3"), (2, "zero1")],
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        tiny_run(place)
        result = {"seed": arguments.seed, "steps": arguments.steps}
        result |= kills(place, arguments.kills, arguments.steps, random.Random(arguments.seed))
        result["chains"] = chains(place, CHAINS, ("fp32", "bf16"), arguments.steps // 2)
    text = json.dumps(result, indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0


def kills(place: Path, count: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """The undisturbed run and the killed one; what was seen after each kill."""
    words = (*COMMON, *EXACT, f"train.total_steps={steps}")
    recipe, calm, killed = place / "recipe.yaml", place / "calm", place / "killed"
    train(recipe, f"run_dir={calm}", *words)
    seen: list[dict[str, Any]] = []
    for number in range(count):
        before, recorded = newest(killed), last_record(killed)
        with start_training(recipe, f"run_dir={killed}", *words, **quiet()) as process:
            begun, when = time.time(), WHEN[number % len(WHEN)]
            wait_for(process, functools.partial(has_ranks, process))
            if when == "starting":
                time.sleep(rng.uniform(0, START))
            elif when == "stepping":
                wait_for(process, functools.partial(has_stepped, killed, recorded))
                time.sleep(rng.uniform(0, STEPPING))
            else:
                wait_for(process, functools.partial(is_saving, killed, begun))
            victim = rng.randrange(2)
            try:
                rank_process(process, victim).kill()
            except AssertionError:  # the run has ended
                victim = -1
            code = wait_for_end(process, 120)
        seen.append(
            {
                "seconds": round(time.time() - begun, 1),
                "when": when,
                "rank": victim,
                "exit": code,
                "newest_before": before,
                "newest_after": newest(killed),
                "last_record": last_record(killed),
            }
        )
        print(json.dumps(seen[-1]), file=sys.stderr, flush=True)
    train(recipe, f"run_dir={killed}", *words)
    ours, theirs = (load_weights(find_export(str(run_dir))) for run_dir in (killed, calm))
    return {
        "kills": seen,
        "lost": sum(each["newest_after"] < each["newest_before"] for each in seen),
        "same_losses": curve(killed) == curve(calm),
        "same_weights": all(torch.equal(ours[name], theirs[name]) for name in theirs),
    }


def chains(
    place: Path, shapes_by_name: dict[str, list[tuple[int, str]]], precisions: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    """Runs that are killed and go on in another shape (ranks, ds_config), against the undisturbed one."""
    recipe, results = place / "recipe.yaml", []
    for precision in precisions:
        words = (*COMMON, f"train.precision={precision}", f"train.total_steps={steps}")
        calm = place / f"calm-{precision}"
        train(recipe, f"run_dir={calm}", *words)
        for name, shapes in shapes_by_name.items():
            run_dir = place / f"{precision}-{'-'.join(f'{ranks}{stage}' for ranks, stage in shapes)}"
            for number, (ranks, stage) in enumerate(shapes, 1):
                shape = {"ranks": ranks, "ds_config": stage}
                if number == len(shapes):
                    train(recipe, f"run_dir={run_dir}", *words, **shape)
                    continue
                with start_training(recipe, f"run_dir={run_dir}", *words, **shape, **quiet()) as process:
                    wait_for_step(run_dir, steps * number // len(shapes), process)
                    process.kill() if ranks == 1 else rank_process(process, ranks - 1).kill()
                    wait_for_end(process, 120)
            ours, theirs = (list(curve(each).values()) for each in (run_dir, calm))
            difference = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
            results.append({"precision": precision, "chain": name, "steps": steps, "loss_difference": difference})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def quiet() -> dict[str, Any]:
    """The launcher is loud about what is done to it here."""
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def newest(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    return max((checkpoint.state["step"] for checkpoint in complete_checkpoints(run_dir / "checkpoints")), default=0)


def has_ranks(process: subprocess.Popen[str]) -> bool:
    """Whether both ranks have a process."""
    try:
        return all(rank_process(process, rank) for rank in range(2))
    except AssertionError:
        return False


def last_record(run_dir: Path) -> int:
    """The last step on record; 0 where there is none."""
    return max((line["step"] for line in train_records(run_dir)), default=0)


def has_stepped(run_dir: Path, before: int) -> bool:
    """Whether the run, whose last record was of step `before`, goes on again; it first drops what no checkpoint has."""
    now = last_record(run_dir)
    return now != before and now > newest(run_dir)


def is_saving(run_dir: Path, since: float) -> bool:
    """Whether a checkpoint begun after `since` (seconds since 1970) is being written."""
    places = (run_dir / "checkpoints").glob("step-*")
    return any(not (place / MANIFEST).exists() and place.stat().st_mtime > since for place in places)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds, or the run has ended."""

    def seen() -> bool:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint was removed while it was looked at
            return process.poll() is not None or condition()
        return False

    wait_until(seen, 120, "the moment of a kill")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
