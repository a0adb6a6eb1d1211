"""Which sample meets which noise: our slot arithmetic against streaming's own partition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_ds.data.share import Share
from bd3_ds.data.streaming_import import import_streaming


def streaming_batches(samples, nodes, ranks_per_node, workers, micro_batch, canonical_nodes, drop_first=0):
    """Sample ids [rank, batch, sample] as streaming deals them; a rank reads its workers in turn."""
    import_streaming()
    from streaming.base.partition import get_partitions

    ids = get_partitions(
        "relaxed", samples, canonical_nodes, nodes, ranks_per_node, workers, micro_batch, drop_first, nodes
    )
    ids = ids.transpose(0, 1, 3, 2, 4)  # worker innermost of batches
    return ids.reshape(nodes * ranks_per_node, -1, micro_batch)


@settings(max_examples=40, deadline=None)
@given(
    nodes=st.sampled_from([1, 2, 4]),
    ranks=st.sampled_from([1, 2, 4]),
    workers=st.sampled_from([1, 2, 3]),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 4),
    done=st.integers(0, 2),
)
def test_slots_are_the_canonical_order(nodes, ranks, workers, micro_batch, accumulation, steps, done):
    world = nodes * ranks
    global_batch = world * micro_batch * accumulation
    samples = global_batch * (steps + done) + 5
    canonical = 4
    samples += -samples % canonical
    reference = streaming_batches(samples, 1, 1, 1, 1, canonical)[0, :, 0]  # one rank reads the canonical order itself
    dealt = streaming_batches(samples, nodes, ranks, workers, micro_batch, canonical, done * global_batch)
    for step in range(steps):
        expected = reference[(done + step) * global_batch :][:global_batch]
        found = np.full(global_batch, -1)
        for rank in range(world):
            share = Share(rank, world, ranks, micro_batch, global_batch)
            for micro_step in range(accumulation):
                found[share.slots(micro_step)] = dealt[rank, step * accumulation + micro_step]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("world, local", [(1, 1), (4, 2), (8, 8)])
def test_slots_partition_the_global_batch(world, local):
    shares = [Share(rank, world, local, 3, 3 * world * 2) for rank in range(world)]
    slots = np.concatenate([share.slots(i) for share in shares for i in range(2)])
    assert sorted(slots) == list(range(3 * world * 2))
