"""Networks of other shapes, tied, recomputed and compiled, under ZeRO: the same run as on one rank without it."""

import pytest

import bd3_ds
from tests.helpers.launch import curve, train
from tests.helpers.tiny import tiny_run

LLAMA = (
    "model.norm=rmsnorm",
    "model.biases=[]",
    "model.mlp=swiglu",
    "model.kv_heads=1",
    "model.tie_embeddings=true",
    "model.dropout=0.1",
    "optim.weight_decay=0.1",
)


@pytest.mark.slow
def test_tied_weights_train_alike_at_every_stage(tmp_path):
    """Grouped queries, swiglu and one matrix for embedding and head, which ZeRO-3 gathers for both; MLPs recomputed."""
    tiny_run(tmp_path)
    curves = []
    for stage, recompute in ((0, "none"), (1, "selective"), (2, "none"), (3, "selective")):
        run_dir = tmp_path / f"stage{stage}"
        words = (f"run_dir={run_dir}", f"train.activation_checkpointing={recompute}")
        train(tmp_path / "recipe.yaml", *LLAMA, *words, ds_config=f"zero{stage}")
        curves.append(curve(run_dir))
    for other in curves[1:]:
        for step, (loss, norm) in curves[0].items():
            assert other[step] == (pytest.approx(loss, abs=1e-5), pytest.approx(norm, rel=1e-4)), step
    network = bd3_ds.load(str(run_dir)).network
    assert network.head.linear.weight is network.embed.weight


@pytest.mark.slow
def test_compiled_layers_train_alike(tmp_path):
    tiny_run(tmp_path)
    curves = []
    for stage, compiled in ((2, "false"), (2, "true")):
        run_dir = tmp_path / f"{stage}-{compiled}"
        words = (f"run_dir={run_dir}", f"train.compile={compiled}", "model.dropout=0.1", "model.layers=1")
        train(tmp_path / "recipe.yaml", *words, ds_config=f"zero{stage}")
        curves.append(curve(run_dir))
    for step, (loss, norm) in curves[0].items():
        assert curves[1][step] == (pytest.approx(loss, abs=1e-5), pytest.approx(norm, rel=1e-4)), step
