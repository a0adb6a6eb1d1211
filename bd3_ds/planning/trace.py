"""The network's own layers run on tensors without memory, and the bytes that these would take are counted.

On torch's meta device operators have results with shapes, types and storages but no numbers; autograd keeps and frees
them as ever, and a dispatch mode adds up what is alive. (torch.distributed._tools.mem_tracker counts so under
FakeTensorMode, which is slower and cannot make a GPU's tensors where torch is built without one.) What depends on the
device is replaced by what keeps as much: attention kernels, dropout, a GPU's RMSNorm, autocast. What is there for less
than an operator, and the rectangles of scores of stripes, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_ds.config.registries import ATTENTION
from bd3_ds.model.attention.attention import for_each_head
from bd3_ds.model.attention.planned import like_fused
from bd3_ds.model.dit import DiT
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.model.rope import rotary_angles
from bd3_ds.parallel.apply import prepare_layers

TRACED = 3  # layers that are run: those between the first and the last are alike


@dataclass(frozen=True)
class Work:
    """What is run: noisy and clean packed tokens of a text, a `precision` of fp32, bf16 or mixed (autocast over fp32).

    attention: the backend, never "auto"; cuda: a GPU's kernels; recompute as train.activation_checkpointing.
    """

    network: DiTConfig
    noisy: int
    clean: int
    precision: str
    attention: str
    cuda: bool
    recompute: str


@dataclass(frozen=True)
class Traced:
    """Bytes. kept: at the end of the forward pass, by the layers that were run; each_layer: by one between first and
    last; working: the most that the backward pass holds beyond `kept`.
    """

    kept: int
    each_layer: int
    working: int


@cache
def trace_layers(work: Work, rows: int, per_row: bool) -> Traced:
    """Run at most TRACED layers forward and backward on `rows` texts; per_row: each has its own conditioning."""
    network, tokens = work.network, work.noisy + work.clean
    with torch.device("meta"):
        model = DiT(network)
        if work.precision == "bf16":
            model.bfloat16()
        kernels = _Kernels(work)
        layers: list[Any] = list(model.layers)
        for layer in layers:
            layer.attend, layer.drop = _attend(work), _drop(work.cuda)
            layer.forward, layer.mix = kernels.inside(layer.forward), kernels.inside(layer.mix)
        prepare_layers(model, _Recompute(work.recompute))  # type: ignore[arg-type]
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(_forget_gradient)
        entered = []
        with _Alive(model.parameters()) as alive:
            cond = model._condition(torch.empty(rows if per_row else 1), torch.device("meta"))
            x = model.embed(torch.empty(rows, tokens, dtype=torch.int64))
            cos, sin = rotary_angles(torch.arange(tokens), network.head_width, network.rope_base)
            for layer in layers:
                entered.append(alive.now)
                queries = (work.noisy or tokens) if layer is layers[-1] else tokens
                x = layer(x, cond, cos, sin, _Mask(range(queries)))
            kept = alive.now - x.untyped_storage().nbytes()
            gradient = torch.empty_like(x)
            alive.most, kernels.keeps_casts = alive.now, False
            x.backward(gradient)
    each_layer = entered[2] - entered[1] if len(entered) > 2 else 0
    return Traced(kept, each_layer, alive.most - kept)


class _Alive(TorchDispatchMode):
    """Bytes of all storages that operators have made and nobody has freed, but `weights`: `now`, and the `most`."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: dict[int, Any] = {weight.untyped_storage()._cdata: None for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else (made,):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        address, count = storage._cdata, storage.nbytes()
        if address in self._storages:
            return

        def freed(_: Any) -> None:
            self.now -= count
            del self._storages[address]

        self._storages[address] = weakref.ref(storage, freed)
        self.now += count
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class _Mask:
    """All that a layer asks of a mask, where attention is a stand-in: how many tokens are queries."""

    queries: range


@dataclass(frozen=True)
class _Recompute:
    """Of TrainConfig, what changes a layer's memory; compiled layers are planned as uncompiled ones."""

    activation_checkpointing: str
    compile: bool = False


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None  # the plan counts gradients of weights by themselves


def _attend(work: Work) -> Any:
    """What stands for `attention.attend` with this backend."""
    backend = ATTENTION[work.attention]
    planned = backend.planned or like_fused

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Any, _backend: str) -> Tensor:
        if ("cuda" if work.cuda else "cpu") not in backend.shares_keys_on:
            k, v = for_each_head(q, k, v)
        mixed: Tensor = planned(q, k, v)
        return mixed

    return attend


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: torch.dtype) -> Tensor:
        ctx.save_for_backward(x.new_empty(x.shape, dtype=mask))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(above[0]), None


def _drop(cuda: bool) -> Any:
    """What stands for `dropout.dropout`: a GPU's mask has a byte a number, a CPU's is of the type of what it scales."""

    def drop(x: Tensor, rate: float, training: bool) -> Tensor:
        dropped: Tensor = _Drop.apply(x, torch.bool if cuda else x.dtype) if rate and training else x
        return dropped

    return drop


class _FusedRmsNorm(torch.autograd.Function):
    """Its input and, for each token, what it was divided by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        return torch.empty_like(above[0])


class _Kernels(TorchFunctionMode):
    """What torch does otherwise on the planned device than on the meta device.

    Autocast makes bf16 products of fp32 weights and keeps its casts of them; on a GPU it also brings the factors of
    addcmul to their widest type. A GPU's RMSNorm is one kernel, which keeps its input and a number a token.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._mixed, self._cuda = work.precision == "mixed", work.cuda
        self._casts: dict[Any, Tensor] = {}
        self.keeps_casts = True

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under this mode, wherever it is called: a backward pass runs under none."""

        def run(*given: Any) -> Any:
            with self:
                return function(*given)

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._cuda and func is F.rms_norm:
            return _FusedRmsNorm.apply(args[0])
        if self._mixed and func is F.linear:
            args = [self._cast(one) for one in args]
        elif self._mixed and self._cuda and func is torch.addcmul:
            args = [one.float() for one in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, one: Tensor | None) -> Tensor | None:
        """In bf16; casts of weights are kept during the forward pass, apart for what is computed again."""
        if not (isinstance(one, torch.nn.Parameter) and self.keeps_casts):
            return None if one is None else one.bfloat16()
        place = one, torch.is_grad_enabled()
        if place not in self._casts:
            self._casts[place] = one.bfloat16()
        return self._casts[place]
