"""Optimizers by name: what an entry says of one is what it does, and a wrong entry is not found out by a lost state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bd3_ds.config.ds_json import check_optimizer
from bd3_ds.config.registries import OPTIMIZERS, OptimizerKind
from bd3_ds.planning.disk import disk_of
from bd3_ds.runtime.errors import UserError
from bd3_ds.train.masters import first_state
from tests.helpers.tiny import tiny_run

CPU = torch.device("cpu")


def momentum(groups: list[dict[str, Any]], optim: Any = None) -> torch.optim.Optimizer:
    """SGD, which keeps one tensor and does not count."""
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.fixture
def added() -> Iterator[None]:
    OPTIMIZERS.register("sound", OptimizerKind("SGD", momentum, ("momentum_buffer",)))
    OPTIMIZERS.register("forgetful", OptimizerKind("SGD", momentum, ()))
    OPTIMIZERS.register("boastful", OptimizerKind("SGD", momentum, ("momentum_buffer", "exp_avg")))
    yield
    for name in ("sound", "forgetful", "boastful"):
        OPTIMIZERS.remove(name)


def test_the_first_state_is_zeros_by_the_entry_s_names(added: None) -> None:
    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True)

    state = first_state(adamw, "adamw", CPU)
    assert list(state) == ["exp_avg", "exp_avg_sq", "step"] and all(float(value) == 0 for value in state.values())
    assert list(first_state(momentum, "sound", CPU)) == ["momentum_buffer"]


@pytest.mark.parametrize(
    ("name", "said"), [("forgetful", "its entry says nothing"), ("boastful", "its entry says exp_avg, momentum_buffer")]
)
def test_an_entry_that_is_wrong_is_refused(added: None, name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"optim\.name={name} keeps momentum_buffer for a weight, and {said}"):
        first_state(momentum, name, CPU)


def test_facts_are_taken_from_the_entry(added: None, tmp_path: Any) -> None:
    adamw, other = tiny_run(tmp_path), tiny_run(tmp_path, "optim.name=sound")
    assert (disk_of(adamw, 10).checkpoint, disk_of(other, 10).checkpoint) == (160, 120)
    offloading = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    check_optimizer(offloading, adamw)
    check_optimizer({}, other)
    with pytest.raises(UserError, match=r"no optim\.name=sound for host memory; leave it out, or use optim.name=adamw"):
        check_optimizer(offloading, other)
