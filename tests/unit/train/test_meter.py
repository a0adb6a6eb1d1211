"""What a run says of its own speed: two clocks, matrix rates that small products do not hide, padding left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.schema import AR, BD3
from bd3_ds.data.micro_batch import MicroBatch
from bd3_ds.evaluation.network import load_model
from bd3_ds.model.build import dit_config
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.runtime.peak_flops import LARGEST, PRODUCTS, measured_rate, peak_flops, quicker_precision
from bd3_ds.runtime.world import World
from bd3_ds.train import meter
from bd3_ds.train.meter import Meter
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper, StepResult
from tests.helpers.engine import OneProcess
from tests.helpers.tiny import LENGTH, tiny_export, tiny_run

CPU = torch.device("cpu")


class Device:
    """Matrix products at so many FLOP/s, each of which takes `start` seconds to start."""

    def __init__(self, rate: float, start: float):
        self.rate, self.start = rate, start
        self.sides: list[int] = []

    def seconds(self, side: int) -> float:
        self.sides.append(side)
        return PRODUCTS * (self.start + 2 * side**3 / self.rate)


@pytest.mark.parametrize("rate", [30e9, 2e12, 60e12, 1e15, 2.5e15])
def test_a_quick_device_is_not_taken_for_a_slow_one(rate: float) -> None:
    """One product of side 1024 on 1 PFLOP/s takes 2 microseconds and 10 to start: a sixth of the rate."""
    device = Device(rate, start=10e-6)
    assert measured_rate(device.seconds, LARGEST["cuda"]) == pytest.approx(rate, rel=0.05)
    assert max(device.sides) <= LARGEST["cuda"]


def test_a_slow_device_is_asked_for_small_products() -> None:
    """So a CPU without units for bf16 (1 GFLOP/s) is measured in a second and not in twenty."""
    device = Device(1e9, start=10e-6)
    assert measured_rate(device.seconds, LARGEST["cpu"]) == pytest.approx(1e9, rel=0.01)
    assert set(device.sides) == {256} and sum(map(device.seconds, list(device.sides))) < 1


@pytest.mark.parametrize(("bf16", "said"), [(1e9, "fp32"), (60e9, "bf16"), (200e9, "bf16")])
def test_a_cpu_without_units_for_bf16_trains_in_fp32(bf16: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"bf16": bf16, "fp32": 80e9}
    monkeypatch.setattr("bd3_ds.runtime.peak_flops.peak_flops", lambda device, precision: rates[precision])
    assert quicker_precision(CPU) == said and quicker_precision(torch.device("cuda")) == "bf16"


def test_this_machine_is_measured() -> None:
    assert peak_flops(CPU, "fp32") > 1e8


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now)


def result(**values: Any) -> StepResult:
    given: dict[str, Any] = {
        "step": 1, "loss": 1.0, "nelbo": 1.0, "nelbo_is_bound": True, "nats_by_rate": [], "masked_share": 0.5,
        "head_tokens": 30, "block_size": 4, "interval": None, "block_variance": None, "moments": None,
        "grad_norm": 1.0, "lr": 1.0, "seconds": 2.0, "waited": 0.5, "skipped": False, "ids": [], "stop_asked": False,
        "still_saving": False,
    }  # fmt: skip
    return StepResult(**(given | values))


def test_two_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 2 s inside 16 s of the wall, the rest of which went to saves; then one of 2 s in 4 s."""
    run = tiny_run(tmp_path)
    clock = Clock(monkeypatch)
    measured = Meter(dit_config(run.model, BD3), run, peak=1e9)
    for _ in range(2):
        measured.add(result())
    clock.now += 16.0
    rates = measured.read()
    tokens = run.train.global_batch * LENGTH
    assert rates["perf/tokens_per_s"] == 2 * tokens / 4 and rates["perf/tokens_per_s_wall"] == 2 * tokens / 16
    assert rates["perf/mfu_wall"] == pytest.approx(rates["perf/mfu"] / 4) and rates["perf/mfu"] > 0
    assert rates["perf/data_wait"] == 0.25
    measured.add(result())
    clock.now += 4.0
    assert measured.read()["perf/tokens_per_s_wall"] == tokens / 4


@pytest.mark.parametrize("name", [AR, BD3])
def test_padding_is_no_masked_token_and_no_work_of_the_head(tmp_path: Path, name: str) -> None:
    """Half of each text is padding: the masked share is that of text, the head's work that of its rows."""
    run = tiny_run(tmp_path, objective__name=name, objective__block_size=None if name == AR else 4)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    engine: Any = OneProcess(model)
    assert run.model.mask_id is not None
    stepper = Stepper(run, World(0, 1, 0, 1, CPU), engine, engine, run.model.mask_id, None, 7.0)
    stepper.accumulation = 1
    tokens = torch.randint(0, 20, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros_like(tokens)
    documents[:, LENGTH // 2 :] = -1
    done = stepper.step(iter([MicroBatch(tokens, np.arange(4), 0.0, documents)]), TrainState())
    assert done.masked_share == pytest.approx(done.head_tokens / (4 * (LENGTH // 2 - 1)))
    assert (done.masked_share == 1) == (name == AR) and 0 < done.masked_share <= 1

    measured = Meter(model.network, run, peak=1.0)
    measured.add(done)
    body = training_flops_per_sequence(model.network, name, LENGTH, done.block_size, head_tokens=0)
    head = 3 * 2 * model.network.hidden_size * model.network.vocab_rows * done.head_tokens
    assert measured.read()["perf/mfu"] * done.seconds == pytest.approx(4 * body + head)
