"""The plan of `run.py check` in text: a verdict in one line, then a table of labelled rows, 100 columns wide."""

from __future__ import annotations

from typing import Any

from bd3_ds.planning import communication
from bd3_ds.planning.activations import RECOMPUTE
from bd3_ds.runtime.gpus import GIB
from bd3_ds.runtime.tables import console_table

MIB = 2**20
Rows = list[tuple[str, str]]

# What the kinds of `Memory` are called in the table.
KINDS = {
    "weights": "weights",
    "gathered": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "EMA",
    "activations": "activations",
    "head": "head",
    "logits": "logits",
    "working": "working",
    "buckets": "buckets",
    "update": "update",
}


PARTS = {"forward": "forward pass", "backward": "backward pass", "update": "optimizer update"}


def verdict(plan: dict[str, Any]) -> str:
    """Whether the run fits, what bounds it, how long it takes and how fast it is, in one line."""
    memory, machine, bound, speed = plan["memory"], plan["machine"], plan["bound"], plan["speed"]
    room = f"{number(memory['peak'] / GIB)} of {number(machine['memory'] / GIB)} GiB"
    room += "" if machine["cuda"] else " of host memory"
    fits = f"fits: {room}" if memory["fits"] else f"does not fit: needs {room}"
    time = f"{duration(bound['days'])} at {speed['mfu']:.0%} MFU"
    if bound["name"] != "compute":
        time = f"{duration(bound['days'])} (compute {duration(speed['days'])} at {speed['mfu']:.0%} MFU)"
    return f"{fits} at ZeRO stage {plan['zero']['stage']}; {bound['name']}-bound; {time}; {rate(bound['tokens_per_s'])}"


def plan_rows(plan: dict[str, Any]) -> Rows:
    """What the verdict rests on: computing, memory by kind and by stage, bytes between ranks, disk."""
    return [
        ("computing", _computing(plan)),
        *_memory(plan),
        *_stages(plan),
        ("between ranks", _communication(plan)),
        ("data", _data(plan)),
        *_disk(plan["disk"]),
    ]


def number(value: float) -> str:
    """Three digits or so; none of what is nothing beside the rest."""
    if value < 0.005:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, each in (("GiB", GIB), ("MiB", MIB)):
        if count >= 0.1 * each:
            return f"{number(count / each)} {unit}"
    return f"{count / 1024:.0f} KiB"


def unit_of(memory: dict[str, Any]) -> tuple[str, int]:
    """The unit in which the table gives a rank's memory."""
    return ("GiB", GIB) if memory["peak"] >= GIB else ("MiB", MIB)


def rate(tokens_per_s: float) -> str:
    """In millions of tokens a second where there are some."""
    if tokens_per_s >= 1e6:
        return f"{tokens_per_s / 1e6:,.3g} M tokens/s"
    return f"{tokens_per_s:,.0f} tokens/s"


def duration(days: float) -> str:
    """In the unit that suits it."""
    minutes = days * 24 * 60
    if minutes < 1 / 60:
        return "under a second"
    for limit, each, unit in ((2, 1 / 60, "seconds"), (120, 1, "minutes"), (1440, 60, "hours")):
        if minutes < limit:
            value = minutes / each
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{days:,.1f} days" if days < 1000 else f"{days:,.0f} days"


def _computing(plan: dict[str, Any]) -> str:
    flops, speed, machine = plan["flops"], plan["speed"], plan["machine"]
    extra = flops["recomputed_per_token"]
    again = f" and {extra / 1e6:,.1f} computed again" if extra else ""
    return (
        f"{flops['per_token'] / 1e6:,.1f} MFLOP a token{again}, {flops['total']:.3g} FLOP in all; "
        f"{speed['step_seconds']:.3g} s a step at {speed['mfu']:.0%} of {machine['peak'] / 1e12:,.3g} TFLOP/s a rank "
        "(--mfu says what your runs reach)"
    )


def _memory(plan: dict[str, Any]) -> Rows:
    memory, machine = plan["memory"], plan["machine"]
    moment = max(memory["moments"], key=memory["moments"].get)
    unit, each = unit_of(memory)
    kinds = ", ".join(f"{name} {number(memory[kind] / each)}" for kind, name in KINDS.items() if memory[kind])
    rows = [
        (f"{unit} of a rank", kinds),
        ("at most", f"{size(memory['peak'])}, in the {PARTS[moment]}; usable {size(machine['memory'])}"),
    ]
    start = memory["starting"]
    on_node = start * plan["ranks"] / plan["nodes"]
    rows.append(("at start", f"{size(start)} of host memory a rank, {size(on_node)} a node, beyond what stays"))
    if memory["host"]:
        node = memory["host"] * plan["ranks"] / plan["nodes"]
        rows.append(("offloaded", f"{size(memory['host'])} a rank, {size(node)} a node, to host memory or NVMe"))
    return rows


def _stages(plan: dict[str, Any]) -> Rows:
    """The most at once at each stage and recomputation, as a small table, and what would make the run fit."""
    heads = {"none": "nothing", "selective": "MLPs (selective)", "full": "layers (full)"}
    unit, each = unit_of(plan["memory"])
    rows = []
    for stage in range(4):
        cells = {row["recompute"]: row for row in plan["stages"] if row["stage"] == stage}
        marked = (number(cells[mode]["peak"] / each) + ("" if cells[mode]["fits"] else " !") for mode in RECOMPUTE)
        rows.append([stage, *marked, "<- this run" if stage == plan["zero"]["stage"] else ""])
    text = console_table(["stage", *(heads[mode] for mode in RECOMPUTE), "computed again"], rows, left=(0, 4))
    if any(not row["fits"] for row in plan["stages"]):
        text += "\n! more than a rank has"
    return [(f"{unit} by stage", text), *([] if plan["memory"]["fits"] else [("to fit", _remedies(plan))])]


def _remedies(plan: dict[str, Any]) -> str:
    """What would fit, the least change first."""
    found = []
    if plan.get("largest_micro_batch"):
        found.append(f"train.micro_batch={plan['largest_micro_batch']}")
    own = plan["zero"]["stage"]
    fitting = [(row["stage"], row["recompute"]) for row in plan["stages"] if row["fits"]]
    found += [f"train.activation_checkpointing={mode}" for stage, mode in fitting if stage == own][:1]
    found += [
        f"--deepspeed_config ds_configs/zero{stage}.json"
        + (f" train.activation_checkpointing={mode}" if mode != plan["recompute"] else "")
        for stage, mode in fitting
        if stage > own
    ][:1]
    if found:
        return " | ".join(found)
    return "no micro-batch, recomputation or stage does: take more ranks, a larger device, or offload (ds_configs/)"


def _communication(plan: dict[str, Any]) -> str:
    sent, bound = plan["communication"], plan["bound"]
    if plan["ranks"] == 1:
        return "nothing"
    kinds: dict[str, float] = {}
    for one in sent["collectives"]:
        kinds[one["kind"]] = kinds.get(one["kind"], 0.0) + one["sent"]
    parts = ", ".join(f"{kind.replace('_', '-')} {count / 1e9:.3g}" for kind, count in kinds.items())
    text = f"a rank sends {sent['sent'] / 1e9:.3g} GB a step ({parts})"
    if not plan["machine"]["cuda"]:
        return text
    link, share = plan["machine"]["link"], sent["of_compute"]
    between = f"{min(link, communication.NETWORK) / 1e9:.0f} GB/s between nodes, " if plan["nodes"] > 1 else ""
    text += f"; {sent['seconds']:.3g} s at {between}{link / 1e9:.0f} GB/s inside: "
    text += f"{share:.1%} of the computing" if share < 0.1 else f"{share:.0%} of the computing"
    return text + ("" if bound["name"] == "communication" else ", which can hide it")


def _data(plan: dict[str, Any]) -> str:
    seconds = plan["bound"]["seconds"]
    return f"a rank's loader takes about {seconds['data']:.3g} s a step, beside {seconds['compute']:.3g} s of computing"


def _disk(disk: dict[str, Any]) -> Rows:
    rest = disk["records"] + disk["tensorboard"]
    text = (
        f"{size(disk['run_dir'])} in run_dir: {disk['checkpoints']} x {size(disk['checkpoint'])} checkpoints (one "
        f"being written), {disk['exports']:,} x {size(disk['export'])} exports, {size(rest)} records and TensorBoard"
    )
    if disk.get("free") is not None:
        text += f"; {size(disk['free'])} free there"
    if disk["cache"] is None:
        text += "; data.cache holds all shards of the remote packs, whose size is not known yet"
    elif disk["cache"]:
        text += f"; {size(disk['cache'])} in data.cache on each node"
    return [("disk", text)]
