"""A run that goes on under another configuration: what may not change is refused, what may is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bd3_ds.checkpoint.manifest import MANIFEST, complete_checkpoints
from bd3_ds.checkpoint.shards import piece
from bd3_ds.checkpoint.store import Saver
from bd3_ds.config.load import load_recipe, to_yaml
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from bd3_ds.train.earlier import CONFIGURATION, changes_in_words, earlier_runs
from bd3_ds.train.preflight import preflight
from tests.helpers.tiny import tiny_run

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def test_a_checkpoint_tells_what_a_lost_run_yaml_told(tmp_path):
    run = tiny_run(tmp_path, "eval.sets={}")
    recipe, run_dir, words = tmp_path / "recipe.yaml", Path(run.run_dir), ["eval.sets={}"]
    saver = Saver(run_dir / "checkpoints", ALONE, 2, async_save=False)
    state = {"step": 2, CONFIGURATION: dataclasses.asdict(run)}
    saver.start("step-00000002", state, [(piece("weights", "w", 0), torch.zeros(3))])
    (run_dir / "run.yaml").write_text(to_yaml(run))
    assert changes_in_words(earlier_runs(run_dir), run) is None

    def start(*more: str) -> None:
        preflight(load_recipe(str(recipe), [*words, *more]), 1)

    sentence = f"objective.block_size was 4 when {run_dir} was started and is 8 now; set it back, or give"
    with pytest.raises(UserError, match=sentence):  # by both, said once
        start("objective.block_size=8")
    with pytest.raises(UserError) as both:
        start("objective.block_size=8")
    text = (run_dir / "run.yaml").read_text()
    (run_dir / "run.yaml").write_text(text.replace("block_size: 4", "block_size: 8"))
    for prepare in (lambda: None, (run_dir / "run.yaml").unlink):  # one that is not the checkpoint's, then none
        prepare()
        with pytest.raises(UserError, match=sentence) as caught:
            start("objective.block_size=8")
        assert caught.value.messages == both.value.messages and len(caught.value.messages) == 1
    start()

    checkpoint = complete_checkpoints(run_dir / "checkpoints")[-1]
    manifest = checkpoint.manifest
    del manifest["state"][CONFIGURATION]  # as an earlier version wrote it
    (checkpoint.path / MANIFEST).write_text(json.dumps(manifest))
    start("objective.block_size=8")
    (run_dir / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        start("objective.block_size=8")


def test_nothing_is_said_where_nothing_changed(tmp_path):
    run = tiny_run(tmp_path)
    Path(run.run_dir).mkdir()
    (Path(run.run_dir) / "run.yaml").write_text(to_yaml(run))
    earlier = earlier_runs(Path(run.run_dir))
    assert len(earlier) == 1 and changes_in_words(earlier, run) is None
    assert changes_in_words([], run) is None
    changed = tiny_run(tmp_path, "optim.lr=0.5")
    assert changes_in_words(earlier, changed) == f"going on with optim.lr {run.optim.lr} -> 0.5"
