"""The order of samples does not know who reads them: any ranks and workers, stopped anywhere, in real processes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.readers import Cluster, data_config, numbered_pack, read

CHUNKS, STEPS = 70, 20  # 8 steps of 8 samples an epoch, so two borders and a part of a third epoch
PER_EPOCH = CHUNKS // 8
CLUSTERS = [Cluster(ranks, workers) for ranks, workers in itertools.product((1, 2, 4), (0, 2))]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("packs")
    return numbered_pack(directory / "prose", CHUNKS), numbered_pack(directory / "code", 40, mark=1)


@pytest.fixture(scope="module")
def alone(packs: tuple[Path, Path]) -> np.ndarray:
    """What one process without loader processes reads in one go."""
    return read(data_config(packs[0]), Cluster(), 0, STEPS)


def test_an_epoch_has_each_sample_once(alone):
    for epoch in (alone[:PER_EPOCH], alone[PER_EPOCH : 2 * PER_EPOCH]):
        assert len(np.unique(epoch)) == 8 * PER_EPOCH and epoch.max() < CHUNKS
    assert (alone[:PER_EPOCH] != alone[PER_EPOCH : 2 * PER_EPOCH]).any()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])  # each has every ranks and workers
def test_hops_over_ranks_and_workers(packs, alone, seed):
    """Each stop is a kill: nothing is cleaned up, and the next start has other ranks, workers and micro-batches."""
    draw = random.Random(seed)
    order = draw.sample(CLUSTERS, len(CLUSTERS))
    stops = [0, *sorted(draw.sample(range(1, STEPS), len(order) - 1)), STEPS]
    for cluster, (begin, end) in zip(order, itertools.pairwise(stops), strict=True):
        cluster = Cluster(cluster.ranks, cluster.workers, micro_batch=draw.choice([1, 2]))
        found = read(data_config(packs[0]), cluster, begin, end - begin)
        assert np.array_equal(found, alone[begin:end]), (cluster, begin, end)


def test_mixed_packs(packs):
    """data.train once an epoch, the other its share, in the same batches whoever reads."""
    prose, code = packs
    data = data_config(prose, mix={str(code): 0.3})
    whole = 70 + 30  # of the epoch's 100 samples, 96 make whole batches
    found = read(data, Cluster(), 0, 24)
    for epoch in (found[:12], found[12:]):
        of_code = epoch >= 10_000
        assert len(np.unique(epoch)) == 96 and whole - 4 - 70 <= of_code.sum() <= 30
        assert of_code.any(axis=1).sum() > 6  # it is among the rest, not behind it
    assert len(np.unique(found[found >= 10_000])) > 30  # another epoch takes another part of it
    for cluster, begin, end in ((Cluster(4, 2), 0, 7), (Cluster(2, 0, micro_batch=2), 7, 15), (Cluster(1, 2), 15, 24)):
        assert np.array_equal(read(data, cluster, begin, end - begin), found[begin:end])


@pytest.mark.parametrize(
    "cluster", [Cluster(4, 0, replicas=2), Cluster(4, 2, 2, replicas=4), Cluster(2, 2, replicas=2)]
)
def test_replicas_read_the_same(packs, alone, cluster):
    assert np.array_equal(read(data_config(packs[0]), cluster, 5, 6), alone[5:11])


@pytest.mark.parametrize(
    ("algorithm", "nodes"),
    [
        *(("py1e", nodes) for nodes in (1, 4)),
        *((algorithm, 4) for algorithm in ("py1br", "py1s", "py2s", "naive")),
        *(pytest.param(algorithm, 1, marks=pytest.mark.slow) for algorithm in ("py1br", "py1s", "py2s", "naive")),
    ],
)
def test_every_shuffle(packs, algorithm, nodes):
    """Also over several canonical nodes, of which some have a sample less than others."""
    data = data_config(packs[0], shuffle_algorithm=algorithm, canonical_nodes=nodes)
    found = read(data, Cluster(), 0, PER_EPOCH + 2)
    assert len(np.unique(found[:PER_EPOCH])) == 8 * PER_EPOCH
    assert np.array_equal(read(data, Cluster(2, 2), 3, PER_EPOCH - 1), found[3:])
