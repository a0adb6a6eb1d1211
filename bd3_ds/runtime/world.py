"""Who this process is among its peers, and the few collectives that are used outside the engine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import torch

from bd3_ds.runtime.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """One process of a run: its global rank, the number of ranks, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes records and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank; anything that can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the main rank alone; its result on every rank.

        The UserError or OSError that it ends with is raised on every rank: none waits for one that has left.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[1] = error
        result, failure = outcome
        if self.size > 1:
            told = [outcome]
            torch.distributed.broadcast_object_list(told, src=0)
            if not self.is_main:
                result, failure = told[0]
        if failure is not None:
            raise failure
        return result

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every rank; the first rank's UserError or OSError is raised on all of them."""
        result, failure = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
        first = next((each for each in self.gather(failure) if each is not None), None)
        if first is not None:
            raise first
        return result  # type: ignore[return-value]


def prepare_environment() -> None:
    """Fill in what a launcher leaves out, before anything that reads it is imported.

    DeepSpeed's launcher sets LOCAL_SIZE; streaming reads LOCAL_WORLD_SIZE. Without a launcher the process is
    a world of one. What srun says is taken before (`runtime/slurm.py`).
    """
    env = os.environ
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(probe.getsockname()[1])


def join_world() -> World:
    """Join the process group (NCCL on GPUs, Gloo on CPUs) through DeepSpeed and say who we are."""
    import deepspeed

    prepare_environment()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    with redirect_stdout(StringIO()):  # it prints that it built its collectives; a failure is an exception
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        device=device,
    )
    if device.type == "cpu":
        _unlink_shared_buffer(world)
    return world


def _unlink_shared_buffer(world: World) -> None:
    """DeepSpeed's CPU collectives map 66 MiB a rank under a name that they never remove; nobody needs the name.

    Without this, every start on CPUs would keep that memory from the machine until it is booted again.
    """
    world.barrier()  # every rank has mapped the others' buffers
    words = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], world.rank)
    Path("/dev/shm", "deepspeed_allreduce_buffer_" + "_".join(map(str, words))).unlink(missing_ok=True)
