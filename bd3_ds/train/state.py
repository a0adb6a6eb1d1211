"""TrainState: what a resumed run needs beyond the engine's tensors, counted in samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bd3_ds.diffusion.clip_search import Moments
from bd3_ds.diffusion.proposal import Interval

RECENT = 256  # losses that a spike is compared with
SKIPPED_OF = 1000  # steps


@dataclass(frozen=True)
class Clip:
    """The clip search's state for one block size: the interval last chosen, and the moments seen in training."""

    interval: Interval | None = None
    moments: Moments = field(default_factory=Moments)


@dataclass(frozen=True)
class TrainState:
    """`step` optimizer steps are done; `samples` sequences and `tokens` clean tokens went into them.

    `clips` holds the clip search's state of each block size that was trained; `recent` the estimates of the
    bound of the last steps with an update, `skipped` those of the last SKIPPED_OF steps that had none.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    clips: dict[int, Clip] = field(default_factory=dict)
    recent: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()

    def clip(self, block_size: int) -> Clip:
        """The clip search's state of a block size; empty at first."""
        return self.clips.get(block_size, Clip())

    def advance(self, sequences: int, length: int) -> TrainState:
        """The state after one more step on `sequences` sequences of `length` tokens."""
        return replace(
            self, step=self.step + 1, samples=self.samples + sequences, tokens=self.tokens + sequences * length
        )

    def with_clip(self, block_size: int, clip: Clip) -> TrainState:
        """The state with a new clip state of a block size."""
        return replace(self, clips={**self.clips, block_size: clip})

    def with_loss(self, nelbo: float | None) -> TrainState:
        """The state with the loss of the step just done; None where it was skipped."""
        skipped = tuple(step for step in self.skipped if step > self.step - SKIPPED_OF)
        if nelbo is None:
            return replace(self, skipped=(*skipped, self.step))
        return replace(self, recent=(*self.recent, nelbo)[-RECENT:], skipped=skipped)

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        clips = {
            str(size): {"interval": clip.interval, "moments": clip.moments.to_json()}
            for size, clip in self.clips.items()
        }
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "clips": clips,
            "recent": self.recent,
            "skipped": self.skipped,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`."""
        clips = {
            int(size): Clip(
                tuple(clip["interval"]) if clip["interval"] is not None else None, Moments.from_json(clip["moments"])
            )
            for size, clip in saved["clips"].items()
        }
        recent, skipped = tuple(saved["recent"]), tuple(saved["skipped"])
        return cls(saved["step"], saved["samples"], saved["tokens"], clips, recent, skipped)
