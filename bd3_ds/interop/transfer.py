"""To and from the hub by name: models are fetched without their code, and folders are sent.

HF_ENDPOINT, HF_TOKEN and HF_HOME mean what they mean to huggingface_hub, which does the work.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError

TIMEOUT_SECONDS = 10
# What a conversion reads. No code is among it.
WANTED = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer/*")


def fetch(name: str) -> Path:
    """The folder of the model `name`, fetched into huggingface_hub's cache; raises UserError where it cannot be had."""
    from huggingface_hub import snapshot_download

    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(TIMEOUT_SECONDS))
    advice = "give a local folder with config.json and safetensors instead"
    try:
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=list(WANTED),
                ignore_patterns=["*/*.safetensors"],  # other forms of the same weights
                etag_timeout=TIMEOUT_SECONDS,
            )
        )
    except Exception as error:  # every layer below has its own classes for the same few causes
        raise UserError(
            f"{name} is no local folder and cannot be fetched from the hub: {_cause(error)}; {advice}"
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} on the hub has no config.json; {advice}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name} on the hub has no safetensors, and pickles (.bin) are not read; {advice}")
    return folder


def require_token(name: str) -> None:
    """Raise UserError where there is no token to push to `name` with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"--push {name} needs a token that may write: set HF_TOKEN, or log in with `hf auth login`")


def push(folder: Path, name: str, private: bool = False) -> str:
    """Send a folder to the model repository `name`, which is made where it is not there; its address.

    Raises UserError where the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model of bd3-ds")
    except Exception as error:
        raise UserError(f"--push {name} failed: {_cause(error)}; {folder} is written and whole") from None
    return str(url)


def _cause(error: BaseException) -> str:
    """One sentence of what huggingface_hub raised, or of what that was raised from."""
    import requests
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is given only to those who accepted its terms: accept them there and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private and HF_TOKEN does not open it"
    if isinstance(error, errors.HFValidationError):
        return "that is no name on the hub"
    status = _status(error)
    if status in (401, 403):
        return f"the token is not accepted for it ({status})"
    if status is not None:
        return f"the hub answered {status}"
    unreachable = (
        requests.ConnectionError,
        requests.Timeout,
        ConnectionError,
        TimeoutError,
        errors.OfflineModeIsEnabled,
    )
    if isinstance(error, unreachable):
        return "the hub cannot be reached from here"
    if error.__cause__ is not None:
        return _cause(error.__cause__)
    return (str(error).splitlines() or [type(error).__name__])[0]


def _status(error: Any) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
