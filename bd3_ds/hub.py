"""To and from Hugging Face. Importing this registers the classes, so that a folder of ours needs no remote code:

import bd3_ds.hub
model = transformers.AutoModel.from_pretrained(FOLDER)
"""

from __future__ import annotations

from bd3_ds.data.streaming_import import stub_torchvision

stub_torchvision()  # before transformers imports it

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM  # noqa: E402

from bd3_ds.interop.modeling_bd3_ds import BD3Config, BD3ForCausalLM, BD3ForMaskedLM, BD3Model  # noqa: E402

__all__ = ["BD3Config", "BD3ForCausalLM", "BD3ForMaskedLM", "BD3Model"]

AutoConfig.register(BD3Config.model_type, BD3Config, exist_ok=True)
AutoModel.register(BD3Config, BD3Model, exist_ok=True)
AutoModelForMaskedLM.register(BD3Config, BD3ForMaskedLM, exist_ok=True)
AutoModelForCausalLM.register(BD3Config, BD3ForCausalLM, exist_ok=True)
