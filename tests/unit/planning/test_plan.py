"""The plan's arithmetic: what autograd keeps, weights, batches, FLOPs, bytes between ranks, and how `check` says it."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_ds.config.ds_json import load_ds_json
from bd3_ds.config.schema import RunConfig
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.model.build import dit_config
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.model.flops import recomputed_flops_per_sequence, training_flops_per_sequence
from bd3_ds.parallel.apply import prepare_layers
from bd3_ds.planning import activations
from bd3_ds.planning.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    NETWORK,
    NVLINK,
    Collective,
    gathered_again,
    ulysses_traffic,
    zero_traffic,
)
from bd3_ds.planning.memory import Zero, memory_of, parameter_count, starting_bytes, zero_of
from bd3_ds.planning.plan import MFU, machine_of, make_plan
from bd3_ds.planning.table import plan_rows, size
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.gpus import GIB, GPUS, find_gpu, gpu_of_driver
from benchmarks import scaling
from benchmarks.counted import Kept
from tests.helpers.launch import ROOT
from tests.helpers.tiny import tiny_run

LENGTH, WIDTH, VOCAB = 64, 128, 81


def wide_run(tmp_path: Path, **overrides: Any) -> RunConfig:
    """Wide enough that vectors of one number a channel, which the formula leaves out, are less than a hundredth."""
    sizes = {"model__hidden_size": WIDTH, "model__heads": 4, "model__layers": 3, "train__micro_batch": 4}
    return tiny_run(tmp_path, **{**sizes, "data__length": LENGTH, "objective__block_size": 16, **overrides})


def kept_by_autograd(run: RunConfig, stage: int, scored: int) -> int:
    """Bytes of the storages that a forward pass with its loss saves; weights left out, casts of weights not."""
    torch.manual_seed(0)
    model = DiT(dit_config(run.model, run.objective.name))
    if run.train.precision == "bf16" and stage > 0:
        model = model.bfloat16()
    prepare_layers(model, run.train)
    causal, views = run.objective.name == "ar", run.objective.views
    x0 = torch.randint(0, VOCAB - 1, (run.train.micro_batch, LENGTH))
    x_t = x0.repeat_interleave(views, dim=0)
    at = torch.arange(scored)
    sigma = torch.rand(len(x_t)) if run.objective.name == "sedd" else None
    read = SubsNats(torch.zeros(scored, dtype=torch.long), VOCAB - 1, torch.rand(scored))
    denoise = as_denoiser(model, run.objective.block_size or LENGTH)
    kept = Kept({p.untyped_storage().data_ptr() for p in model.parameters()})
    mixed = run.train.precision == "bf16" and stage == 0
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext(),
    ):
        _loss = denoise(x_t, None if causal else x0, sigma=sigma, at=at, read=read)
    return kept.total()


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {}),
        (1, {"train__precision": "bf16", "model__dropout": 0.1}),
        (0, {"train__precision": "bf16", "model__dropout": 0.1}),
        (1, {"train__precision": "bf16", "objective__views": 2}),
        (
            1,
            {"train__precision": "bf16", "model__dropout": 0.1, "objective__name": "ar", "objective__block_size": None},
        ),
        (1, {"objective__name": "mdlm", "objective__block_size": None, "model__mlp_ratio": 2}),
        (1, {"objective__name": "sedd", "objective__block_size": None, "train__precision": "bf16"}),
        (1, {"train__activation_checkpointing": "full", "train__precision": "bf16", "model__dropout": 0.1}),
        (1, {"train__activation_checkpointing": "selective", "train__precision": "bf16", "model__dropout": 0.1}),
        (1, {"model__mlp": "swiglu", "model__norm": "rmsnorm", "model__kv_heads": 2, "train__precision": "bf16"}),
        (0, {"model__mlp": "swiglu", "model__norm": "rmsnorm", "train__precision": "bf16"}),
        (1, {"objective__name": "mdlm", "objective__block_size": None, "model__kv_heads": 2}),
        (1, {"model__layers": 5, "train__micro_batch": 7, "objective__block_size": 8}),
    ],
)
def test_activations_are_what_autograd_keeps(tmp_path: Path, stage: int, changes: dict[str, Any]) -> None:
    run = wide_run(tmp_path, **changes)
    network = dit_config(run.model, run.objective.name)
    given = activations.pass_of(run, network, run.objective.block_size or LENGTH, stage, cuda=False)
    given = dataclasses.replace(given, scored=100)
    recompute = run.train.activation_checkpointing
    counted = activations.layers_bytes(given, recompute) + activations.head_bytes(given)
    assert counted == pytest.approx(kept_by_autograd(run, stage, 100), rel=0.01)


def test_recomputing_keeps_less_and_holds_it_again(tmp_path: Path) -> None:
    run = wide_run(tmp_path)
    given = activations.pass_of(run, dit_config(run.model, "bd3"), 16, 1, cuda=False)
    none, selective, full = (activations.layers_bytes(given, mode) for mode in activations.RECOMPUTE)
    inside = 2 * 4 * WIDTH * 4  # up and GELU of a token in fp32
    assert none - selective == 4 * inside * (2 * 128 + 64)  # rows; two layers of 2L tokens, one of L
    # Tokens, the input of each layer, angles of a head of width 32, and a little that all rows share.
    assert full == pytest.approx(4 * 128 * (8 + 3 * WIDTH * 4) + 4 * 128 * WIDTH // 4, rel=0.01)
    again = {mode: activations.working_bytes(given, mode) for mode in activations.RECOMPUTE}
    assert again["none"] < again["selective"] < again["full"]
    assert again["full"] > (none - full) / 3  # a layer computed again is whole when its backward pass begins


def test_what_only_a_gpu_keeps(tmp_path: Path) -> None:
    """Masks of dropout in bytes, the whole of qkv with flex, and one kernel of RMSNorm."""
    run = wide_run(tmp_path, model__dropout=0.1, objective__name="mdlm", objective__block_size=None)
    network = dit_config(run.model, "mdlm")
    host, gpu = (
        activations.layers_bytes(activations.pass_of(run, network, LENGTH, 1, cuda), "none") for cuda in (0, 1)
    )
    assert host - gpu == 3 * 2 * (4 - 1) * 4 * LENGTH * WIDTH  # layers, dropouts, bytes, tokens of the batch
    bd3 = wide_run(tmp_path)
    given = activations.pass_of(bd3, dit_config(bd3.model, "bd3"), 16, 1, True)
    stripes = activations.layers_bytes(dataclasses.replace(given, attention="stripes"), "none")
    queries = 4 * (128 + 128 + 64)
    # v is a view of qkv: 2 more of every token are kept, and of every query the output and a number a head.
    more = 4 * 128 * 3 * (3 * WIDTH - WIDTH) * 4 + queries * (WIDTH + 4) * 4
    assert activations.layers_bytes(given, "none") - stripes == more
    rms = wide_run(tmp_path, model__norm="rmsnorm")
    host, gpu = (
        activations.layers_bytes(
            dataclasses.replace(activations.pass_of(rms, dit_config(rms.model, "bd3"), 16, 1, cuda), attention="sdpa"),
            "none",
        )
        for cuda in (0, 1)
    )
    assert host > 1.05 * gpu


def test_ranks_that_share_a_sequence_have_a_part_of_it(tmp_path: Path) -> None:
    alone, shared = wide_run(tmp_path), wide_run(tmp_path)
    shared = dataclasses.replace(shared, train=dataclasses.replace(shared.train, sequence_parallel=4))
    network = dit_config(alone.model, "bd3")
    one, part = (activations.pass_of(run, network, 16, 1, True) for run in (alone, shared))
    assert part.tokens * 4 == one.tokens
    parts = activations.layers_bytes(part, "none") * 4
    assert parts == pytest.approx(activations.layers_bytes(one, "none"), rel=0.01)  # but for what all rows share


def test_weights_are_counted_once() -> None:
    """Of the paper's small model, with GPT-2's vocabulary and [MASK]."""
    network = DiTConfig(50258, 768, 12, 12, 4, 128, causal=False)
    layer = 12 * 768**2 + 4 * 768 + 768 + 2 * 768 + (128 + 1) * 6 * 768  # matrices, biases of the MLP, norms, adaLN
    time, head = (256 + 1) * 128 + (128 + 1) * 128, 768 + (128 + 1) * 2 * 768 + 50258 * 768 + 50258
    assert parameter_count(network) == 12 * layer + time + head + 50258 * 768
    tied = dataclasses.replace(network, tie_embeddings=True)
    assert parameter_count(network) - parameter_count(tied) == 50258 * 768


def test_what_each_stage_shards(tmp_path: Path) -> None:
    run = wide_run(tmp_path, train__precision="bf16", train__global_batch=4 * 8)
    network = dit_config(run.model, "bd3")
    count = parameter_count(network)
    none, one, two, three = (
        memory_of(run, network, 16, zero_of({"zero_optimization": {"stage": stage}}), 8, "none", True)
        for stage in range(4)
    )
    part = -(-count // 8)
    assert (none.weights, none.gradients, none.optimizer, none.ema) == tuple(count * n for n in (4, 4, 8, 4))
    assert (one.weights, one.gradients, one.optimizer, one.ema) == (2 * count, 2 * count, 12 * part, 4 * part)
    assert (two.weights, two.gradients, two.optimizer) == (2 * count, 2 * part, 12 * part)
    assert (three.weights, three.gathered, three.gradients) == (2 * part, 2 * count, 2 * part)
    assert one.buckets == 500_000_000 * 2
    assert one.peak == max(one.moments.values()) == one.moments["backward"]


def test_offload_moves_the_optimizer_to_the_host(tmp_path: Path) -> None:
    run, offload = wide_run(tmp_path, train__global_batch=32), {"device": "cpu"}
    zero = zero_of({"zero_optimization": {"stage": 3, "offload_optimizer": offload, "offload_param": offload}})
    network = dit_config(run.model, "bd3")
    found = memory_of(run, network, 16, zero, 8, "none", True)
    part = -(-parameter_count(network) // 8)
    assert (found.optimizer, found.ema, found.weights, found.host) == (0, 0, 0, (12 + 4 + 4) * part)


def test_a_start_draws_part_by_part_and_divides_tensor_by_tensor(tmp_path: Path) -> None:
    run = wide_run(tmp_path, train__precision="bf16", train__global_batch=32)
    network, drawn = dit_config(run.model, "bd3"), 4 * 2**20
    count = parameter_count(network)
    found = {
        (stage, cuda): starting_bytes(run, network, zero_of({"zero_optimization": {"stage": stage}}), 8, cuda)
        for stage in range(4)
        for cuda in (False, True)
    }
    assert found[0, True] == found[1, True] == found[2, True] == found[0, False] == drawn
    assert found[1, False] == found[2, False] == drawn + 2 * count
    assert found[3, True] == drawn + 2 * -(-count // 8)
    largest = max(6 * WIDTH * run.model.cond_size, 4 * WIDTH**2, network.vocab_rows * WIDTH)
    assert found[3, False] == drawn + 2 * largest
    given = dataclasses.replace(run, train=dataclasses.replace(run.train, init_from="export"))
    assert starting_bytes(given, network, zero_of({}), 8, True) == drawn + 4 * count
    machine = machine_of("h100-80g", "bf16", 4)
    plan = make_plan(run, network, load_ds_json(ROOT / "ds_configs/zero3.json"), 8, 2, machine, 0.4)
    start = found[3, True]
    assert dict(plan_rows(plan))["at start"] == (
        f"{size(start)} of host memory a rank, {size(4 * start)} a node, beyond what stays"
    )


def test_settings_of_the_json_count() -> None:
    given = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert zero_of({"zero_optimization": given}) == Zero(2, 1000, 2, 10**9, 10**9, False, False, 10**9)
    assert zero_of({"zero_optimization": given}, stage=0).buckets == 0
    assert zero_of({}).stage == 0


def test_zeropp_holds_weights_once_more_in_a_node_and_sends_fewer_bytes(tmp_path: Path) -> None:
    run = wide_run(tmp_path, train__precision="bf16", train__global_batch=4 * 16)
    network = dit_config(run.model, "bd3")
    plain, plus = (zero_of(load_ds_json(ROOT / f"ds_configs/{name}.json")) for name in ("zero3", "zeropp"))
    assert (plain.variant, plus.variant) == ("3", "3 ZeRO++")
    assert zero_of({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}).variant == "3 hpZ"
    one, other = (memory_of(run, network, 16, zero, 16, "none", True) for zero in (plain, plus))
    assert other.weights - one.weights == 2 * -(-parameter_count(network) // 8)
    machine = machine_of("h100-80g", "bf16", 8)
    jsons = (load_ds_json(ROOT / f"ds_configs/{name}.json") for name in ("zero3", "zeropp"))
    sent = [make_plan(run, network, ds_json, 16, 2, machine, 0.4)["communication"]["seconds"] for ds_json in jsons]
    assert sent[1] < sent[0] / 2


def test_what_is_gathered_again_follows_the_json() -> None:
    near, far = (
        zero_of({"zero_optimization": {"stage": 3, **more}}) for more in ({"stage3_max_reuse_distance": 0}, {})
    )
    twice, once = (zero_traffic(1e6, "3", 8, 8, distance=zero.reuse) for zero in (near, far))
    assert sum(c.tensor for c in twice) - sum(c.tensor for c in once) == 2e6


def test_recomputed_flops(tmp_path: Path) -> None:
    network = DiTConfig(100, 32, 3, 4, 4, 16, False)
    again = {
        mode: recomputed_flops_per_sequence(network, "bd3", 64, 16, 1, mode) for mode in ("none", "selective", "full")
    }
    assert again["none"] == 0
    assert again["selective"] == 2 * 8 * 32**2 * (2 * 128 + 64)
    body = training_flops_per_sequence(network, "bd3", 64, 16, masked_share=0.0)
    assert again["full"] == pytest.approx(body / 3)


def test_a_plan_in_numbers(tmp_path: Path) -> None:
    """8 ranks, 2 of them to a sequence, micro-batch 4: 4 groups, so 64 sequences take 4 micro-batches each."""
    run = wide_run(tmp_path, train__global_batch=64, train__precision="bf16")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, sequence_parallel=2))
    network, machine = dit_config(run.model, "bd3"), machine_of("H100-80G", "bf16", 8)
    made = make_plan(run, network, {"zero_optimization": {"stage": 1}}, 8, 2, machine, 0.5)
    assert made["batch"]["groups"] == 4 and made["batch"]["accumulation"] == 4
    assert made["speed"]["tokens_per_s"] == pytest.approx(8 * 989e12 * 0.5 / made["flops"]["per_token"])
    days = 4 * 64 * LENGTH / made["speed"]["tokens_per_s"] / 86400
    assert made["speed"]["days"] == pytest.approx(days)
    assert made["smallest_stage"] == {"none": 0, "selective": 0, "full": 0} and len(made["stages"]) == 12
    assert len(made["communication"]["collectives"]) == 3  # gradients, weights, sequences
    peaks = {(row["stage"], row["recompute"]): row["peak"] for row in made["stages"]}
    # Room for stage 0 with all layers computed again, and not for more.
    tight = dataclasses.replace(machine, memory=peaks[0, "full"])
    found = make_plan(run, network, {}, 8, 2, tight, 0.5)["smallest_stage"]
    assert found["full"] == 0 and found["none"] is None
    small = make_plan(run, network, {}, 8, 2, dataclasses.replace(machine, memory=1.0), 0.5)
    assert set(small["smallest_stage"].values()) == {None} and not small["memory"]["fits"]


def test_gpus_by_name() -> None:
    assert find_gpu("H100-80g", "--gpu").peak_bf16 == 989e12
    assert find_gpu("h200-141g", "--gpu").memory == 139 * GIB
    with pytest.raises(UserError, match=r"--gpu=h10-80g is unknown; did you mean 'h100-80g'\?"):
        find_gpu("h10-80g", "--gpu")
    named = {"NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA H100 PCIe": "h100-pcie-80g", "NVIDIA L40S": "l40s-48g"}
    named |= {
        "NVIDIA L40": "l40-48g",
        "NVIDIA L4": "l4-24g",
        "NVIDIA A10G": "a10g-24g",
        "NVIDIA H100 NVL": "h100-nvl-94g",
    }
    named |= {"NVIDIA A100-SXM4-40GB": "a100-40g", "NVIDIA A100-SXM4-80GB": "a100-80g", "NVIDIA A10": "a10-24g"}
    for driver, name in named.items():
        found = gpu_of_driver(driver)
        assert found is not None and found.name == name
    assert gpu_of_driver("Some other card") is None
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_traffic() -> None:
    """1e9 weights on 16 ranks of two nodes."""
    reduce, gather = zero_traffic(1e9, "2", 16, 8, accumulation=3)
    assert reduce == Collective(ALL_REDUCE, 6e9, 16) and gather == Collective(ALL_GATHER, 2e9, 16)
    assert reduce.sent == 6e9 * 2 * 15 / 16 and gather.seconds == 2e9 * 15 / 16 / NETWORK
    assert zero_traffic(1e9, "1", 8, 8)[1].seconds == 2e9 * 7 / 8 / NVLINK
    assert [c.tensor for c in zero_traffic(1e9, "0", 16, 8, accumulation=3)] == [4e9]
    assert gathered_again(4e8) == 0 and gathered_again(1e9) == 5e8 and gathered_again(1e9, 0) == 1e9
    plain, plus = (
        sum(c.sent for c in zero_traffic(1e10, variant, 64, 8) if not c.in_node) for variant in ("3", "3 ZeRO++")
    )
    assert 0.15 < plus / plain < 0.25  # the paper's quarter, less here: each node's sums go out once
    assert ulysses_traffic(32, 3, 128, 64, 1) == []
    (found,) = ulysses_traffic(32, 3, 128, 64, 4)
    # Forward: q, k, v and output of two layers with 128 tokens, then k, v of 128 and q, output of 64; backward as much.
    assert found.tensor == 2 * 32 * (2 * 4 * 128 + 2 * 128 + 2 * 64) * 2 / 4 and found.sent == found.tensor * 3 / 4


def test_the_tables_of_the_document_are_those_of_the_command() -> None:
    said = (Path(__file__).resolve().parents[3] / "docs" / "scaling.md").read_text()
    assert scaling.tables(MFU) in said


def test_overlap_needed() -> None:
    """A rank's tokens at which both take as long: with them the needed overlap is 1."""
    model = scaling.MODELS["small"]
    least = scaling.least_tokens("small", "1", 64, 0.4)
    needed = scaling.row("small", "1", 64, 0.4).needed
    assert needed == pytest.approx(least / (model.micro_batch * model.length))
    assert scaling.row("small", "1", 64, 0.8).needed == pytest.approx(2 * needed)
    assert scaling.row("small", "1", 64, 0.4, accumulation=4).needed == pytest.approx(needed / 4)


def test_boards_without_nvlink_send_by_pcie(tmp_path: Path) -> None:
    """The same bytes take as many times longer as the link is slower; between nodes a network is no faster than it."""
    run = wide_run(tmp_path, train__precision="bf16", train__global_batch=64)
    network = dit_config(run.model, "bd3")
    for nodes, slower in ((1, 450 / 25), (2, 50 / 25)):
        seconds = [
            make_plan(run, network, {}, 16, nodes, machine_of(gpu, "bf16", 16 // nodes), 0.4)["communication"][
                "seconds"
            ]
            for gpu in ("h100-80g", "rtx3090-24g")
        ]
        assert seconds[1] / seconds[0] == pytest.approx(slower)
    assert all(0 < gpu.link <= 900e9 for gpu in GPUS) and find_gpu("a100-80g", "--gpu").link == 300e9
