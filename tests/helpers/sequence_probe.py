"""Loss and gradients of a micro-batch whose sequences all ranks share, beside those of one rank alone; for one test.

    deepspeed … tests/helpers/sequence_probe.py CASES      (a JSON list of `Case`s as objects)

Prints on the main rank, for each case, what differs: the loss, the nats of the blocks and the gradients, each as the
largest difference relative to the largest number of its kind; for gradients the worst parameter's. Networks are tiny,
with random weights, so that no part of them is idle.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, WeightConfig
from bd3_ds.diffusion.noise import make_noise
from bd3_ds.diffusion.objective import Loss, training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.parallel.sequence import SequenceParallel
from bd3_ds.runtime.errors import leave
from bd3_ds.runtime.world import World, join_world
from tests.helpers.schedules import schedule_config

VOCABULARY, MASK = 61, 60


@dataclass(frozen=True)
class Case:
    """One micro-batch of `rows` texts; with `packed`, of several documents each, the last places being padding."""

    objective: str
    length: int
    block_size: int = 16
    views: int = 1
    packed: bool = False
    rows: int = 2
    heads: int = 2


def compare(case: Case, world: World) -> dict[str, float]:
    """The differences of the docstring above."""
    alone, whole = _pass(case, None)
    shared, parts = _pass(case, SequenceParallel(world, world.size))
    for gradient in parts.values():
        torch.distributed.all_reduce(gradient)
        gradient /= world.size  # as data parallelism averages
    found = {
        "loss": _difference(shared.loss.detach(), alone.loss.detach()),
        "nelbo": _difference(shared.nelbo, alone.nelbo),
        "gradients": max(_difference(parts[name], whole[name]) for name in whole),
    }
    if alone.block_nats is not None and shared.block_nats is not None:
        found["block_nats"] = _difference(shared.block_nats.nan_to_num(), alone.block_nats.nan_to_num())
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _pass(case: Case, sequence: SequenceParallel | None) -> tuple[Loss, dict[str, Tensor]]:
    """The loss and its gradients; with `sequence`, this rank's part of them."""
    rng = torch.Generator().manual_seed(1)
    network = DiTConfig(VOCABULARY, 16 * case.heads, 2, case.heads, 2, 8, causal=case.objective == AR)
    model = DiT(network)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    if sequence is not None:
        sequence.apply(model)
    tokens = torch.randint(0, MASK, (case.rows, case.length), generator=rng)
    documents = None
    if case.packed:
        cuts = torch.rand(tokens.shape, generator=rng) < 4 / case.length
        documents = cuts.cumsum(1)
        documents[:, -case.length // 5 :] = -1
    size = {BD3: case.block_size, MDLM: case.length, SEDD: case.length, AR: 1}[case.objective]
    noise = None
    if case.objective != AR:
        rows = case.rows * case.views
        u = torch.rand((rows, case.length // size), generator=rng, dtype=torch.float64)
        draws = torch.rand((rows, case.length), generator=rng, dtype=torch.float64)
        noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0))
    denoiser = as_denoiser(model, size, documents)
    if sequence is not None:
        denoiser = sequence.denoiser(denoiser)
    loss = training_loss(case.objective, denoiser, tokens, noise, MASK, documents=documents)
    loss.loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(cases: str) -> int:
    """Compare and print."""
    world = join_world()
    for words in json.loads(cases):
        found = compare(Case(**words), world)
        if world.is_main:
            print("RESULT", json.dumps(found), flush=True)
    world.barrier()
    return 0


if __name__ == "__main__":
    leave(main(*[word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
