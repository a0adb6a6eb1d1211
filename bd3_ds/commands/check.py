"""`run.py check RECIPE`: what a run costs and whether it fits, and one dry step, before any GPU-hour is spent."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bd3_ds.config.check import unreached
from bd3_ds.config.ds_json import DEFAULT, check_optimizer, check_place, load_ds_json
from bd3_ds.config.load import load_recipe, to_yaml
from bd3_ds.config.registries import ATTENTION, DEVICES, OBJECTIVES, OPTIMIZERS
from bd3_ds.config.schema import RunConfig
from bd3_ds.planning.findings import Findings, find
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable, write_text
from bd3_ds.runtime.gpus import GPUS, PER_NODE, find_gpu
from bd3_ds.runtime.tables import labelled, wrapped

T = TypeVar("T")


def main(argv: list[str]) -> int:
    """Print the plan, then take a dry step; exit 2 with every problem found."""
    arguments = _parser().parse(argv)
    problems: list[str] = []
    asked = _asked(arguments, problems)
    _files(arguments, problems)
    ds_json = _collect(problems, lambda: load_ds_json(arguments.deepspeed_config))
    run = _collect(problems, lambda: load_recipe(arguments.recipe, arguments.overrides))
    found = None
    if run is not None:
        if arguments.plot is not None and OBJECTIVES[run.objective.name].causal:
            problems.append(f"--plot draws a noise schedule, and objective.name={run.objective.name} has none")
        found = find(run, asked.world_size, asked.here)
        problems += found.problems
        if ds_json is not None:
            _place(found.run, ds_json, asked, problems)
    if problems or found is None or ds_json is None:
        raise UserError(*dict.fromkeys(problems))
    _show(found, ds_json, asked, arguments)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="run.py check", description="Plan a run and check its recipe, without training it.")
    parser.add_argument("recipe")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT)
    parser.add_argument(
        "--world-size", metavar="N", help=f"ranks that the run is meant for; default: 1, with --gpu {PER_NODE} a node"
    )
    parser.add_argument(
        "--nodes", metavar="N", help=f"machines that the ranks are on; default: 1, with --gpu one for {PER_NODE} ranks"
    )
    known = ", ".join(gpu.name for gpu in GPUS)
    parser.add_argument("--gpu", metavar="NAME", help=f"plan for ranks of this kind; default: as here; known: {known}")
    parser.add_argument(
        "--mfu", metavar="X", help="share of the peak rate that training reaches; default: 0.4, a guess"
    )
    parser.add_argument(
        "--dry-step",
        action=argparse.BooleanOptionalAction,
        help="one step on one sequence after the plan; default: where it takes no more than a minute, never with --gpu",
    )
    parser.add_argument("--resolved", action="store_true", help="print the resolved configuration as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the schedule's density, weight, masked share")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


@dataclass(frozen=True)
class Asked:
    """For what is planned; `assumed` says in words what of it was not given."""

    world_size: int
    nodes: int
    gpu: str | None
    mfu: float | None
    assumed: str

    @property
    def here(self) -> bool:
        """Whether the run is meant for this machine, which then must serve it."""
        return self.gpu is None


def _asked(arguments: argparse.Namespace, problems: list[str]) -> Asked:
    """Ranks, nodes, GPU and share of its peak from the command line; adds every mistake to the problems."""

    def number(option: str, kind: Callable[[str], T]) -> T | None:
        text = getattr(arguments, option.strip("-").replace("-", "_"))
        try:
            return None if text is None else kind(text)
        except argparse.ArgumentTypeError as error:
            problems.append(f"argument {option}: {error}")
            return None

    ranks, nodes, mfu = (
        number("--world-size", at_least_one),
        number("--nodes", at_least_one),
        number("--mfu", _share),
    )
    if arguments.gpu is not None:
        _collect(problems, lambda: find_gpu(arguments.gpu, "--gpu"))
    said = []
    usual = PER_NODE if arguments.gpu is not None else None
    if ranks is None:
        ranks = (nodes or 1) * (usual or 1)
        said.append("--world-size")
    if nodes is None:
        nodes = 1
        said.append("--nodes")
        if usual is not None and ranks > usual:
            if ranks % usual:
                problems.append(
                    f"--world-size={ranks} does not fill whole nodes of {usual} GPUs; say on how many --nodes"
                )
            else:
                nodes = ranks // usual
    if ranks % nodes:
        problems.append(f"--nodes={nodes} must divide --world-size={ranks}: all nodes have as many ranks")
        nodes = 1
    assumed = f"{' and '.join(said)} not given" if said else ""
    return Asked(ranks, nodes, arguments.gpu, mfu, assumed)


def _files(arguments: argparse.Namespace, problems: list[str]) -> None:
    for option, file, kind in (("--plot", arguments.plot, "PNG"), ("--json", arguments.json, "JSON")):
        if file is None:
            continue
        if file.is_dir():
            problems.append(f"{option} {file} is a directory; name a {kind} file")
        else:
            _collect(problems, lambda file=file: require_writable(file.resolve().parent))  # type: ignore[misc]


def _place(run: RunConfig, ds_json: dict[str, Any], asked: Asked, problems: list[str]) -> None:
    """Whether ranks, nodes and, where the run is for this machine, its devices serve the run and its DeepSpeed JSON."""
    per_node, shared = asked.world_size // asked.nodes, run.train.sequence_parallel
    if 0 < shared <= asked.world_size and asked.world_size % shared == 0 and per_node % shared:
        problems.append(
            f"train.sequence_parallel={shared} must divide the {per_node} ranks of a node: ranks that share a sequence "
            "send one another much; use fewer --nodes or a smaller train.sequence_parallel"
        )
    if not asked.here:  # folders of another machine are not to be seen from here
        ds_json = {**ds_json, "zero_optimization": _without_folders(ds_json.get("zero_optimization", {}))}
    if run.optim.name in OPTIMIZERS:
        _collect(problems, lambda: check_optimizer(ds_json, run))
    _collect(problems, lambda: check_place(ds_json, asked.world_size, per_node))
    # Only with torch can devices be asked, which other mistakes wait for only where the run asks for special ones.
    if asked.here and (not problems or _asks_for_devices(run, ds_json)):
        from bd3_ds.train.hardware import check_hardware

        _collect(problems, lambda: check_hardware(run, ds_json))


def _asks_for_devices(run: RunConfig, ds_json: dict[str, Any]) -> bool:
    zero = ds_json.get("zero_optimization", {})
    special = zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients") or "aio" in ds_json
    asked = run.model.attention
    special = special or (asked in ATTENTION and ATTENTION[asked].trains_on != DEVICES)
    return bool(special) or _without_folders(zero) != zero


def _without_folders(zero: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in zero.items() if not isinstance(value, dict) or value.get("device") != "nvme"}


def _collect(problems: list[str], do: Callable[[], T]) -> T | None:
    """What `do` returns; where it raises UserError, None, and its sentences are added to the problems."""
    try:
        return do()
    except UserError as error:
        problems += error.messages
        return None


def _show(found: Findings, ds_json: dict[str, Any], asked: Asked, arguments: argparse.Namespace) -> None:
    """Print the plan, write what was asked for, take the dry step."""
    from bd3_ds.planning.facts import masking, run_rows, warnings
    from bd3_ds.planning.table import plan_rows, verdict

    made, run = _plan(found, ds_json, asked)
    schedule, doubts = masking(run)
    said = [*warnings(found, made, run, asked.here), *doubts, *unreached(run)]
    for line in wrapped(verdict(made), further="  "):
        print(line)
    print(f"\n{labelled([*run_rows(run, made, found, asked.assumed), *plan_rows(made), *schedule])}")
    for line in (line for text in said for line in wrapped(f"warning: {text}", further="  ")):
        print(line)
    if arguments.resolved:
        print(f"\n{to_yaml(run)}", end="")
    if arguments.json is not None:
        content = {"recipe": arguments.recipe, "verdict": verdict(made), **made, "warnings": said}
        write_text(arguments.json, json.dumps(content, indent=2) + "\n")
        print(f"wrote {arguments.json}")
    if arguments.plot is not None:
        from bd3_ds.planning.schedule_plot import plot_schedule

        plot_schedule(run, arguments.plot)
        print(f"wrote {arguments.plot}")
    if arguments.dry_step is None and asked.here and found.vocabulary is not None:
        print("no dry step without data; --dry-step takes one on random tokens of that vocabulary")
    elif arguments.dry_step or (arguments.dry_step is None and asked.here):
        from bd3_ds.planning.dry_step import try_dry_step

        try_dry_step(run, even_if_long=bool(arguments.dry_step))


def _plan(found: Findings, ds_json: dict[str, Any], asked: Asked) -> tuple[dict[str, Any], RunConfig]:
    """The plan, and the run as it was planned: with a micro-batch that divides the batch."""
    from bd3_ds.model.build import dit_config
    from bd3_ds.planning.disk import free_at
    from bd3_ds.planning.micro_batch import largest_micro_batch, set_micro_batch
    from bd3_ds.planning.plan import MFU, machine_of, make_plan

    run = found.run
    if not asked.here:  # whatever the machine's devices are good at
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention="auto"))
    machine = machine_of(asked.gpu, run.train.precision, asked.world_size // asked.nodes)
    network = dit_config(run.model, run.objective.name)
    largest = largest_micro_batch(run, network, ds_json, asked.world_size, machine.memory, machine.cuda)
    if found.asked_micro_batch is not None:
        run = set_micro_batch(run, largest or 1)
    mfu = MFU if asked.mfu is None else asked.mfu
    made = make_plan(run, network, ds_json, asked.world_size, asked.nodes, machine, mfu)
    made["largest_micro_batch"] = largest
    made["disk"]["free"] = free_at(run.run_dir) if asked.here else None
    return made, run


def _share(text: str) -> float:
    """argparse type: a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' must lie in (0, 1]")
    return value
