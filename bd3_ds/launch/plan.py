"""On which hosts, and on how many ranks, a batch can be trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bd3_ds.config.schema import AUTO, RunConfig
from bd3_ds.runtime.errors import UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile; `slots` is the number of its accelerators, or of ranks on a host without any."""

    name: str
    slots: int


@dataclass(frozen=True)
class Plan:
    """`per_host` ranks on each of `hosts`, and the micro-batch that then divides train.global_batch, or AUTO."""

    hosts: tuple[str, ...]
    per_host: int
    micro_batch: int

    @property
    def ranks(self) -> int:
        return len(self.hosts) * self.per_host


def read_hostfile(path: Path) -> list[Host]:
    """`name slots=N` lines in DeepSpeed's format; raises UserError with the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--hostfile {path} cannot be read: {error.strerror}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1 or match[1] in [host.name for host in hosts]:
            raise UserError(
                f"--hostfile {path}, line {number}: '{text}' must be a host named once, such as 'node1 slots=8'"
            )
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise UserError(f"--hostfile {path} names no host; write lines such as 'node1 slots=8'")
    return hosts


def make_plan(run: RunConfig, hosts: Sequence[Host]) -> Plan | None:
    """The most ranks that train.global_batch can be split over; None where there is no host or no split.

    Each host gets as many ranks as any other, since the data loader counts on it. train.micro_batch is lowered where
    that makes the split whole, and never raised.
    """
    shared = run.train.sequence_parallel
    choices = []
    for per_host in range(1, max((host.slots for host in hosts), default=0) + 1):
        wide = [host.name for host in hosts if host.slots >= per_host]
        choices += [(tuple(wide[:number]), per_host) for number in range(1, len(wide) + 1)]
    # Among equals the fewest hosts: what is between them is slower than what is within.
    for names, per_host in sorted(choices, key=lambda choice: (-len(choice[0]) * choice[1], len(choice[0]))):
        groups, left = divmod(len(names) * per_host, shared)
        if left or run.train.global_batch % groups:
            continue
        if run.train.micro_batch == AUTO:  # the ranks find it, who know their memory
            return Plan(names, per_host, AUTO)
        part = run.train.global_batch // groups
        micro_batch = next(size for size in range(min(run.train.micro_batch, part), 0, -1) if part % size == 0)
        return Plan(names, per_host, micro_batch)
    return None


def explain(run: RunConfig, plan: Plan, hosts: Sequence[Host]) -> str:
    """One sentence about what is used, what is not, and why."""
    there = sum(host.slots for host in hosts)
    where = f"{len(plan.hosts)} host{'s' if len(plan.hosts) > 1 else ''} x {plan.per_host}"
    text = f"{plan.ranks} of {there} ranks ({where})"
    if plan.ranks < there:
        text += f", the most that train.global_batch={run.train.global_batch} splits over evenly"
    if plan.micro_batch != run.train.micro_batch:
        text += f"; train.micro_batch={plan.micro_batch} instead of {run.train.micro_batch}"
    return text
