"""Block-diffusion language models, trained at scale on DeepSpeed.

model = bd3_ds.load("runs/docs/finetune")       # newest export of a run, or one export directory
model.score(tokens), model.generate(num=4), model.logits(x_t, x0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bd3_ds.evaluation.api import LanguageModel

__version__ = "0.1.0"


def load(export: str, device: str = "cpu") -> LanguageModel:
    """Open an export (or a run's newest export) for scoring and sampling; see `LanguageModel`."""
    from bd3_ds.evaluation.api import load as load_export

    return load_export(export, device)


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":
        from bd3_ds.evaluation.api import LanguageModel

        return LanguageModel
    raise AttributeError(name)
