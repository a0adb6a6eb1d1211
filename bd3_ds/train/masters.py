"""This rank's fp32 master weights and optimizer state in DeepSpeed, as fragments of named parameters.

Without ZeRO they are the parameters and the optimizer's state. At stages 1 and 2 a rank has one flat partition for each
parameter group, at stage 3 one for each sub-group, which may lie in host memory, or on NVMe between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bd3_ds.config.registries import OPTIMIZERS
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World

STEP = "step"  # torch's and DeepSpeed's name for an optimizer's count of updates, a number or a tensor of one


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: elements start … start + n of the flat tensor, each element on one rank only.

    weights: [n] in fp32; state: the same of each tensor that the optimizer keeps, by name (Adam's moments exp_avg and
    exp_avg_sq). They are live: written to, they are the engine's.
    """

    name: str
    start: int
    weights: Tensor
    state: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by the kinds of checkpoints."""
        return {"weights": self.weights, **self.state}


def first_state(make: Callable[[list[dict[str, Any]]], Any], name: str, device: torch.device) -> dict[str, Any]:
    """What the optimizer `name` keeps for weights before its first update, as of a single weight: zeros [1], a count.

    Optimizers make it at their first update; to read a checkpoint into it, it has to be there before. So one is made
    for a weight by itself and updates it. Raises UserError where the entry says otherwise: what it does not name would
    not be in a checkpoint.
    """
    weight = nn.Parameter(torch.zeros(1, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([{"params": [weight], "weight_decay": 0.0}])
    optimizer.step()
    found = optimizer.state[weight]
    said = OPTIMIZERS[name].state
    if set(found) - {STEP} != set(said) or any(getattr(found[key], "shape", None) != (1,) for key in said):
        raise UserError(
            f"optim.name={name} keeps {_listed(found)} for a weight, and its entry says {_listed(said)}; name there "
            f"all but the count '{STEP}', and keep nothing else than fp32 tensors of the weights' shape"
        )
    count = {STEP: found[STEP] * 0} if STEP in found else {}  # of its type: a number or a tensor
    return {**{key: torch.zeros_like(found[key]) for key in said}, **count}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names) - {STEP})) or "nothing"


class Masters:
    """Of a DeepSpeed engine just made; `shapes` are the whole parameters', `first` is what `first_state` gives."""

    def __init__(self, engine: Any, stage: int, world: World, shapes: dict[str, torch.Size], first: dict[str, Any]):
        self._engine = engine
        self._zero = engine.optimizer
        self._optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        self._stage = stage
        self._world = world
        self._shapes = shapes
        self._first = first
        self._kept = [key for key in first if key != STEP]
        for index, flat in enumerate(self._flats()):
            if not self._is_on_disk(index):
                self._make_state(flat)
        for parameter in self._engine.module.parameters() if stage in (1, 2) else ():
            if (mapping := parameter._hp_mapping) is not None:  # DeepSpeed does it after the first update
                flat = self._flats()[mapping.param_group_index]
                mapping.set_optim_state_fragment(flat, self._optimizer.state[flat])

    def groups(self, write: bool = False) -> Iterator[list[Fragment]]:
        """This rank's share, some at a time, live until the next are asked for; `write`: they are written to.

        At stage 3 not by deepspeed.utils.safe_get_local_*: those bring a sub-group from disk once for each tensor of
        each parameter in it, here it comes once, and of offloaded tensors they give copies, on the accelerator.
        """
        if self._stage < 3:
            yield [fragment for name, p in self._engine.module.named_parameters() for fragment in self._of(name, p)]
            return
        zero = self._zero
        names = {id(p): name for name, p in self._engine.module.named_parameters()}
        for index, parameters in enumerate(zero.fp16_groups):
            if self._is_on_disk(index):
                zero._optimizer_states_and_gradient_swap_in(index)
                self._make_state(zero.fp32_partitioned_groups_flat[index])
            yield [fragment for p in parameters for fragment in self._of(names[id(p)], p)]
            if self._is_on_disk(index):
                if write:
                    zero._reassign_or_swap_out_partitioned_parameters(index)
                    zero._optimizer_states_and_gradient_swap_out(index)
                else:
                    zero._release_swap_buffers(index)

    def _of(self, name: str, parameter: Any) -> Iterator[Fragment]:
        """The fragment of a parameter, if this rank has one."""
        if self._stage == 0:
            if self._world.is_main:
                state = {key: self._optimizer.state[parameter][key].flatten() for key in self._kept}
                yield Fragment(name, 0, parameter.data.flatten(), state)
        elif self._stage == 3:
            group, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._world.rank * numel
            real = min(numel, self._shapes[name].numel() - start)  # the last parts are padded
            if real > 0:
                flat = self._zero.fp32_partitioned_groups_flat[group]
                state = {key: self._optimizer.state[flat][key].narrow(0, offset, real) for key in self._kept}
                yield Fragment(name, start, flat.data.narrow(0, offset, real), state)
        elif (mapping := parameter._hp_mapping) is not None:
            state = {key: mapping.get_hp_fragment(key) for key in self._kept}
            yield Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().data, state)

    @property
    def updates(self) -> int:
        """Updates that the state has seen; skipped steps are not among them. 0 of an optimizer that does not count."""
        states = (self._optimizer.state[flat] for flat in self._flats())
        return max((int(state[STEP]) for state in states if STEP in state), default=0)

    def wrote(self, updates: int | None = None) -> None:
        """Call on all ranks after writing, with the `updates` that the state written has seen.

        The weights that the passes use then follow the fp32 masters.
        """
        if updates is not None and STEP in self._first:
            for flat in self._flats():
                step = self._optimizer.state[flat][STEP]
                self._optimizer.state[flat][STEP] = torch.full_like(step, updates) if torch.is_tensor(step) else updates
        zero = self._zero
        if self._stage == 0 and self._world.size > 1:
            for parameter in self._flats():
                for tensor in (parameter.data, *(self._optimizer.state[parameter][key] for key in self._kept)):
                    torch.distributed.broadcast(tensor, 0)
        elif self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero.checkpoint_event_prologue()
            for index in range(len(zero.fp16_groups)):
                if not self._is_on_disk(index):
                    zero._reassign_or_swap_out_partitioned_parameters(index)
            zero.checkpoint_event_epilogue()

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates on this rank: parameters, or ZeRO's flat partitions of them."""
        if self._stage == 3:  # the optimizer is handed one at a time
            return list(self._zero.fp32_partitioned_groups_flat)
        if self._stage == 0:
            return list(self._engine.module.parameters())
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def _is_on_disk(self, index: int) -> bool:
        return self._stage == 3 and bool(self._zero._swappable_optimizer_subgroup(index))

    def _make_state(self, flat: Tensor) -> None:
        """Make what the optimizer makes at its first update, so that a checkpoint can be read into it."""
        if self._optimizer.state[flat]:
            return
        state: dict[str, Any] = {key: torch.zeros_like(flat.data, dtype=self._first[key].dtype) for key in self._kept}
        if STEP in self._first:
            count = self._first[STEP]
            state[STEP] = count.clone() if torch.is_tensor(count) else count
        self._optimizer.state[flat] = state
