"""Texts streamed from the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator

from bd3_ds.runtime.errors import UserError, did_you_mean
from data_prep.catalog import PARQUET_BRANCH

TIMEOUT_SECONDS = 10


def texts(repository: str, config: str | None, split: str, field: str, parquet: bool, advice: str) -> Iterator[str]:
    """Stream the column `field` of a split; `parquet`: from the hub's Parquet conversion of a script-only set.

    Raises UserError that ends in `advice` where the hub, the set, the split or the field cannot be had.
    """
    # The libraries read these when they are imported.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(TIMEOUT_SECONDS))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(TIMEOUT_SECONDS))
    _check_reachable(repository, advice)
    import datasets

    datasets.disable_progress_bars()
    try:
        if parquet:
            branch = PARQUET_BRANCH.replace("/", "%2F")
            files = f"hf://datasets/{repository}@{branch}/{config}/*{split}/*.parquet"
            stream = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
        else:
            stream = datasets.load_dataset(repository, config, split=split, streaming=True)
        for row in stream:
            if field not in row:
                raise UserError(f"--text-field {field}: {repository} has no such field; it has: {', '.join(row)}")
            yield str(row[field])
    except UserError:
        raise
    except Exception as error:  # every layer below has its own classes for the same few causes
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"split '{split}' cannot be read from the hub ({cause})"
        raise UserError(f"--source {repository}: {what}; {advice}") from None


def _check_reachable(repository: str, advice: str) -> None:
    # The data set library retries for minutes; one short question first answers fast.
    import requests
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().dataset_info(repository, timeout=TIMEOUT_SECONDS)
    except RepositoryNotFoundError:
        from data_prep.catalog import EMBEDDED_SETS, NAMED_SETS

        hint = did_you_mean(repository.split("/")[-1], [*NAMED_SETS, *EMBEDDED_SETS])
        raise UserError(f"--source {repository}: the hub has no such public data set ({hint}); {advice}") from None
    except (requests.RequestException, HfHubHTTPError, OfflineModeIsEnabled, OSError):
        raise UserError(f"--source {repository}: the Hugging Face hub cannot be reached from here; {advice}") from None
