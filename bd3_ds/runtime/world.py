"""The process group: this process's rank and device, and the few collectives that are used outside the engine."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import torch

from bd3_ds.runtime.errors import UserError, raised_on_all_ranks
from bd3_ds.runtime.extensions import build_announcement, drop_stale_locks
from bd3_ds.runtime.slurm import ranks_of_host

Result = TypeVar("Result")
# Beyond guards.stall_seconds, so that the guard shows where a rank stands before its peers give up on it.
_MARGIN, _NEVER = timedelta(minutes=10), timedelta(days=30)


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
        """True on rank 0, the only one that writes records and console lines."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        if self.size > 1:
            torch.distributed.barrier()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank; anything that can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the main rank only; its result is broadcast to every rank.

        The UserError or OSError that it raises is raised on every rank: none waits for one that has ended.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[1] = error
        result, failure = outcome
        if self.size > 1:
            received = [outcome]
            torch.distributed.broadcast_object_list(received, src=0)
            if not self.is_main:
                result, failure = received[0]
        if failure is not None:
            raise raised_on_all_ranks(failure)
        return result

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every rank; the first rank's UserError or OSError is raised on all of them."""
        result, failure = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
        first = next((each for each in self.all_gather_object(failure) if each is not None), None)
        if first is not None:
            raise raised_on_all_ranks(first)
        return result  # type: ignore[return-value]


def prepare_environment() -> None:
    """Set the environment variables that a launcher leaves out, before anything that reads them is imported.

    DeepSpeed's launcher sets LOCAL_SIZE; streaming reads LOCAL_WORLD_SIZE. Without a launcher the process is
    a world of one. The variables of srun and mpirun are read before (`runtime/slurm.py`).
    """
    env = os.environ
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env["LOCAL_WORLD_SIZE"] = str(ranks_of_host(env))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(probe.getsockname()[1])


def collective_timeout(stall_seconds: int) -> timedelta:
    """How long a rank waits in a collective for its peers; 0 (guards.stall_seconds is off): as good as for ever."""
    return timedelta(seconds=stall_seconds) + _MARGIN if stall_seconds else _NEVER


def join_world(timeout: timedelta | None = None) -> World:
    """Join the process group (NCCL on GPUs, Gloo on CPUs) through DeepSpeed and return this process's place in it.

    `timeout`: of collectives in this group and in all that are made later; absent: `collective_timeout` of 0.
    """
    prepare_environment()
    timeout = timeout or _NEVER
    # The default of groups made without a timeout, as DeepSpeed makes them; the first group takes its own.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if local_rank == 0:
        for lock in drop_stale_locks():
            print(f"removed {lock}, which a killed process left behind", file=sys.stderr, flush=True)
    if device.type == "cpu":
        _announce_build()
    with redirect_stdout(StringIO()):  # it prints that it built its collectives; a failure is an exception
        _init_distributed(backend, timeout)
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


def _announce_build() -> None:
    """On the first rank, say that the collectives for CPUs are being compiled: the first start looks stuck."""
    announcement = build_announcement("deepspeed_shm_comm", Path(torch.__file__).parent)
    if announcement is not None and os.environ["RANK"] == "0":
        print(announcement, file=sys.stderr, flush=True)


def _init_distributed(backend: str, timeout: timedelta) -> None:
    """Raises UserError where the port at which ranks meet is another program's."""
    import deepspeed

    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is taken on this host; give another: deepspeed --master_port, or "
            "MASTER_PORT in the environment of every rank"
        ) from None


def _unlink_shared_buffer(world: World) -> None:
    """DeepSpeed's CPU collectives map 66 MiB a rank under a name that they never remove; nobody needs the name.

    Without this, every start on CPUs would keep that memory from the machine until it is booted again.
    """
    world.barrier()  # every rank has mapped the others' buffers
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], world.rank)
    Path("/dev/shm", "deepspeed_allreduce_buffer_" + "_".join(map(str, parts))).unlink(missing_ok=True)
