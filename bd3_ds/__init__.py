"""Block-diffusion language models, trained at scale on DeepSpeed.

model = bd3_ds.load("runs/docs/finetune")       # newest export of a run, one export, or a folder of `convert --to hf`
model.score(["a text", "another"]).ppl, model.generate("The function", num=2), model.logits(x_t, x0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bd3_ds.evaluation.api import LanguageModel

__version__ = "0.1.0"


def load(export: str, device: str = "cpu", precision: str = "fp32") -> LanguageModel:
    """Open an export, a run's newest export or a folder of `convert --to hf`; see `LanguageModel`.

    precision: fp32, or bf16 to draw texts faster; scores want fp32.
    """
    from bd3_ds.evaluation.api import load as load_export

    return load_export(export, device, precision)


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":
        from bd3_ds.evaluation.api import LanguageModel

        return LanguageModel
    raise AttributeError(name)
