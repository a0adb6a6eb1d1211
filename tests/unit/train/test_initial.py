"""A fresh network's weights are the same numbers as ever, whatever part of them is asked for."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from bd3_ds.model.build import Initializer, initialise
from bd3_ds.model.dit import DiT, DiTConfig

PAPER = DiTConfig(33, 32, 2, 4, 4, 16, False)
LLAMA = dataclasses.replace(
    PAPER, norm="rmsnorm", biases=(), mlp="swiglu", mlp_size=48, kv_heads=2, tie_embeddings=True
)
GPT2 = dataclasses.replace(PAPER, biases=("norm", "qkv", "out", "mlp"), positions="learned", max_positions=16)
BIG = dataclasses.replace(PAPER, vocab_size=40000)  # drawn in more than one part

# Of whole tensors drawn at once, with seed 7.
GOLDEN = [
    (PAPER, "f83ecc0073a522495925bee50261a34c288f31953b21bb2fa5ddefbf9ab02f3f"),
    (LLAMA, "dd511007567764f5a90ace86827bb11930845be3922751f05d95c0c2e3b270b2"),
    (GPT2, "30764f94ee8de7c5dcd14a7997df3e54134fa12b213787a58889aa94f11ffb9e"),
    (BIG, "de7d366b0fde610aef02501e17d04603db55e6ddca75723fa9aeee618b8c96ee"),
]


def digest(model: DiT) -> str:
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("network", "golden"), GOLDEN)
def test_weights_are_those_of_former_builds(network: DiTConfig, golden: str) -> None:
    model = DiT(network)
    initialise(model, 7)
    assert digest(model) == golden


def test_a_part_is_the_part_of_the_whole() -> None:
    model = DiT(BIG)
    initial = Initializer(model, 7)
    initialise(model, 7)
    whole = model.embed.weight.detach().flatten()
    for start, count in ((0, 5), (2**20 - 3, 7), (2**20, 9), (len(whole) - 4, 4)):
        part = torch.empty(count)
        initial.fill("embed.weight", start, part)
        assert torch.equal(part, whole[start : start + count])
