"""Where DeepSpeed keeps this rank's fp32 master weights and Adam's moments, as parts of named parameters.

Without ZeRO they are the parameters and the optimizer's state. At stages 1 and 2 a rank has one flat partition for each
parameter group, at stage 3 one for each sub-group, which may lie in host memory, or on NVMe between steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd3_ds.runtime.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: elements start … start + n of the flat tensor, each element on one rank only.

    weights, and Adam's moments exp_avg and exp_avg_sq: [n] in fp32. They are live: written to, they are the engine's.
    """

    name: str
    start: int
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Masters:
    """Of a DeepSpeed engine just made; `shapes` are the whole parameters'."""

    def __init__(self, engine: Any, stage: int, world: World, shapes: dict[str, torch.Size]):
        self._engine = engine
        self._zero = engine.optimizer
        self._adam = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        self._stage = stage
        self._world = world
        self._shapes = shapes
        for index, flat in enumerate(self._flats()):
            if not self._is_on_disk(index):
                self._make_moments(flat)

    def groups(self, write: bool = False) -> Iterator[list[Fragment]]:
        """This rank's share, some at a time, live until the next are asked for; `write`: they are written to."""
        if self._stage < 3:
            yield [fragment for name, p in self._engine.module.named_parameters() for fragment in self._of(name, p)]
            return
        zero = self._zero
        names = {id(p): name for name, p in self._engine.module.named_parameters()}
        for index, parameters in enumerate(zero.fp16_groups):
            if self._is_on_disk(index):
                zero._optimizer_states_and_gradient_swap_in(index)
                self._make_moments(zero.fp32_partitioned_groups_flat[index])
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
                yield self._fragment(name, 0, parameter, 0, parameter.numel())
        elif self._stage == 3:
            group, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._world.rank * numel
            real = min(numel, self._shapes[name].numel() - start)  # the last parts are padded
            if real > 0:
                yield self._fragment(name, start, self._zero.fp32_partitioned_groups_flat[group], offset, real)
        elif (mapping := parameter._hp_mapping) is not None:
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            place = mapping.hp_fragment_address
            yield self._fragment(name, mapping.lp_fragment_address.start, flat, place.start, place.numel)

    def _fragment(self, name: str, start: int, flat: Tensor, offset: int, numel: int) -> Fragment:
        moments = self._adam.state[flat]
        parts = (whole.data.flatten()[offset : offset + numel] for whole in (flat, *(moments[key] for key in MOMENTS)))
        return Fragment(name, start, *parts)

    @property
    def updates(self) -> int:
        """Updates that the moments have seen; skipped steps are not among them."""
        return max((int(self._adam.state[flat]["step"]) for flat in self._flats() if self._adam.state[flat]), default=0)

    def wrote(self, updates: int | None = None) -> None:
        """Call on all ranks after writing, with the `updates` that the moments written have seen.

        The weights that the passes use then follow the fp32 masters.
        """
        if updates is not None:
            for flat in self._flats():
                step = self._adam.state[flat]["step"]
                self._adam.state[flat]["step"] = torch.full_like(step, updates) if torch.is_tensor(step) else updates
        zero = self._zero
        if self._stage == 0 and self._world.size > 1:
            for parameter in self._flats():
                for tensor in (parameter.data, *(self._adam.state[parameter][key] for key in MOMENTS)):
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
        """The fp32 tensors that Adam updates on this rank: parameters, or ZeRO's flat partitions of them."""
        if self._stage == 0:
            return list(self._engine.module.parameters())
        return list(
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _is_on_disk(self, index: int) -> bool:
        return self._stage == 3 and bool(self._zero._swappable_optimizer_subgroup(index))

    def _make_moments(self, flat: Tensor) -> None:
        """Make what Adam makes at its first update, so that a checkpoint can be read into it."""
        if self._adam.state[flat]:
            return
        moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
        # DeepSpeed's Adam for the host counts in an integer, torch's in a tensor.
        of_torch = isinstance(self._adam, torch.optim.AdamW)
        step: Any = torch.zeros((), device=flat.device) if of_torch else 0
        self._adam.state[flat] = {"step": step, **moments}
