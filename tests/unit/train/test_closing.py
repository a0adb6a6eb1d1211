"""What is said when a run ends, and when it is started again after that."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bd3_ds.checkpoint.manifest import FORMAT
from bd3_ds.runtime.files import write_json
from bd3_ds.runtime.run_dir import FINISHED
from bd3_ds.runtime.world import World
from bd3_ds.train.closing import closing_lines, duration, finished_before, nothing_to_do
from bd3_ds.train.state import TrainState
from bd3_ds.train.validation import Validated
from tests.helpers.tiny import tiny_run

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
STATE = TrainState(step=4, samples=16, tokens=256, recent=(2.0, 4.0))
BOUND = Validated(4, "valid", "stratified", 4, 4, 2.5, 0.125, 120, 8)


def test_the_end_says_what_was_done_and_what_to_type(tmp_path: Path) -> None:
    run = dataclasses.replace(tiny_run(tmp_path), run_dir="runs/my run")
    lines = closing_lines(run, STATE, 0, 64.0, True, BOUND)
    assert lines[0] == (
        "finished: 4 steps and 256 tokens; 1 min 4 s since the start, 4 tokens/s with saves, exports and validation"
    )
    assert lines[1] == "training nelbo 3.0000 nats/token, mean of the last 2 steps"
    assert lines[2] == (
        "validation nelbo 2.5000 ± 0.1250 nats/token, perplexity 12.18 (valid, 8 sequences, stratified), weights as "
        "trained, not averaged"
    )
    assert lines[3] == "export (averaged weights): runs/my run/exports/step-00000004"
    assert "run.py evaluate 'runs/my run'" in lines[4] or "run.sh evaluate 'runs/my run'" in lines[4]
    assert len(lines) == 5


def test_a_continued_run_counts_its_own_tokens_for_its_speed(tmp_path: Path) -> None:
    line = closing_lines(tiny_run(tmp_path), STATE, 3, 32.0, True, None)[0]
    assert line.startswith("finished: 4 steps, 1 of them since this start, and 256 tokens; 32 s since the start, 2 tok")


def test_a_loss_that_is_no_bound_is_not_called_one(tmp_path: Path) -> None:
    lines = closing_lines(tiny_run(tmp_path), STATE, 0, 64.0, False, None)
    assert lines[1].startswith("training loss (of clipped or uneven masking: no bound) 3.0000")
    assert "nelbo" not in " ".join(lines)


def test_finished_is_what_has_its_note_and_its_checkpoint(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    assert finished_before(run, ALONE) is None
    write_json(Path(run.run_dir) / FINISHED, {"step": 4})
    assert finished_before(run, ALONE) is None  # the checkpoint was taken away: it starts anew
    checkpoint = Path(run.run_dir) / "checkpoints/step-00000004"
    write_json(checkpoint / "manifest.json", {"format": FORMAT, "files": {"rank-0.safetensors": {"bytes": 3}}})
    assert finished_before(run, ALONE) is None
    for whole, text in ((False, "ab"), (True, "abc")):  # a torn file is redone from the checkpoint before
        (checkpoint / "rank-0.safetensors").write_text(text)
        assert finished_before(run, ALONE) == (4 if whole else None)
    longer = dataclasses.replace(run, train=dataclasses.replace(run.train, total_steps=5))
    assert finished_before(longer, ALONE) is None
    (Path(run.run_dir) / FINISHED).write_text("{")
    assert finished_before(run, ALONE) is None
    assert "finished at step 4, and train.total_steps=4 asks for no more" in nothing_to_do(run, 4)[0]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
