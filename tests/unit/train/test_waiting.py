"""Nothing in a step makes a GPU's host wait: no value is read back, no shape depends on values, until the step's end.

On a CPU the same operations show it: those that would wait have names of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.diffusion.noise import Noise, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.diffusion.weighting import WeightConfig
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.parallel.sequence import SequenceParallel, Slice
from tests.helpers.schedules import schedule_config

VOCAB, LENGTH = 13, 16
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal.", "unique")


class Waits(TorchDispatchMode):
    """Collects operations for which a host would wait, among them indexing by booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_booleans = "index" in name and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        )
        if by_booleans or any(word in name for word in WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "stripes"])
@pytest.mark.parametrize(("name", "size"), [(AR, 1), (BD3, 4), (MDLM, LENGTH), (SEDD, LENGTH)])
def test_forward_and_backward_never_wait(name: str, size: int, attention: str) -> None:
    model = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, name == AR, dropout=0.1, attention=attention))
    x0, slots = torch.randint(0, VOCAB - 1, (2, LENGTH)), np.arange(2)
    u, draws = stratified_times(1, 0, slots, 2, LENGTH // size), mask_draws(1, 0, slots, LENGTH)
    noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0))
    waits = Waits()
    network: Callable[..., Any] = as_denoiser(model, size)

    def on_the_device(*args: Any, **kwargs: Any) -> Any:
        # Masks are made before, on the host, and do not count.
        with waits:
            return network(*args, **kwargs)

    loss = training_loss(name, on_the_device, x0, None if name == AR else noise, VOCAB - 1)
    with waits:
        loss.loss.backward()
    assert waits.found == []


META = torch.device("meta")  # a device without values: to read one, or a shape that depends on one, is an error


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "size"), [(AR, 1), (BD3, 4), (MDLM, LENGTH), (SEDD, LENGTH)])
def test_a_micro_batch_needs_no_value_from_the_device(name: str, size: int, packed: bool) -> None:
    """All of it, what the objective does around the network too, from batch and noise on the host to gradients."""
    model = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, name == AR, attention="sdpa")).to(META)
    documents = documents_of_two() if packed else None
    denoiser = as_denoiser(model, size, None if documents is None else documents.to(META))
    loss = training_loss(name, denoiser, *batch_of(name, size), VOCAB - 1, META, documents)
    loss.loss.backward()
    assert loss.nelbo.device == META and all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize(("name", "size"), [(AR, 1), (BD3, 4), (MDLM, LENGTH), (SEDD, LENGTH)])
def test_ranks_that_share_a_sequence_know_their_places_on_the_host(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many places a rank scores depends on the masks, which the host has drawn."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    sequence = object.__new__(SequenceParallel)  # without the groups, which take processes
    sequence.slice, sequence.group = Slice(1, 2), None
    head = nn.Linear(8, VOCAB).to(META)

    def denoise(x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: Any) -> Any:
        assert at.device == META and 0 < len(at) < x_t.numel()
        return read(torch.empty(x_t.numel() // 2, 8, device=META)[at], head.weight, head.bias)

    loss = training_loss(name, sequence.denoiser(denoise), *batch_of(name, size), VOCAB - 1, META)
    loss.loss.backward()
    assert head.weight.grad is not None


def batch_of(name: str, size: int) -> tuple[Tensor, Noise | None]:
    """Two texts and their noise, on the host."""
    x0, slots = torch.randint(0, VOCAB - 1, (2, LENGTH)), np.arange(2)
    u, draws = stratified_times(1, 0, slots, 2, LENGTH // size), mask_draws(1, 0, slots, LENGTH)
    noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0))
    return x0, None if name == AR else noise


def documents_of_two() -> Tensor:
    """Two documents in each of two texts, and padding."""
    return torch.tensor([[0] * 6 + [1] * 8 + [-1] * 2, [0] * 10 + [1] * 6])


def test_what_waits_is_found() -> None:
    """The test above could fail."""
    waits = Waits()
    x = torch.ones(3)
    with waits:
        assert float(x.sum()) == 3
        x[x > 0].sum()
        x.nonzero()
    assert len(waits.found) >= 3
    for waiting in (lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: float(x.sum()), lambda x: bool((x > 0).any())):
        with pytest.raises((NotImplementedError, RuntimeError)):
            waiting(torch.ones(3, device=META))
