"""Recomputed layers give the gradients of kept ones; tied matrices are one parameter; other shapes work everywhere."""

import dataclasses

import pytest
import torch

from bd3_ds.config.load import override
from bd3_ds.model.build import dit_config, initialise, without_decay
from bd3_ds.model.dit import DiT, DiTConfig
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.parallel.apply import prepare_layers
from tests.helpers.tiny import tiny_run

PAPER = DiTConfig(33, 32, 2, 4, 4, 16, False, dropout=0.1)
LLAMA = dataclasses.replace(
    PAPER, norm="rmsnorm", biases=(), mlp="swiglu", mlp_size=48, kv_heads=2, tie_embeddings=True, dropout=0.1
)
GPT2 = dataclasses.replace(PAPER, biases=("norm", "qkv", "out", "mlp"), positions="learned", max_positions=16)


def noised(network):
    """A network none of whose parts is idle."""
    model = DiT(network)
    initialise(model, 1)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def forward(network, train, backend="auto"):
    """The network and its loss in a training pass, dropout's noise from a fixed seed."""
    model = prepare_layers(noised(dataclasses.replace(network, attention=backend)), train).train()
    text = torch.randint(0, 33, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    causal = network.causal
    return model, model(text, None if causal else text, block_size=1 if causal else 4).square().mean()


def gradients(network, train, backend="auto"):
    model, loss = forward(network, train, backend)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def train(tmp_path):
    def make(*words):
        return override(tiny_run(tmp_path), list(words), ("train.",)).train

    return make


@pytest.mark.parametrize(
    "network", [PAPER, LLAMA, pytest.param(GPT2, marks=pytest.mark.slow), dataclasses.replace(LLAMA, causal=True)]
)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(train, network, recompute):
    loss, expected = gradients(network, train())
    again, found = gradients(network, train(f"train.activation_checkpointing={recompute}"))
    assert torch.equal(loss, again) and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_recomputing_keeps_less(train):
    """Numbers that autograd keeps for the backward pass; the MLP's inside is the widest of a layer."""

    def kept(*words):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model, _ = forward(PAPER, train(*words))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for where, size in sizes.items() if where not in weights)

    none, selective, full = (kept(f"train.activation_checkpointing={word}") for word in ("none", "selective", "full"))
    wide = 2 * 4 * 32  # up's output and the activation's, of width 4 D
    first, last = 2 * 32, 2 * 16  # tokens that the two layers' MLPs see
    assert none - selective == wide * (first + last)
    assert full < selective


@pytest.mark.parametrize("network", [LLAMA, GPT2])
@pytest.mark.parametrize("backend", ["sdpa", "stripes"])
def test_other_shapes_agree_in_every_backend(train, network, backend):
    network = dataclasses.replace(network, dropout=0.0)
    loss, expected = gradients(network, train(), "dense")
    again, found = gradients(network, train(), backend)
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_one_matrix_for_embedding_and_head():
    model = DiT(LLAMA)
    initialise(model, 1)
    names = [name for name, _ in model.named_parameters()]
    assert model.head.linear.weight is model.embed.weight and "head.linear.weight" not in names
    assert bool(model.embed.weight.any()) and {"embed.weight", "head.norm.weight"} <= without_decay(model)
    untied = DiT(dataclasses.replace(LLAMA, tie_embeddings=False))
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters()) == 33 * 32


def test_flops_of_other_shapes():
    """A token passes each matrix once; two FLOPs a weight, three times that with the backward pass."""
    network = dataclasses.replace(LLAMA, causal=True)
    matrices = sum(
        p.numel() for name, p in DiT(network).named_parameters() if name.startswith("layers") and p.dim() == 2
    )
    pairs = 16 * 17 // 2
    expected = 3 * (16 * 2 * matrices + 2 * 4 * 32 * pairs + 15 * 2 * 32 * 33)
    assert training_flops_per_sequence(network, "ar", 16, 1) == expected


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_layers_compute_the_same(train, recompute):
    network = dataclasses.replace(PAPER, layers=1)
    loss, expected = gradients(network, train())
    again, found = gradients(network, train("train.compile=true", f"train.activation_checkpointing={recompute}"))
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_shapes_that_cannot_be(tmp_path):
    from bd3_ds.config.check import check_run
    from bd3_ds.runtime.errors import UserError

    run = tiny_run(tmp_path)
    for words, sentence in (
        (["model.kv_heads=3"], "model.kv_heads=3 must divide model.heads=2"),
        (["model.positions=learned"], "model.max_positions of data.length=16 at least, not null"),
        (["model.biases=[mlp,heads]"], "model.biases=heads is unknown"),
        (["model.norm=batchnorm"], "model.norm=batchnorm is unknown"),
        (["model.mlp_size=0"], "model.mlp_size=0 must be"),
    ):
        with pytest.raises(UserError, match=sentence.replace("[", r"\[")):
            check_run(override(run, words, ("model.",)), 1)
    assert dit_config(run.model, "bd3") == dataclasses.replace(
        DiTConfig(run.model.vocab_size, 32, 2, 2, 4, 16, False), biases=("mlp", "head")
    )
