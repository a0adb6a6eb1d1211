"""A start reads what its packs are once, however many parts of the program ask."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.launch import train
from tests.helpers.tiny import tiny_pack, tiny_run


def test_a_rank_opens_each_manifest_once(tmp_path: Path) -> None:
    """Fresh and continued, with all that asks: mixed packs, masking by frequency, a checkpoint's packs."""
    tiny_run(tmp_path)
    tiny_pack(tmp_path / "more", chunks=64, seed=2)
    words = [f"data.mix={{{tmp_path / 'more'}: 0.2}}", "objective.frequency.power=0.5"]
    for steps in (2, 4):
        more = [*words, f"train.total_steps={steps}"]
        said = train(tmp_path / "recipe.yaml", *more, ranks=1, script="tests/helpers/counted_opens.py")
        opened = json.loads(next(line for line in said.splitlines() if line.startswith("OPENED ")).split(" ", 1)[1])
        packs = {name: times for name, times in opened.items() if name.split("/")[0] in ("train", "more")}
        assert packs == {"train/manifest.json": 1, "more/manifest.json": 1, "train/token_counts.npy": 1}
