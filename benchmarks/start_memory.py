"""Host memory that starting a model takes beyond the shares that its ranks keep, of this build and of a former one.

    python -m benchmarks.start_memory [--against COMMIT] [--hidden 1280] [--layers 20] [--stage 3] [--json FILE]

Two CPU ranks build engine and moving average in bf16. Twenty times a second the proportional set sizes (PSS: shared
pages once) of both are summed. From the peak go what the same two processes take with a tiny model, and the shares as
the plan counts them: weights, fp32 masters, Adam's moments and the average, and DeepSpeed's buffer of gradients. What
is left is `excess`, in bytes and as a part of one fp32 copy of the model. `excess_with_gradients` counts DeepSpeed's
buffer of gradients, which the plan has too, as excess.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.measure import finish, parser, say

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2

# Runs in either build: `sys.argv` are the folder for a recipe, hidden size, layers, vocabulary and stage.
PROBE = """
import sys
import torch
from bd3_ds.config.load import load_recipe
from bd3_ds.model.build import initialise, dit_config
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.world import join_world
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
try:
    from bd3_ds.model.build import Initializer
except ImportError:
    Initializer = None
recipe, hidden, layers, vocabulary, stage = sys.argv[1], *map(int, sys.argv[2:])
words = [f"model.hidden_size={hidden}", f"model.layers={layers}", f"model.heads={hidden // 64}"]
words += [f"model.vocab_size={vocabulary}", f"model.mask_id={vocabulary - 1}"]
torch.set_num_threads(1)
run = load_recipe(recipe, words)
joined = join_world()
network = dit_config(run.model, run.objective.name)
json = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 5_000_000}, "steps_per_print": 10**9}
if Initializer is None:
    model = DiT(network)
    initialise(model, run.seed)
    engine = Engine(model, run, json, joined)
else:
    with torch.device("meta"):
        model = DiT(network)
    engine = Engine(model, run, json, joined, Initializer(model, run.seed))
ema = Ema(engine, run.optim.ema_decay)
joined.barrier()
print("parameters", sum(shape.numel() for shape in engine.shapes.values()), flush=True)
sys.stdin.read()
"""
RECIPE = """include: [model/tiny]
run_dir: unused
data: {train: unused, length: 64}
objective: {name: bd3, block_size: 4}
train: {global_batch: 2, micro_batch: 1, precision: bf16}
"""


def pss(pids: list[int]) -> int:
    """Bytes of memory of the processes, shared pages once."""
    total = 0
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended, which is seen in the next round
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total


def start(tree: Path, sizes: tuple[int, ...], stage: int) -> dict[str, int]:
    """Peak and final PSS of two ranks that run the probe in the build at `tree`, and the model's parameters."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(RECIPE)
        ranks = []
        for rank in range(RANKS):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": tree, "OMP_NUM_THREADS": 1}
            command = [sys.executable, "-c", PROBE, str(recipe), *map(str, sizes), str(stage)]
            env = os.environ | {key: str(value) for key, value in place.items()}
            with (Path(scratch) / f"{rank}.log").open("wb") as log:
                ranks.append(
                    subprocess.Popen(command, env=env, cwd=tree, stdin=subprocess.PIPE, stdout=log, stderr=log)
                )
        try:
            return _watch(ranks, [Path(scratch) / f"{rank}.log" for rank in range(RANKS)])
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _watch(ranks: list[subprocess.Popen[bytes]], logs: list[Path]) -> dict[str, int]:
    peak = 0
    while True:
        told = [log.read_text(errors="replace") for log in logs]
        if any(process.poll() is not None for process in ranks):
            raise RuntimeError("a rank ended early:\n" + "\n".join(told)[-3000:])
        final = pss([process.pid for process in ranks])
        peak = max(peak, final)
        lines = [[line for line in text.splitlines() if line.startswith("parameters ")] for text in told]
        if all(lines):
            return {"peak": peak, "final": final, "parameters": int(lines[0][0].split()[1])}
        time.sleep(0.05)


def compare(tree: Path, sizes: tuple[int, ...], stage: int, base: int) -> dict[str, Any]:
    """The excess of the build at `tree`; `base` bytes are the processes' own."""
    found = start(tree, sizes, stage)
    count = found["parameters"]
    whole = 1 if stage < 3 else RANKS  # a share of the weights
    gradients = 2 * count if stage == 3 else 0
    shares = (2 * count * RANKS // whole + 16 * count) if stage else 16 * count * RANKS
    excess = found["peak"] - base - shares
    return {
        **found,
        "baseline": base,
        "shares": shares,
        "gradients": gradients,
        "excess": excess - gradients,
        "excess_of_fp32_copy": round((excess - gradients) / (4 * count), 3),
        "excess_with_gradients_of_fp32_copy": round(excess / (4 * count), 3),
    }


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--against", help="commit of a former build")
    options.add_argument("--hidden", type=int, default=1280)
    options.add_argument("--layers", type=int, default=20)
    options.add_argument("--vocabulary", type=int, default=50258)
    options.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3))
    asked = options.parse_args(argv)
    sizes = (asked.hidden, asked.layers, asked.vocabulary)
    results = []
    with tempfile.TemporaryDirectory() as former:
        builds = {"this": ROOT}
        if asked.against is not None:
            archive = subprocess.run(["git", "archive", asked.against], cwd=ROOT, stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "-x", "-C", former], input=archive.stdout, check=True)
            builds = {asked.against: Path(former), "this": ROOT}
        base = start(ROOT, (64, 1, 512), asked.stage)["final"]
        say(f"two ranks with a tiny model: {base / 2**20:.0f} MiB")
        for name, tree in builds.items():
            results.append({"build": name, **compare(tree, sizes, asked.stage, base)})
            say(f"{name}: {results[-1]['excess_of_fp32_copy']} of an fp32 copy beyond the shares")
    settings = {key: value for key, value in vars(asked).items() if key not in ("threads", "repeats", "json")}
    finish("start_memory", settings, results, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
