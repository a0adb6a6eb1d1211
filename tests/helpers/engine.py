"""What a test puts in the engine's place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bd3_ds.model.dit import DiT


class OneProcess:
    """Stands in for the engine and the average of weights: the network itself, gradients kept, no update."""

    def __init__(self, model: DiT, accumulation: int = 1):
        self.module = model
        self.accumulation = accumulation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    skipped = False

    def step(self, lr: float, refuse: bool = False) -> None: ...

    def update(self) -> None: ...

    def grad_norm(self) -> float:
        return 1.0
