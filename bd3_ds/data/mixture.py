"""Mixing packs: the samples of each pack per epoch."""

from __future__ import annotations

from bd3_ds.config.schema import DataConfig


def samples_of_epoch(data: DataConfig, chunks: list[int]) -> list[int]:
    """Samples of data.train and of each pack of data.mix, which hold `chunks`, in an epoch.

    data.train is passed once; the others have their shares of the sum, which may be a part of a pack or several passes.
    """
    rest = 1 - sum(data.mix.values())
    return [chunks[0], *(round(chunks[0] * share / rest) for share in data.mix.values())]
