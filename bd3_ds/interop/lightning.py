"""Tensors out of a PyTorch checkpoint file without running what its pickle asks for.

A pickle can name any function and have it called. This reader knows tensors and plain containers; every other name
becomes an inert object that swallows what is done to it. So a file of unknown origin cannot do anything.
Layout: https://docs.pytorch.org/docs/stable/notes/serialization.html (a zip with data.pkl and data/KEY).

Why not `torch.load(weights_only=True, mmap=True)`, with inert stand-ins for the file's other names inside
`torch.serialization.safe_globals`: as of torch 2.13 it reads OmegaConf's objects that way, but fills no other
containers than list, dict, OrderedDict and Counter. A deque, a subclass of dict, or an OmegaConf resolver cache in use,
anywhere among the hyper-parameters, and the whole file is refused with its weights. It also refuses names of `os` and
`sys` (such a file is read here, and nothing is called), and it needs torch, which checking a recipe does without.
`tests/unit/interop/test_lightning.py` says when a newer torch can.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file: its storage's key and dtype, and how the tensor is laid out in it."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class CheckpointFile:
    """What a checkpoint holds: `content` is its pickle with StoredTensor for tensors. No torch before `tensor`.

    Raises UserError where the file is no zip of torch's or is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._names = archive.namelist()
                (pickled,) = (name for name in self._names if name.count("/") == 1 and name.endswith("/data.pkl"))
                self._root = pickled.partition("/")[0]
                order = f"{self._root}/byteorder"
                if order in self._names and archive.read(order) != b"little":
                    raise UserError(f"{path} was written by a big-endian machine; save it again on another")
                with archive.open(pickled) as file:
                    self.content = _reader(file).load()
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{path} is damaged or no checkpoint of torch >= 1.6 ({error})") from None
        except UserError:
            raise
        except Exception as error:  # a damaged or hostile pickle can fail in any way
            raise UserError(f"{path} holds a pickle that cannot be read ({type(error).__name__}: {error})") from None

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor itself, on the CPU."""
        import torch

        name = f"{self._root}/data/{stored.key}"
        try:
            with zipfile.ZipFile(self.path) as archive:
                flat = torch.frombuffer(bytearray(archive.read(name)), dtype=getattr(torch, stored.dtype))
            return torch.as_strided(flat, stored.shape, stored.stride, stored.offset).clone()
        except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is damaged: {name} cannot be read ({error})") from None


@dataclass(frozen=True)
class LightningModel:
    """The model in a Lightning file under new names: `tensors`, which are averages (EMA) where `averaged`."""

    file: CheckpointFile
    tensors: dict[str, StoredTensor]
    averaged: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self) -> dict[str, Tensor]:
        """The tensors themselves, on the CPU; raises UserError where the file is damaged."""
        return {name: self.file.tensor(stored) for name, stored in self.tensors.items()}


def read_lightning(path: Path, rename: Callable[[str], str | None]) -> LightningModel:
    """The model in upstream's Lightning file; `rename` gives our name for a key of its state_dict, or None.

    Its configuration is code and is not read. Raises UserError where the file is no such checkpoint.
    """
    file = CheckpointFile(path)
    content = file.content if isinstance(file.content, dict) else {}
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} has no state_dict; is this a Lightning checkpoint of bd3lms?")
    tensors = {name: value for key, value in state.items() if (name := rename(key)) is not None}
    if not tensors or not all(isinstance(value, StoredTensor) for value in tensors.values()):
        raise UserError(f"{path} has no weights in its state_dict; is this a Lightning checkpoint of bd3lms?")
    average = _average(content, path, tensors)
    return LightningModel(file, average or tensors, average is not None)


def _average(content: dict[Any, Any], path: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor] | None:
    """Upstream's averaged weights, kept in the order of the parameters without their names; None where it has none."""
    average = content.get("ema")
    if average is None:
        return None
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    shapes = [stored.shape for stored in tensors.values()]
    if not isinstance(shadow, list) or [getattr(stored, "shape", None) for stored in shadow] != shapes:
        raise UserError(f"the averaged weights in {path} are not those of its state_dict; is it a bd3lms checkpoint?")
    return dict(zip(tensors, shadow, strict=True))


def _reader(file: Any) -> pickle.Unpickler:
    """Everything that a pickle can reach is made anew for this file, so that nothing it does outlives it."""

    class Inert:
        def __init__(self, *args: Any, **kwargs: Any): ...

        def __call__(self, *args: Any, **kwargs: Any) -> Inert:
            return self

        def __setstate__(self, state: Any) -> None: ...

        def __setitem__(self, key: Any, value: Any) -> None: ...

        def append(self, value: Any) -> None: ...

        def extend(self, values: Any) -> None: ...

        def add(self, value: Any) -> None: ...

    def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        key, dtype = storage
        shape, stride = tuple(int(n) for n in shape), tuple(int(n) for n in stride)
        return StoredTensor(str(key), str(dtype), int(offset), shape, stride)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    known: dict[tuple[str, str], Callable[..., Any] | type] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
    }
    storages = {name: type(name, (), {"dtype": dtype}) for name, dtype in _DTYPES.items()}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name in storages:
                return storages[name]
            return known.get((module, name), Inert)

        def persistent_load(self, pid: Any) -> Any:
            _, storage, key, *_ = pid
            return key, storage.dtype

    return Reader(file)
