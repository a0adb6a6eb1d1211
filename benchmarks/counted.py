"""A few training steps in fresh rank processes, and what they did: bytes that torch allocated, that autograd kept, and
that collectives moved.

The steps are those of a run (Stepper, DeepSpeed engine, average of weights) on random tokens; `measure_ranks` starts
the processes and returns what rank 0 found. Memory is counted as CUDA's allocator would count it, by torch's profiler:
every allocation of the process since before the engine was built, touched or not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_ds.config.schema import RunConfig
from bd3_ds.data.micro_batch import MicroBatch
from bd3_ds.model.build import dit_config, initialise
from bd3_ds.model.dit import DiT
from bd3_ds.parallel.apply import prepare_layers
from bd3_ds.runtime.world import join_world
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper
from benchmarks.measure import ROOT, peak_rss_gb
from benchmarks.ours import Configuration, make_run

SEED = 0


@dataclass(frozen=True)
class Case:
    """A configuration on a number of ranks; `words` go over its recipe, `zero` is the JSON's zero_optimization."""

    configuration: Configuration
    objective: str
    precision: str
    ranks: int
    zero: dict[str, Any]
    words: tuple[str, ...] = ()
    accumulation: int = 1
    steps: int = 2

    @property
    def run(self) -> RunConfig:
        """The recipe; `configuration.batch` is a rank's micro-batch."""
        batch = f"train.global_batch={self.configuration.batch * self.ranks * self.accumulation}"
        return make_run(self.configuration, self.objective, self.precision, batch, *self.words)


def measure_ranks(case: Case, timeout: float = 900.0) -> dict[str, Any]:
    """What rank 0 of the case's fresh processes found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tools = Path(sys.executable).parent
    with TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        processes = []
        for rank in range(case.ranks):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            env |= {"LOCAL_WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"LOCAL_SIZE": str(case.ranks), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"  # DeepSpeed looks for ninja
            command = [sys.executable, "-m", "benchmarks.counted", json.dumps(asdict(case)), str(result)]
            log = (Path(scratch) / f"{rank}.log").open("w")
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            said = "\n".join((Path(scratch) / f"{rank}.log").read_text()[-2000:] for rank in range(case.ranks))
            raise RuntimeError(f"ranks ended with {codes}:\n{said}")
        return dict(json.loads(result.read_text()))


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Exit codes once all have ended or one has failed: its peers would wait for it for ever."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(codes):
            return codes
        time.sleep(0.1)
    raise TimeoutError(f"ranks did not end within {timeout} s")


class Collectives(TorchDispatchMode):
    """Bytes handed to torch's collectives, whoever calls them: of the whole tensor, input or output, the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            sizes = [_bytes_of(argument) for argument in args]
            self.bytes[name] += max(sizes, default=0)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_bytes_of(item) for item in value)
    return 0


class Kept:
    """Bytes of the distinct storages that autograd saved for backward, weights left out."""

    def __init__(self, weights: set[int]):
        self._weights = weights
        self._kept: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """A saved-tensor hook; holding the tensor keeps its address from being given again."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._weights:
            self._kept.setdefault(address, tensor)
        return tensor

    def total(self) -> int:
        """So far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def forget(self) -> None:
        """Before the backward pass, which frees them."""
        self._kept.clear()


def run_case(case: Case) -> dict[str, Any]:
    """In a rank's process: build, take the steps, say what was seen."""
    world = join_world()
    torch.set_num_threads(1)
    run = case.run
    torch.zeros(1)
    rss_before = peak_rss_gb()
    collectives = Collectives()
    kept_bytes = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model = DiT(dit_config(run.model, run.objective.name))
        initialise(model, run.seed)
        prepare_layers(model, run.train)
        engine = Engine(model, run, {"zero_optimization": case.zero, "steps_per_print": 10**9}, world)
        ema = Ema(engine, run.optim.ema_decay)
        assert run.model.mask_id is not None
        stepper = Stepper(run, world, engine, ema, run.model.mask_id, None)
        shape = (run.train.micro_batch, run.data.length)
        tokens = torch.randint(0, run.model.mask_id, shape, generator=torch.Generator().manual_seed(SEED))

        def batches() -> Iterator[MicroBatch]:
            while True:
                yield MicroBatch(tokens, np.arange(len(tokens)), 0.0)

        stream, state = batches(), TrainState(step=1)
        _mark_moments(engine)
        for number in range(case.steps):
            with record_function("moment:forward"):
                pass
            if number == case.steps - 1:
                with collectives:
                    stepper.step(stream, state, False)
            else:
                stepper.step(stream, state, False)
        with record_function("moment:end"):
            pass
    kinds = _kinds(engine, ema)
    rss = peak_rss_gb()
    if case.ranks == 1:  # a hook keeps tensors, so this step is not among those whose memory was counted
        kept_bytes = _kept(stepper, engine, stream, state)
    return {
        "moments": _moments(profiler),
        "kinds": kinds,
        "activations": kept_bytes,
        "collectives": {name: {"bytes": collectives.bytes[name], "calls": n} for name, n in collectives.calls.items()},
        "rss_gib": rss - rss_before,
        "parameters": sum(shape.numel() for shape in engine.shapes.values()),
    }


def _mark_moments(engine: Engine) -> None:
    """Marks in the profiler's record where a backward pass begins and where it ends."""
    backward = engine.backward

    def marked(loss: torch.Tensor) -> None:
        with record_function("moment:backward"):
            pass
        backward(loss)
        with record_function("moment:update"):
            pass

    engine.backward = marked  # type: ignore[method-assign]


def _moments(profiler: profile) -> dict[str, int]:
    """The most bytes allocated in each part of the last step; `peak` is the largest of them."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    most: dict[str, int] = {}
    now, moment = 0, "build"
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
        elif event.name().startswith("moment:"):
            moment = event.name().removeprefix("moment:")
            if moment == "forward":
                most = {}
        else:
            continue
        most[moment] = max(most.get(moment, 0), now)
    most.pop("end", None)
    return {**most, "peak": max(most.values())}


def _kinds(engine: Engine, ema: Ema) -> dict[str, int]:
    """Bytes between steps of weights (stage 3: this rank's part), of what the optimizer holds, and of the average."""
    parameters = list(engine.module.parameters())
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    optimizer = engine._optimizer.optimizer if engine.stage else engine._optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    if engine.stage in (1, 2):
        states += engine._optimizer.single_partition_of_fp32_groups
    elif engine.stage == 3:
        states += engine._optimizer.fp32_partitioned_groups_flat
    averages = [average for _, _, average in ema._parts]
    return {"weights": _storage(held), "optimizer": _storage(states), "ema": _storage(averages)}


def _storage(tensors: list[torch.Tensor]) -> int:
    """Bytes of their distinct storages."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def _kept(stepper: Stepper, engine: Engine, stream: Iterator[MicroBatch], state: TrainState) -> int:
    """What autograd keeps at the end of a micro-batch's forward pass."""
    kept = Kept({p.untyped_storage().data_ptr() for p in engine.module.parameters()})
    backward, found = engine.backward, [0]

    def looked_at(loss: torch.Tensor) -> None:
        found[0] = kept.total()
        kept.forget()
        backward(loss)

    engine.backward = looked_at  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        stepper.step(stream, state, False)
    return found[0]


def main(argv: list[str]) -> int:
    fields = json.loads(argv[0])
    fields["configuration"] = Configuration(**fields["configuration"])
    fields["words"] = tuple(fields["words"])
    found = run_case(Case(**fields))
    if os.environ["RANK"] == "0":
        Path(argv[1]).write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
