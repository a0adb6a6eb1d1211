"""What a recipe chooses by name, and what is to be known of each before torch is imported.

The entries are registered where they are computed: `diffusion/objectives/`, `diffusion/bounds.py`,
`diffusion/schedules.py`, `diffusion/weighting.py`, `model/attention/backends/` and `train/optimizers.py`, or in a
module of the user's (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bd3_ds.config.rules import Range
from bd3_ds.runtime.registry import Registry

ESTIMATORS = ("exact", "stratified", "mc", "report")
AUTO_ATTENTION = "auto"  # model.attention: the backend that suits the mask and the device
DEVICES = ("cpu", "cuda")
TOKEN, SEQUENCE, CONFIGURED = "token", "sequence", "configured"  # kinds of blocks
MASKED = "masked diffusion"  # the bound of objectives that name no other


@dataclass(frozen=True)
class Objective:
    """A training objective: its loss, and the facts by which all else treats its models.

    title: what a model of it is, for its card. loss: from a denoiser and a noisy micro-batch to a `Loss`, called as
    `diffusion/objective.py` says. causal: tokens see those before them alone, there is no noise, every token is asked
    for. timed: the network is conditioned on the noise level of a sequence. blocks: which tokens are denoised together:
    each alone, those of a whole sequence, or as many as objective.block_size says. bound: what scores a model of it, by
    its name in BOUNDS. estimators: those that can estimate this bound. analytic: its network's outputs are rates of the
    reverse process, so that sampling can go by them.
    """

    title: str
    loss: Callable[..., Any]
    causal: bool = False
    timed: bool = False
    blocks: str = SEQUENCE
    bound: str = MASKED
    estimators: tuple[str, ...] = ESTIMATORS
    analytic: bool = False

    @property
    def has_blocks(self) -> bool:
        """Whether objective.block_size, block_schedule and views belong to it: blocks that share a clean pass."""
        return self.blocks == CONFIGURED

    @property
    def is_whole(self) -> bool:
        """Whether a sequence of whatever length is one block."""
        return self.blocks == SEQUENCE

    @property
    def sampled_estimator(self) -> str:
        """What scores it where an exact value is out of reach."""
        return "stratified" if "stratified" in self.estimators else self.estimators[0]

    @property
    def can_be_exact(self) -> bool:
        """Whether small blocks of it can be scored without drawing anything."""
        return "exact" in self.estimators

    def block_size(self, configured: int | None, length: int) -> int:
        """L', the tokens denoised together in sequences of `length`; `configured` is objective.block_size."""
        if self.blocks == TOKEN:
            return 1
        return (configured or length) if self.has_blocks else length


@dataclass(frozen=True)
class Parameter:
    """A number that a named thing takes: which values it may have, and the one it has where a recipe gives none.

    rule: `rules.number(…)`. default: None where every recipe must give it.
    """

    rule: Range
    default: float | None = None


@dataclass(frozen=True)
class ScheduleKind:
    """A noise schedule that a recipe can name. `make` gives a `diffusion.schedule.Schedule` for its parameters.

    parameters: by name, the arguments of `make`; a recipe gives them in objective.schedule.parameters. moves: `make`
    takes `progress` too, the share of the training that is over. No torch is imported before `make` is called.
    """

    make: Callable[..., Any]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    moves: bool = False


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute attention that a recipe can name.

    attend: from queries [B, H, Q, d], which come divided by the square root of d, keys and values [B, H, K, d] and a
    `model.attention.masks.AttentionMask` to the output [B, H, Q, d]. runs_on: the DEVICES where it works; on others an
    export that asks for it is "auto". trains_on: those where it has a backward pass. shares_keys_on: those where it
    takes keys and values of fewer heads, each for several heads of queries, as they are. planned: what the plan runs in
    its place, on q, k and v without memory, and keeps as much; None: as torch's fused kernels do.
    """

    attend: Callable[..., Any]
    runs_on: tuple[str, ...] = DEVICES
    trains_on: tuple[str, ...] = DEVICES
    shares_keys_on: tuple[str, ...] = ()
    planned: Callable[..., Any] | None = None


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that a recipe can name. It sees flat parts of many weights laid side by side, as ZeRO cuts them.

    title: its name, for a model's card. make: from parameter groups, each with its weight_decay, the section optim and
    the `parameters` to a torch.optim.Optimizer. state: the fp32 tensors, each of the weights' shape, that it keeps for
    weights, by the names it keeps them under; checkpoints hold them. A count of updates, `step`, may be beside them.
    on_host: `make` for weights in host memory (offload_optimizer); None where it cannot be offloaded. parameters: by
    name, further arguments of both; a recipe gives them in optim.parameters. No torch is imported before `make`.
    """

    title: str
    make: Callable[..., Any]
    state: tuple[str, ...]
    on_host: Callable[..., Any] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def values_of(parameters: Mapping[str, Parameter], given: Mapping[str, float]) -> dict[str, Any]:
    """Each parameter's value: the `given` one, or its default."""
    return {name: parameter.default for name, parameter in parameters.items()} | dict(given)


def parameter_problems(
    what: str, parameters: Mapping[str, Parameter], key: str, given: Mapping[str, float]
) -> list[str]:
    """A sentence for each parameter `given` under this key that `what` does not take so, and for each that is missing.

    what: such as "this schedule".
    """
    known = ", ".join(parameters) or "none"
    unknown = [f"{key}.{name} is unknown; {what} takes {known}" for name in given if name not in parameters]
    missing = [
        f"{key}.{name} has no value; give it one"
        for name, parameter in parameters.items()
        if parameter.default is None and name not in given
    ]
    outside = [
        problem
        for name, parameter in parameters.items()
        if name in given
        for problem in parameter.rule.problems(f"{key}.{name}", given[name])
    ]
    return unknown + missing + outside


@dataclass(frozen=True)
class Weight:
    """A weight of the training loss. `function` gives it from log-SNRs [...] and the section objective.weight.

    It is a factor on the bound's own weight. plain: the weight is 1 instead, whatever the bound's is. single_rate: it
    neither vanishes nor explodes where everything is masked, so that a single rate can be trained with it.
    """

    function: Callable[..., Any]
    plain: bool = False
    single_rate: bool = False


OBJECTIVES: Registry[Objective] = Registry("objective.name", "bd3_ds.diffusion.objectives")
# From a network, texts, block size, mask id and estimator to their `Bound`, called as `diffusion/bounds.py` says.
BOUNDS: Registry[Callable[..., Any]] = Registry("bound", "bd3_ds.diffusion.bounds")
SCHEDULES: Registry[ScheduleKind] = Registry("objective.schedule.name", "bd3_ds.diffusion.schedules")
WEIGHTS: Registry[Weight] = Registry("objective.weight.name", "bd3_ds.diffusion.weighting")
ATTENTION: Registry[AttentionBackend] = Registry("model.attention", "bd3_ds.model.attention.backends")
OPTIMIZERS: Registry[OptimizerKind] = Registry("optim.name", "bd3_ds.train.optimizers")
