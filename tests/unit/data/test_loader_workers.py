"""How loader processes start."""

import itertools

import torch

from bd3_ds.data import loader, loader_workers
from bd3_ds.data.share import Share
from bd3_ds.runtime.world import prepare_environment
from tests.helpers.readers import open_loader
from tests.helpers.tiny import tiny_run


def test_loader_processes_are_not_forked_beside_a_gpu(tmp_path, monkeypatch):
    """CUDA and NCCL do not survive a fork: a new interpreter is started, and deals out the same samples."""
    assert loader_workers.start_method() == ("spawn" if torch.cuda.is_available() else "fork")
    prepare_environment()
    run = tiny_run(tmp_path, "data.workers=1")
    started = []

    def ids_of_an_epoch(cuda):
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        chosen = loader_workers.start_method()
        monkeypatch.undo()
        monkeypatch.setattr(loader, "start_method", lambda: chosen)
        started.append(chosen)
        batches = open_loader(run.data, Share(0, 1, 1, micro_batch=4, global_batch=8))
        return [batch.ids for batch in itertools.islice(batches, 16)]

    assert ids_of_an_epoch(cuda=True) == ids_of_an_epoch(cuda=False)
    assert started == ["spawn", "fork"]
