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
    """Grouped queries, swiglu and one matrix for embedding and head, which ZeRO-3 gathers for both.

    Recomputed and, at stage 3, whose hooks a compiler could stumble on, compiled.
    """
    tiny_run(tmp_path)
    curves = []
    for stage, recompute, compiled in (
        (0, "none", "false"),
        (1, "selective", "false"),
        (2, "full", "false"),
        (3, "full", "true"),
    ):
        run_dir = tmp_path / f"stage{stage}"
        words = (f"run_dir={run_dir}", f"train.activation_checkpointing={recompute}", f"train.compile={compiled}")
        train(tmp_path / "recipe.yaml", *LLAMA, *words, ds_config=f"zero{stage}")
        curves.append(curve(run_dir))
    for other in curves[1:]:
        for step, (loss, norm) in curves[0].items():
            assert other[step] == (pytest.approx(loss, abs=1e-5), pytest.approx(norm, rel=1e-4)), step
    network = bd3_ds.load(str(run_dir)).network
    assert network.head.linear.weight is network.embed.weight
