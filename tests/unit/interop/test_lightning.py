"""Lightning files with whatever else they hold: the weights are read, and torch's own reader cannot do it yet."""

from __future__ import annotations

import pickle
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from bd3_ds.interop.lightning import read_lightning


class AttributeDict(dict[str, Any]):
    """Stands for Lightning's own dictionary of hyper-parameters."""


class Inert:
    """What stands for every unknown name in torch's reader."""

    def __new__(cls, *_: Any) -> Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


def resolved() -> Any:
    """A configuration of OmegaConf whose cache of resolvers is in use."""
    config = OmegaConf.create({"model": {"length": 16}})
    config._metadata.resolver_cache["cwd"]["()"] = "/"
    return config


CONTENTS = {
    "omegaconf": (lambda: OmegaConf.create({"model": {"length": 16}, "layers": [1, 2]}), True),
    "resolver_cache": (resolved, False),
    "dict_subclass": (lambda: AttributeDict(length=16), False),
    "deque": (lambda: deque([1, 2]), False),
}


def read_with_torch(path: Path) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in names]):
        return torch.load(path, weights_only=True, mmap=True)


@pytest.mark.parametrize("name", CONTENTS)
def test_weights_beside_any_hyper_parameters(name: str, tmp_path: Path) -> None:
    make, torch_can = CONTENTS[name]
    path, weight = tmp_path / "last.ckpt", torch.randn(4, 3)
    state = {"a": weight, "view": weight.t(), "row": weight[1], "half": weight.bfloat16()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": make()}}, path)
    model = read_lightning(path, lambda key: key)
    assert not model.averaged and model.shapes == {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, tensor in model.read().items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype
    # Once torch reads these too, it can stand in for our reader (see its docstring).
    if torch_can:
        assert torch.equal(read_with_torch(path)["state_dict"]["view"], weight.t())
    else:
        with pytest.raises(pickle.UnpicklingError, match="Can only"):
            read_with_torch(path)
