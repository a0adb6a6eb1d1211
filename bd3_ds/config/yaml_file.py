"""A YAML file as a mapping of what was written in it, references (`${…}`) replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bd3_ds.config.yaml_text import Plain, natural, read_yaml
from bd3_ds.runtime.errors import UserError, did_you_mean


def read_file(path: Path, what: str, recipes: Path) -> dict[str, Any]:
    """The content of `path`, a `what` in sentences; where it is missing, files beside it or in `recipes` are named."""
    try:
        content = resolved(read_yaml(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        known = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        known = known or [os.path.relpath(p) for p in recipes.glob("*.yaml")]
        raise UserError(f"{what} {path} not found; {did_you_mean(str(path), known)}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise UserError(f"{what} {path} must hold 'key: value' lines, not a {kind}")
    return content


def resolved(content: Any) -> Any:
    """`content` with its ${…} replaced, as text where they give a scalar; the rest keeps its spelling."""
    if "${" not in str(content):
        return content
    if not isinstance(content, dict):
        return resolved({"value": content})["value"]
    found = OmegaConf.create(_natural(content))
    OmegaConf.resolve(found)
    return _overlaid(content, OmegaConf.to_container(found))


def _natural(written: Any) -> Any:
    """With numbers where numbers were written, as references show them."""
    if isinstance(written, dict):
        return {_natural(key): _natural(value) for key, value in written.items()}
    if isinstance(written, list):
        return [_natural(value) for value in written]
    return natural(written) if isinstance(written, Plain) else written


def _overlaid(written: Any, found: Any) -> Any:
    if isinstance(written, dict):
        return {key: _overlaid(value, found[key]) for key, value in written.items()}
    if isinstance(written, list):
        return [_overlaid(value, one) for value, one in zip(written, found, strict=True)]
    if not (isinstance(written, str) and "${" in written):
        return written
    return str(found) if isinstance(found, bool | int | float | str) else found
