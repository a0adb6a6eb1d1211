"""A run that continues reads the packs it was started with, wherever they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bd3_ds.config.load import load_defaults
from bd3_ds.data.data_facts import read_data_facts
from bd3_ds.data.same_packs import require_same_packs
from bd3_ds.data.share import Share
from bd3_ds.runtime.errors import UserError
from tests.helpers.readers import data_config, numbered_pack, open_loader
from tests.unit.data.test_pack_hash import made


def test_a_run_knows_its_packs_wherever_they_are(tmp_path: Path) -> None:
    prose, code = numbered_pack(tmp_path / "prose", 16), numbered_pack(tmp_path / "code", 16, mark=1)
    state = open_loader(data_config(prose, mix={str(code): 0.3}), Share(0, 1, 1, 2, 2)).state(4)
    moved = [shutil.copytree(pack, tmp_path / "moved" / pack.name) for pack in (prose, code)]
    require_same_packs(read_data_facts(data_config(moved[0], mix={str(moved[1]): 0.3})), state, "run")
    require_same_packs(read_data_facts(data_config(code)), {"epoch": 0}, "run")  # of a version that kept no hashes
    remedy = "so its samples have another order; name the pack .* or start a new run_dir with train.init_from=run$"
    hashes = r"\(hash \w{12}\) than run was started with \(hash \w{12}\), "
    with pytest.raises(UserError, match=f"data.train: '{code}' is another pack {hashes}{remedy}"):
        require_same_packs(read_data_facts(data_config(code, mix={str(prose): 0.3})), state, "run")
    with pytest.raises(UserError, match=f"data.mix: '{prose}' is another pack"):
        require_same_packs(read_data_facts(data_config(moved[0], mix={str(prose): 0.3})), state, "run")
    with pytest.raises(UserError, match=r"data\.mix has another number of packs"):
        require_same_packs(read_data_facts(data_config(prose)), state, "run")
    cut = numbered_pack(tmp_path / "cut", 16, to_a_shard=8)
    with pytest.raises(UserError, match=f"data.train: '{cut}' is the same tokens cut into other shards {hashes}"):
        require_same_packs(read_data_facts(data_config(cut, mix={str(code): 0.3})), state, "run")


def test_a_run_of_before_continues(tmp_path: Path) -> None:
    made(tmp_path / "pack", [[1, 2, 3, 4], [5, 6, 7, 8]])
    of_run = {"run_dir": str(tmp_path), "data.train": str(tmp_path / "pack"), "data.length": 4}
    data = load_defaults({**of_run, "objective.name": "ar"}, "test").data
    now = read_data_facts(data).identity
    before = {"pack_hashes": now["content_hashes"], "shard_cuts": now["shard_cuts"]}
    for saved in (now, before, {}):
        require_same_packs(read_data_facts(data), saved, "the run")
    made(tmp_path / "pack", [[1, 2, 3, 4, 5, 6, 7, 8]])
    with pytest.raises(UserError, match="is another pack"):
        require_same_packs(read_data_facts(data), now, "the run")
    made(tmp_path / "pack", [[1, 2, 3, 4], [5, 6, 7, 9]])
    for saved in (now, before):
        with pytest.raises(UserError, match="is another pack"):
            require_same_packs(read_data_facts(data), saved, "the run")
