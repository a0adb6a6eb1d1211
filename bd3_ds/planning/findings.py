"""What `run.py check` finds out about a run before it plans: every problem at once, and what is not there yet.

Training refuses a run without its data, or whose run_dir holds another run (`preflight`). A plan needs neither: what is
missing is named, what training would refuse is said, and the rest is planned.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from bd3_ds.config.check import check_run, ranks_at_work
from bd3_ds.config.check_data import is_remote, packs
from bd3_ds.config.schema import AUTO, RunConfig
from bd3_ds.data.data_facts import DataFacts, PackFacts, key_of, read_pack_facts
from bd3_ds.data.manifest import MANIFEST, Manifest, read_manifest
from bd3_ds.planning.micro_batch import micro_batches, set_micro_batch
from bd3_ds.planning.vocabulary import assumed_vocabulary
from bd3_ds.runtime.errors import UserError
from bd3_ds.train import preflight


@dataclass
class Findings:
    """About one run. `run` has a vocabulary, and a micro-batch that divides the batch.

    problems: what makes a plan impossible or wrong; missing: packs that are not there yet; vocabulary: where it was
    taken from without data; refused: what training would refuse for now; chunks: sequences of data.train.
    asked_micro_batch: the recipe's, where it is AUTO or does not divide the batch; the largest that fits is taken.
    """

    run: RunConfig
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    vocabulary: str | None = None
    refused: list[str] = field(default_factory=list)
    chunks: int | None = None
    asked_micro_batch: int | None = None

    def collect(self, error: UserError) -> None:
        """Add its sentences to the problems."""
        self.problems += error.messages


def find(run: RunConfig, world_size: int, here: bool) -> Findings:
    """All of it for `run` on `world_size` ranks; `here`: it is to be trained on this machine."""
    found = Findings(run)
    _batch(found, world_size)
    try:
        check_run(found.run, world_size)
    except UserError:
        try:
            check_run(run, world_size)  # with what it says of the batch
        except UserError as error:
            found.collect(error)
    sound = not found.problems
    facts = _packs(found, sound)
    _vocabulary(found, facts)
    _sets(found, facts, sound)
    _run_dir(found, here)
    if sound:
        _together(found, facts, world_size)
    return found


def _batch(found: Findings, world_size: int) -> None:
    """Where only the micro-batch does not divide the batch, another one is planned with."""
    train = found.run.train
    if min(train.global_batch, train.sequence_parallel) < 1 or (train.micro_batch < 1 and train.micro_batch != AUTO):
        return
    possible = micro_batches(found.run, world_size)
    if not possible or train.micro_batch in possible:
        return
    found.asked_micro_batch = train.micro_batch
    found.run = set_micro_batch(found.run, max(size for size in possible if size == 1 or size <= train.micro_batch))


def micro_batch_sentence(found: Findings, taken: int, world_size: int) -> str:
    """What was planned with instead of a micro-batch that does not divide the batch."""
    asked, batch = found.asked_micro_batch, found.run.train.global_batch
    return (
        f"train.micro_batch={asked} x {ranks_at_work(found.run, world_size)} does not divide "
        f"train.global_batch={batch}; planned with train.micro_batch={taken}, the largest that does and "
        "fits; set it for training"
    )


def _packs(found: Findings, sound: bool) -> dict[str, PackFacts]:
    """Of the packs of data.train and data.mix that are there and whole. Of an unsound run none is fetched."""
    data, facts = found.run.data, {}
    for pack in packs(data):
        key = key_of(pack, data)
        if is_remote(pack):
            if not sound:
                continue
        elif not Path(pack).exists():
            _absent(found, pack, key)
            continue
        try:
            facts[pack] = read_pack_facts(pack, data.cache)
        except UserError as error:
            found.problems += [f"{key}: {message}" for message in error.messages]
    return facts


def _vocabulary(found: Findings, facts: dict[str, PackFacts]) -> None:
    run = found.run
    if run.data.train in facts:
        found.chunks = facts[run.data.train].manifest.chunks
        try:
            found.run = preflight.with_vocabulary(run, facts[run.data.train].manifest)
        except UserError as error:
            found.collect(error)
        return
    others = [*(of.manifest for of in facts.values()), *_manifests_of_sets(run)]
    taken = assumed_vocabulary(run, others[0] if others else None)
    found.vocabulary = taken.origin
    model = dataclasses.replace(run.model, vocab_size=taken.size, mask_id=taken.mask_id)
    found.run = dataclasses.replace(run, model=model)


def _manifests_of_sets(run: RunConfig) -> list[Manifest]:
    found = []
    for pack in run.eval.sets.values():
        if not is_remote(pack) and Path(pack).exists():
            try:
                found.append(read_manifest(pack))
            except UserError:
                continue  # `_sets` tells
    return found


def _sets(found: Findings, facts: dict[str, PackFacts], sound: bool) -> None:
    """Evaluation sets that are there are whole and fit the training data, or the first of them."""
    run = found.run
    there = {name: pack for name, pack in run.eval.sets.items() if is_remote(pack) or Path(pack).exists()}
    for name, pack in run.eval.sets.items():
        if name not in there:
            _absent(found, pack, f"eval.sets.{name}")
    first = next(iter(_manifests_of_sets(run)), None)
    if run.data.train in facts:
        first = facts[run.data.train].manifest
    if first is None:
        return
    length = run.data.length if sound else first.length  # an unsound length would be reported once for each set
    asked = dataclasses.replace(
        run,
        eval=dataclasses.replace(run.eval, sets=there),
        data=dataclasses.replace(run.data, length=length),
    )
    found.problems += preflight._sets(asked, first)


def _run_dir(found: Findings, here: bool) -> None:
    """A directory of another run is for training to refuse; one that cannot be written to is a problem only here."""
    run = found.run
    if not run.run_dir.strip():
        return
    said = preflight._run_dir(run)
    unusable = [message for message in said if message.startswith("run_dir: ")]
    found.problems += unusable if here else []
    if changed := [message for message in said if message not in unusable]:
        more = f"; {len(changed) - 1} more differ" if len(changed) > 1 else ""
        found.refused.append(
            f"{run.run_dir} holds a run with other settings, which train would refuse: {changed[0]}{more}"
        )


def _together(found: Findings, facts: dict[str, PackFacts], world_size: int) -> None:
    """What takes several facts together, as far as they are there."""
    run = found.run
    train = facts.get(run.data.train)
    start = run.train.init_from
    if start is not None and not Path(start).exists():
        found.refused.append(f"train.init_from={start} is not there yet; its weights are unchecked")
    else:
        found.problems += preflight._start(run)
    if train is not None:
        found.problems += preflight._shards(run, train.manifest)
    if len(facts) == len(packs(run.data)):
        of_all = DataFacts.of(run.data, list(facts.values()))
        found.problems += [*preflight._mix(run, of_all), *preflight._cache_limit(run, of_all)]
    if found.problems:
        return
    search = run.objective.clip_search
    if search.method != "grid" or Path(run.eval.sets[search.set]).exists():
        found.problems += preflight._clip_search(run, world_size)
    if train is not None:
        found.problems += preflight._token_counts(run, train)


def _absent(found: Findings, pack: str, key: str) -> None:
    """A pack that is not there is missing; where one beside it has almost its name, it is misspelt."""
    path = Path(pack)
    beside = [other.name for other in path.parent.glob("*") if (other / MANIFEST).is_file()]
    if close := difflib.get_close_matches(path.name, beside, n=1, cutoff=0.75):
        found.problems.append(f"{key}: data pack not found: '{pack}'; did you mean '{path.parent / close[0]}'?")
    else:
        found.missing.append(pack)
