"""What docs/extending.md has a user add, by the page's own blocks: what it does and what is refused."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import bd3_ds
from bd3_ds.config import plugins
from bd3_ds.config.check import check_run
from bd3_ds.config.registries import OBJECTIVES, OPTIMIZERS, SCHEDULES, WEIGHTS, Objective
from bd3_ds.diffusion.likelihood import Texts, exact
from bd3_ds.diffusion.noise import make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.runtime.errors import UserError
from bd3_ds.train.masters import first_state
from tests.helpers.tiny import tiny_export, tiny_run

ROOT = Path(__file__).resolve().parents[3]
VOCAB, MASK, LENGTH, SIZE = 11, 10, 16, 4
STEEP = ("plugins=[my_schedules]", "objective.schedule.name=steep")


def blocks(language: str) -> list[str]:
    """The code of docs/extending.md in this language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the page's modules; what they register is forgotten afterwards."""
    for name, code in zip(("my_schedules", "my_objective", "my_optimizer"), blocks("python"), strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = {registry: set(registry) for registry in (OBJECTIVES, OPTIMIZERS, SCHEDULES, WEIGHTS)}
    modules = set(sys.modules)
    yield tmp_path
    for registry, names in known.items():
        for name in set(registry) - names:
            registry.remove(name)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def uniform(x_t, x0, *, sigma, at, read):  # type: ignore[no-untyped-def]
    """A denoiser that knows nothing: ln(V - 1) nats a masked token."""
    return read.of_logits(torch.zeros(len(at), VOCAB))


def test_the_page_s_recipe_is_good(place: Path) -> None:
    recipe = tiny_run(place)
    (place / "mine.yaml").write_text((place / "recipe.yaml").read_text().replace("objective:", "unused:", 1))
    run = tiny_run(place, *STEEP, "objective.schedule.parameters={exponent: 2.5}")
    check_run(run, world_size=2)
    assert run.plugins == ["my_schedules"] and run.objective.schedule.parameters == {"exponent": 2.5}
    assert recipe.plugins == []
    [written] = blocks("yaml")
    assert "plugins: [my_schedules]" in written and "parameters: {exponent: 2.5}" in written


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            (*STEEP, "objective.schedule.parameters={exponent: 0}"),
            "objective.schedule.parameters.exponent=0.0 must lie in",
        ),
        ((*STEEP, "objective.schedule.parameters={exponnt: 2}"), "this schedule takes exponent"),
        (("objective.schedule.parameters={exponent: 2}",), "this schedule takes none"),
        ((STEEP[0], "objective.schedule.name=stepp"), "did you mean 'steep'?"),
        (("plugins=[my_schedule]",), "plugins names the module my_schedule, which is not in"),
        (("plugins=[my_schedules, my_broken]",), "cannot be imported: ZeroDivisionError"),
        (("plugins=[my_schedules, my_twin]",), "is registered by my_schedules and again by my_twin"),
        (("plugins=[my_log]",), "is registered by bd3_ds.diffusion.schedules and again by my_log"),
        (("plugins=[my_optimizer]", "optim.name=sgd", "optim.parameters={momentum: 1}"), "must lie in [0, 1)"),
        (("plugins=[my_needy]",), "needs a_library_that_is_not_there; install it"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(place: Path, words: tuple[str, ...], sentence: str) -> None:
    (place / "my_broken.py").write_text("1 / 0\n")
    (place / "my_twin.py").write_text(blocks("python")[0])
    (place / "my_log.py").write_text(blocks("python")[0].replace('"steep"', '"log_linear"'))
    (place / "my_needy.py").write_text("import a_library_that_is_not_there\n")
    with pytest.raises(UserError) as raised:
        check_run(tiny_run(place, *words), world_size=1)
    assert sentence in str(raised.value)


def test_noise_of_the_schedule_is_drawn_by_its_quantiles(place: Path) -> None:
    """p = t^a over the whole batch, and the default where the recipe gives no parameter."""
    for words, exponent in ((("objective.schedule.parameters={exponent: 2.5}",), 2.5), ((), 3.0)):
        run = tiny_run(place, *STEEP, "objective.schedule.t_min=0.0", *words)
        proposal = make_proposal(run.objective.schedule)
        slots = np.arange(64)
        u = stratified_times(0, 0, slots, 64, LENGTH // SIZE)
        noise = make_noise(u, mask_draws(0, 0, slots, LENGTH), proposal, run.objective.weight)
        torch.testing.assert_close(noise.rate, u**exponent, rtol=1e-12, atol=0)
        assert proposal.mean_rate == pytest.approx(1 / (exponent + 1), rel=1e-3)  # the mean of t^a


def test_the_bound_under_the_schedule_is_the_closed_form(place: Path) -> None:
    """A denoiser that knows nothing pays ln(V - 1) a token: exactly, and in training with the schedule on average."""
    run = tiny_run(place, *STEEP, "objective.schedule.t_min=0.0")
    x0 = torch.from_numpy(np.random.default_rng(0).integers(0, MASK, (256, LENGTH)))

    def condition(_):  # type: ignore[no-untyped-def]
        return lambda x_t, at, read: uniform(x_t, None, sigma=None, at=at, read=read)

    known = exact(condition, Texts(x0[:2]), SIZE, MASK)
    assert known.total / known.tokens == pytest.approx(math.log(VOCAB - 1), rel=1e-6)

    slots, estimates = np.arange(256), []
    for step in range(8):
        u = stratified_times(0, step, slots, 256, LENGTH // SIZE)
        draws = mask_draws(0, step, slots, LENGTH)
        noise = make_noise(u, draws, make_proposal(run.objective.schedule), run.objective.weight)
        estimates.append(float(training_loss("bd3", uniform, x0, noise, MASK).nelbo))
    mean, error = np.mean(estimates), np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(mean - math.log(VOCAB - 1)) < 4 * error and error < 0.1


def test_an_objective_of_the_page_is_bd3_under_another_name(place: Path) -> None:
    run = tiny_run(place, "plugins=[my_objective]", "objective.name=mine")
    check_run(run, world_size=1)
    x0 = torch.from_numpy(np.random.default_rng(1).integers(0, MASK, (4, LENGTH)))
    slots = np.arange(4)
    u, draws = stratified_times(0, 0, slots, 4, LENGTH // SIZE), mask_draws(0, 0, slots, LENGTH)
    noise = make_noise(u, draws, make_proposal(run.objective.schedule), run.objective.weight)
    ours, theirs = (training_loss(name, uniform, x0, noise, MASK).loss for name in ("bd3", "mine"))
    assert float(ours) == float(theirs) > 0


def test_an_optimizer_of_the_page_keeps_what_it_says(place: Path) -> None:
    run = tiny_run(place, "plugins=[my_optimizer]", "optim.name=sgd", "optim.parameters={momentum: 0.5}")
    check_run(run, world_size=1)
    state = first_state(
        lambda groups: OPTIMIZERS["sgd"].make(groups, run.optim, momentum=0.5), "sgd", torch.device("cpu")
    )
    assert list(state) == ["momentum_buffer"]


def test_an_export_s_plugins_are_not_imported_for_its_sake(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = tiny_export(tiny_run(place, *STEEP))
    sound = bd3_ds.load(str(export))
    tokens = torch.arange(LENGTH)[None] % 7
    value = float(sound.score(tokens).nats.sum())
    SCHEDULES.remove("steep")
    del sys.modules["my_schedules"]
    with pytest.raises(UserError, match=r"plugins=my_schedules.*set BD3_DS_PLUGINS=my_schedules"):
        bd3_ds.load(str(export))
    assert "my_schedules" not in sys.modules
    monkeypatch.setenv("BD3_DS_PLUGINS", "my_schedules")
    assert float(bd3_ds.load(str(export)).score(tokens).nats.sum()) == value


def test_installed_packages_register_by_entry_points(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, module = "mine", "my_schedules"

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point] if group == "bd3_ds.plugins" else [])
    plugins._load_installed.cache_clear()
    monkeypatch.syspath_prepend(str(place))
    tiny_run(place, "objective.schedule.name=steep")
    assert "steep" in SCHEDULES
    plugins._load_installed.cache_clear()


def test_facts_decide_the_size_of_blocks() -> None:
    sizes = {name: OBJECTIVES[name].block_size(4, 16) for name in ("ar", "mdlm", "sedd", "bd3")}
    assert sizes == {"ar": 1, "mdlm": 16, "sedd": 16, "bd3": 4}
    assert OBJECTIVES["bd3"].block_size(None, 16) == 16
    assert isinstance(OBJECTIVES["sedd"], Objective) and OBJECTIVES["sedd"].sampled_estimator == "mc"
