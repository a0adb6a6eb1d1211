"""How a pass is cut into the parts of ranks that share its sequences, and put together again."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_ds.config.check import accumulation_steps, check_run
from bd3_ds.config.ds_json import complete_ds_json
from bd3_ds.config.load import load_defaults
from bd3_ds.config.schema import RunConfig
from bd3_ds.diffusion.score_entropy import ScoreNats
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.model.attention.masks import pass_mask
from bd3_ds.parallel.sequence import Slice, SlicedMask, by_rank, by_stream
from bd3_ds.runtime.errors import UserError

CPU = torch.device("cpu")
counts, parts, streams, rows = st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)


@given(counts, parts, streams, rows)
def test_the_parts_of_all_ranks_are_the_pass(count: int, part: int, streams: int, rows: int) -> None:
    length = count * part
    packed = torch.arange(rows * streams * length).view(rows, -1)
    gathered = torch.cat([Slice(rank, count).of(packed, length) for rank in range(count)], dim=1)
    assert torch.equal(by_stream(gathered, count, part), packed)
    assert torch.equal(by_rank(packed, count, part), gathered)
    wide = packed[..., None, None] + torch.arange(6).view(2, 3)  # [B, T, H, d]
    assert torch.equal(by_rank(by_stream(wide, count, part), count, part), wide)


@given(counts, parts, rows, st.data())
def test_each_place_is_one_rank_s(count: int, part: int, rows: int, data: st.DataObject) -> None:
    length = count * part
    at = torch.tensor(data.draw(st.lists(st.integers(0, rows * length - 1), unique=True)), dtype=torch.long)
    text = torch.arange(rows * length).view(rows, length)
    seen = []
    for rank in range(count):
        mine, local = Slice(rank, count).local_positions(at, length)
        assert torch.equal(Slice(rank, count).of(text, length).flatten()[local], at[mine])
        seen += mine.tolist()
    assert sorted(seen) == list(range(len(at)))


def test_each_rank_has_the_same_part_of_both_halves() -> None:
    for noisy_only in (False, True):
        whole = pass_mask(8, 8, 0, 0, 4, noisy_only, CPU, 2)
        mask = SlicedMask(whole, Slice(1, 2), 8)
        assert mask.whole is whole and mask.part == 4
        assert mask.queries.position.tolist() == [4, 5, 6, 7] * (2 if noisy_only else 3)
        assert mask.keys.view.tolist() == [0] * 4 + [1] * 4 + [-1] * 4


def test_part_of_a_head_loss() -> None:
    targets, weight, mine = torch.tensor([3, 1, 2]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2, 0])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    score = ScoreNats(targets=targets, sigma=torch.tensor([0.5, 1.0, 2.0]), mask_id=4, weight=weight)
    for whole in (SubsNats(targets, 4, weight), score):
        assert torch.equal(whole.part(mine).nats(logits[mine]), whole.nats(logits)[mine])
        assert whole.part(mine).reduce(torch.ones(2)) == pytest.approx(0.4)
    assert SubsNats(targets, 4).part(mine).weight is None


def shared(count: int, **values: Any) -> RunConfig:
    """Two heads, 16 tokens, a global batch of 4 in micro-batches of 2."""
    small = {"model.heads": 2, "model.hidden_size": 48, "data.length": 16, "objective.block_size": 4}
    batch = {"train.global_batch": 4, "train.micro_batch": 2, "train.sequence_parallel": count}
    given = {key.replace("__", "."): value for key, value in values.items()}
    return load_defaults({"run_dir": "x", "data.train": "x", **small, **batch, **given}, "a test")


def test_batch_arithmetic() -> None:
    run = shared(2)
    check_run(run, 4)
    assert [accumulation_steps(run, ranks) for ranks in (2, 4)] == [2, 1]
    for ranks in (2, 4):  # as DeepSpeed checks it
        filled = complete_ds_json({}, run, ranks)
        micro, steps = filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]
        assert filled["train_batch_size"] == micro * steps * ranks


@pytest.mark.parametrize(
    ("run", "ranks", "said"),
    [
        (shared(0), 1, "train.sequence_parallel=0 must be finite and above 0"),
        (shared(2), 3, "train.sequence_parallel=2 does not divide the number of ranks, 3; start the run on a multiple"),
        (shared(4), 4, "train.sequence_parallel=4 must divide model.heads=2; the largest below it that does is 2"),
        (shared(3, model__heads=3), 3, "train.sequence_parallel=3 must divide data.length=16; the largest below it"),
        (
            shared(2),
            8,
            "train.micro_batch=2 x 8 ranks / train.sequence_parallel=2 = 8; set train.micro_batch=1, or auto",
        ),
    ],
)
def test_what_cannot_be_shared_is_said(run: RunConfig, ranks: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_run(run, ranks)
    assert any(said in message for message in error.value.messages), error.value.messages
