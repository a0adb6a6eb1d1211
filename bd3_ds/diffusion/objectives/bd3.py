"""BD3-LM (Arriola et al. 2025): masked diffusion in blocks, each given the clean blocks before it."""

from __future__ import annotations

from bd3_ds.config.registries import CONFIGURED, OBJECTIVES, Objective
from bd3_ds.diffusion.objectives.mdlm import loss

# The loss is MDLM's; the attention mask lets a block attend to the clean ones before it.
OBJECTIVES.register("bd3", Objective("a block-diffusion language model (BD3-LM)", loss, blocks=CONFIGURED))
