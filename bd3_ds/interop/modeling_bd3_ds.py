"""The network under the interface of transformers: `AutoModel.from_pretrained` makes one of these classes.

A copy of this file, and of those files of the package that it imports, goes into every folder made for Hugging Face
(`own_code`), so that who reads such a folder needs only transformers and torch. It may therefore import, of ours, only
what imports nothing else than torch. Mistakes raise ValueError, as they do in transformers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from bd3_ds.interop.own_code import write_code
from bd3_ds.model.dit import DiT
from bd3_ds.model.dit_config import DiTConfig

AR, SEDD = "ar", "sedd"
FILE = "modeling_bd3_ds"  # this one, as auto_map names it


class BD3Config(PretrainedConfig):
    """All that decides the network (the fields of `DiTConfig`, by their names), and what the model was trained for.

    objective: ar, mdlm, sedd or bd3. block_size: tokens denoised together. length: tokens of a training sequence.
    mask_token_id: [MASK], counted by vocab_size. run: the resolved configuration of the training run, step: the
    optimizer step that the weights are of; both are for the way back.
    """

    model_type = "bd3-ds"
    attribute_map = {  # noqa: RUF012 (transformers declares it so)
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "key_heads",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "length",
    }

    # One parameter for each key, as transformers' configuration classes have it: each is a key of config.json.
    def __init__(
        self,
        objective: str = "mdlm",
        block_size: int = 1024,
        length: int = 1024,
        vocab_size: int = 50258,
        mask_token_id: int | None = 50257,
        hidden_size: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_ratio: int = 4,
        cond_size: int = 128,
        run: dict[str, Any] | None = None,
        step: int = 0,
        **more: Any,
    ):
        self.objective, self.block_size, self.length = objective, block_size, length
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.hidden_size, self.layers, self.heads = hidden_size, layers, heads
        self.mlp_ratio, self.cond_size = mlp_ratio, cond_size
        for field in dataclasses.fields(DiTConfig):
            if field.default is not dataclasses.MISSING:
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                setattr(self, field.name, more.pop(field.name, default))
        self.run, self.step = run, step
        more["tie_word_embeddings"] = self.tie_embeddings
        more["auto_map"] = {"AutoConfig": f"{FILE}.BD3Config", "AutoModel": f"{FILE}.BD3Model"} | (
            {"AutoModelForCausalLM": f"{FILE}.BD3ForCausalLM"}
            if objective == AR
            else {"AutoModelForMaskedLM": f"{FILE}.BD3ForMaskedLM"}
        )
        super().__init__(**more)

    @property
    def network(self) -> DiTConfig:
        """The network's own description."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(DiTConfig)}
        return DiTConfig(**fields | {"biases": tuple(self.biases)})

    @property
    def causal(self) -> bool:
        """Whether tokens see earlier ones only."""
        return self.objective == AR

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.network.key_heads

    @property
    def mlp_width(self) -> int:
        """The width inside the MLP."""
        return self.network.mlp_width

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **more: Any) -> None:
        """Write config.json and, beside it, the code that it names; models save their configuration by this too."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_code(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub, **more)


class BD3Model(PreTrainedModel):
    """The network of any objective; its parameters are those of an export, prefixed with `network.`."""

    config_class = BD3Config
    base_model_prefix = "network"
    _tied_weights_keys = {"network.head.linear.weight": "network.embed.weight"}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, config: BD3Config):
        super().__init__(config)
        self.network = DiT(config.network)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *words: Any, **more: Any) -> Any:
        """As transformers has it; on a CPU, weights in memory of their own, for the logits of an export to the bit."""
        loaded = super().from_pretrained(*words, **more)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            # A mapped file has them at any address, and the order in which kernels add depends on it.
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return loaded

    def forward(
        self,
        input_ids: Tensor,
        clean_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> Any:
        """`.logits` [B, T, V], raw network output, for tokens [B, T]: noisy ones, or for AR clean ones.

        bd3 sees the earlier blocks of `clean_ids` [B, T]; the others do not look at them. only sedd takes the
        noise levels `sigma` [B]. AR's logits at i are for token i + 1. Padding, 0 in `attention_mask` [B, T], is hidden
        from all other tokens; it does not shift their positions. `labels` are refused, and so is all else that would
        change nothing.
        """
        if labels is not None:
            raise ValueError(self._no_loss())
        _refuse(token_type_ids, more)
        output = MaskedLMOutput(logits=self._logits(input_ids, clean_ids, sigma, attention_mask))
        return output.to_tuple() if return_dict is False else output

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *words: Any, **more: Any) -> Any:
        """The embedding as it is: the vocabulary is fixed. Raises ValueError for another size."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}): this model has {self.config.vocab_size} tokens, [MASK] at "
                f"{self.config.mask_token_id}, and cannot be resized; train with a tokenizer that has the tokens"
            )
        return self.network.embed

    def _no_loss(self) -> str:
        if self.config.objective == AR:
            return "labels: AutoModel gives logits only; load this model with AutoModelForCausalLM for a loss"
        return (
            f"labels: no loss is computed here, since that of {self.config.objective} depends on how the noise was "
            "drawn; bd3_ds.load(FOLDER).score(texts) gives the bound of clean texts, `run.py train` trains"
        )

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, whose rows beyond vocab_size are of no token."""
        return self.network.embed

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.network.head.linear

    def _logits(self, tokens: Tensor, clean: Tensor | None, sigma: Tensor | None, attention_mask: Tensor | None) -> Any:
        objective, size = self.config.objective, self.config.block_size
        if objective == "bd3" and size < tokens.shape[1]:
            if clean is None or clean.shape != tokens.shape:
                raise ValueError(
                    f"clean_ids must be the clean text, {list(tokens.shape)}: in blocks of {size}, tokens depend on "
                    "the clean text before"
                )
        else:
            clean = None
        if (objective == SEDD) != (sigma is not None):
            raise ValueError(f"sigma [B] is needed by sedd and taken by no other; this model is {objective}")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}; it must be {list(tokens.shape)}, as input_ids"
            )
        hidden = attention_mask is not None and not bool(attention_mask.bool().all())
        documents = (
            attention_mask.long() - 1 if hidden and attention_mask is not None else None
        )  # padding is document -1
        return self.network(tokens, clean, block_size=size, sigma=sigma, documents=documents)

    def _init_weights(self, module: nn.Module) -> None:
        # The network initialises itself. transformers calls this for modules that it believes were not loaded, among
        # them a tied output matrix.
        return


class BD3ForMaskedLM(BD3Model):
    """mdlm, sedd and bd3. There is no loss here: it depends on how the noise was drawn, which training knows."""

    def __init__(self, config: BD3Config):
        if config.causal:
            raise ValueError("this model is objective=ar; load it with AutoModelForCausalLM")
        super().__init__(config)


class BD3ForCausalLM(BD3Model, GenerationMixin):  # type: ignore[misc]
    """AR: a loss where `labels` are given (those of -100 do not count), and `generate`, which never writes [MASK]."""

    def __init__(self, config: BD3Config):
        if not config.causal:
            raise ValueError(f"this model is objective={config.objective}; load it with AutoModelForMaskedLM")
        super().__init__(config)
        if config.mask_token_id is not None and self.generation_config is not None:
            self.generation_config.suppress_tokens = [config.mask_token_id]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **more: Any,
    ) -> Any:
        """Logits [B, T, V] at i for token i + 1, and with `labels` [B, T] the mean loss in nats a token.

        No text holds [MASK]: the loss gives it no probability, as training does.
        """
        _refuse(token_type_ids, more)
        logits = self._logits(input_ids, None, None, attention_mask)
        loss = None
        if labels is not None:
            count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            masks = torch.arange(logits.shape[-1], device=logits.device) == self.config.mask_token_id
            possible = logits.masked_fill(masks, -torch.inf)
            loss = self.loss_function(logits=possible, labels=labels, vocab_size=self.config.vocab_size, **count)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """The whole text for each new token: what transformers keeps between them is not ours to fill."""
        _refuse(token_type_ids, {})
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _refuse(token_type_ids: Tensor | None, more: dict[str, Any]) -> None:
    """Raise ValueError for what a caller asks for and this network does not have."""
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise ValueError("token_type_ids other than 0: this network knows one kind of text; leave them out")
    wanted = [name for name, value in more.items() if value is not None and value is not False]
    if wanted:
        known = "input_ids, attention_mask, labels (ar), clean_ids (bd3), sigma (sedd)"
        raise ValueError(f"{', '.join(sorted(wanted))}: not taken by this model, which takes {known}; leave it out")
