"""Texts streamed from the Hugging Face hub, all of one commit."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError, did_you_mean
from data_prep.pieces import Position
from data_prep.text_field import no_field, require_strings

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

TIMEOUT_SECONDS = 10


@functools.cache
def find_commit(repository: str, branch: str, advice: str) -> DatasetInfo:
    """What the hub knows of a data set at `branch` (or a commit), asked once in a process; `.sha` is its commit.

    Raises UserError that ends in `advice` where the hub or the set cannot be had.
    """
    # The libraries read these when they are imported.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(TIMEOUT_SECONDS))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(TIMEOUT_SECONDS))
    from huggingface_hub import HfApi

    with _user_errors(repository, f"revision '{branch}'", advice):
        return HfApi().dataset_info(repository, revision=branch, timeout=TIMEOUT_SECONDS)
    raise AssertionError


def parquet_texts(
    info: DatasetInfo,
    folder: str,
    field: str,
    documents: int,
    part: tuple[int, int],
    position: Position,
    advice: str,
) -> Iterator[str | None]:
    """The texts, None for null, numbered from `part[0]` to before `part[1]` of a split that has `documents` of them.

    The split's Parquet files are those whose names begin with `folder`. Raises UserError where it is not whole.
    """
    parent, _, split = folder.rstrip("/").rpartition("/")
    names = sorted(file.rfilename for file in info.siblings or [] if file.rfilename.endswith(".parquet"))
    files = [name for name in names if name.startswith(folder)]
    # The hub names a split so when its conversion may have ended early; whether it did, the number of documents tells.
    files = files or [name for name in names if name.startswith(f"{parent}/partial-{split}/")]
    with _user_errors(info.id, f"'{folder.rstrip('/-')}'", advice):
        tables = [(file, _metadata(info, file)) for file in files]
        found = sum(metadata.num_rows for _, metadata in tables)
        if found != documents:
            raise UserError(
                f"--source {info.id}: the hub has {found} of the {documents} documents of '{folder.rstrip('/-')}' as "
                f"Parquet; {advice}"
            )
        position.done, position.total = 0.0, float(part[1] - part[0])
        first = 0
        for file, metadata in tables:
            for text in _rows(info, file, metadata, field, part[0] - first, part[1] - first):
                position.done += 1
                yield text
            first += metadata.num_rows


def any_texts(info: DatasetInfo, split: str, field: str, position: Position, advice: str) -> Iterator[str | None]:
    """The column `field`, None for null, of a split of any set that the library `datasets` can stream."""
    import datasets

    datasets.disable_progress_bars()
    with _user_errors(info.id, f"split '{split}'", advice):
        stream = datasets.load_dataset(info.id, split=split, streaming=True, revision=info.sha)
        known = (stream.info.splits or {}).get(split)
        position.done, position.total = 0.0, float(known.num_examples if known else 0)
        for row in stream:
            if field not in row:
                raise no_field(info.id, field, list(row))
            position.done += 1
            if not isinstance(row[field], (str, type(None))):
                kind = type(row[field]).__name__
                raise UserError(
                    f"--text-field {field}: {info.id} holds values of the type {kind} there, which are no text; name a "
                    f"column of strings ({', '.join(name for name in row if isinstance(row[name], str)) or 'none'})"
                )
            yield row[field]


def _open(info: DatasetInfo, file: str) -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(f"datasets/{info.id}@{info.sha}/{file}", "rb")


def _metadata(info: DatasetInfo, file: str) -> Any:
    import pyarrow.parquet

    with _open(info, file) as stream:
        return pyarrow.parquet.ParquetFile(stream).metadata


def _rows(info: DatasetInfo, file: str, metadata: Any, field: str, first: int, last: int) -> Iterator[str | None]:
    """The rows of a file from `first` to before `last`, which may lie outside it; what is not needed is not read."""
    import pyarrow.parquet

    groups, start = [], 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if start < last and start + count > first:
            groups.append((group, start))
        start += count
    if not groups:
        return
    with _open(info, file) as stream:
        table = pyarrow.parquet.ParquetFile(stream, metadata=metadata, page_checksum_verification=True)
        require_strings(info.id, field, table.schema_arrow)
        number = groups[0][1]
        for batch in table.iter_batches(batch_size=256, row_groups=[group for group, _ in groups], columns=[field]):
            for text in batch.column(0).to_pylist():
                if first <= number < last:
                    yield text
                number += 1


class _user_errors:
    """Turns what the hub's libraries raise into one sentence that ends in `advice`."""

    def __init__(self, repository: str, what: str, advice: str):
        self.repository, self.what, self.advice = repository, what, advice

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Every layer below has its own classes for the same few causes.
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"--source {self.repository}: {self._cause(error)}; {self.advice}") from None

    def _cause(self, error: Exception) -> str:
        import requests
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return "the hub gives it only to those who accepted its terms: accept them there and set HF_TOKEN"
        if isinstance(error, errors.RepositoryNotFoundError):
            from data_prep.catalog import EMBEDDED_SETS, NAMED_SETS

            hint = did_you_mean(self.repository.split("/")[-1], [*NAMED_SETS, *EMBEDDED_SETS])
            return f"the hub has no such public data set ({hint})"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"the hub has no {self.what} of it"
        if isinstance(error, (requests.RequestException, ConnectionError, TimeoutError, errors.OfflineModeIsEnabled)):
            return "the Hugging Face hub cannot be reached from here"
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{self.what} cannot be read from the hub ({cause})"
