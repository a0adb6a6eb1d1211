"""All ZeRO stages, offloaded or not, train the same model: eight steps of some of the benchmark's runs."""

import json

import pytest

from bd3_ds.train.hardware import async_io_is_there
from benchmarks.zero_matrix import Case, distance, measure, table
from tests.helpers.launch import ROOT, curve, train
from tests.helpers.tiny import tiny_pack, tiny_run

# bf16 keeps 8 bits, a relative step of 0.4%; stages differ in where they round, and the mean over 8 x 63 tokens
# averages most of that away. Losses here are 4 to 5 nats.
BF16 = 0.01

# Each stage, and each kind of offloading once; the benchmark has all pairs.
FP32_FILES = ("zero1", "zero3", "zero2_offload")
BF16_FILES = ("zero1", "zero3", "zero3_offload")


@pytest.mark.slow
def test_stages_agree(tmp_path):
    cases = [
        Case("fp32", 1, "zero0", resumes=False),
        *(Case("fp32", 2, name, resumes=name == "zero2_offload") for name in FP32_FILES),
        *(Case("bf16", 2, name, resumes=name == "zero3_offload") for name in BF16_FILES),
    ]
    pack = tiny_pack(tmp_path / "pack", length=64, chunks=256)
    results = measure(tmp_path, pack, steps=8, seed=3, cases=cases)
    by = {(r["precision"], r["ranks"], r["ds_config"]): r["loss"] for r in results}
    assert len(by) == len(cases) and all(len(loss) == 8 for loss in by.values())
    for name in FP32_FILES:
        assert distance(by["fp32", 2, name], by["fp32", 1, "zero0"]) < 1e-4
    for name in BF16_FILES:
        assert distance(by["bf16", 2, name], by["fp32", 1, "zero0"]) < 2 * BF16
        assert distance(by["bf16", 2, name], by["bf16", 2, "zero1"]) < BF16
    assert [r["ds_config"] for r in results if r["resumed_after"]] == ["zero2_offload", "zero3_offload"]
    assert table(results).count("\n") == 1 + len(cases)


@pytest.mark.slow
def test_nvme_is_as_good_as_memory(tmp_path):
    """Weights and optimizer on disk change no number; the first time an operator is compiled, for minutes."""
    if not async_io_is_there():
        pytest.skip("libaio is not installed")
    disk = tmp_path / "disk"
    disk.mkdir()
    content = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    for section in ("offload_optimizer", "offload_param"):
        content["zero_optimization"][section]["nvme_path"] = str(disk)
    nvme = tmp_path / "nvme.json"
    nvme.write_text(json.dumps(content))
    # What is smaller than 1 MiB a rank stays in memory.
    tiny_run(tmp_path)
    words = ("model.hidden_size=256", "train.total_steps=3", "train.checkpoint_every=100", "train.export_every=100")
    runs = {name: tmp_path / name for name in ("memory", "nvme")}
    train(tmp_path / "recipe.yaml", *words, f"run_dir={runs['memory']}", ds_config="zero3_offload")
    where = ("--deepspeed_config", str(nvme), f"run_dir={runs['nvme']}")
    train(tmp_path / "recipe.yaml", *words, *where, timeout=900)
    assert len(curve(runs["nvme"])) == 3 and curve(runs["nvme"]) == curve(runs["memory"])
    assert any("exp_avg_sq" in path.name for path in disk.rglob("*.swp"))
