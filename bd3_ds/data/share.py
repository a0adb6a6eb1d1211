"""A rank's share of the global batch.

streaming lays samples out in one canonical order that does not depend on the cluster and deals them to ranks one by
one: position j of a rank on one of N nodes with R ranks each is sample (j * R + local rank) * N + node of that order
(streaming/base/partition/orig.py; held by tests/unit/data/test_share.py against streaming itself). So a global batch
of G sequences is the same G samples at any world size and micro-batch, and a sample's slot is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """A rank's part in a run's batches: where it stands in the cluster, and the batch numbers.

    `replicas` ranks in a row read the same samples, each of which counts once in the global batch.
    """

    rank: int
    world_size: int
    local_size: int
    micro_batch: int
    global_batch: int
    replicas: int = 1

    @property
    def readers(self) -> int:
        """Ranks that read different samples."""
        return self.world_size // self.replicas

    @property
    def nodes(self) -> int:
        """Nodes that samples are dealt to: as streaming counts them, one where replicas do not fill whole nodes."""
        return self.readers // self.local_size if self.readers % self.local_size == 0 else 1

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.readers)

    def slots(self, micro_step: int) -> np.ndarray:
        """Slots [m] of the micro-batch `micro_step` (0 … accumulation - 1) of a step."""
        per_node = self.readers // self.nodes
        node, local_rank = divmod(self.rank // self.replicas, per_node)
        position = micro_step * self.micro_batch + np.arange(self.micro_batch)
        return (position * per_node + local_rank) * self.nodes + node
