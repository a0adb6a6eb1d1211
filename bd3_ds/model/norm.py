"""The norms before attention, MLP and head, fused with the conditioning's scale and shift (adaLN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_ds.model.dit_config import DiTConfig


class Norm(nn.Module):
    """LayerNorm or RMSNorm, then scaled by 1 + `scale` and shifted: both [1 or B, D], or None."""

    def __init__(self, network: DiTConfig):
        super().__init__()
        self.rms = network.norm == "rmsnorm"
        self.eps = network.norm_eps
        self.weight = nn.Parameter(torch.ones(network.hidden_size))
        self.bias = nn.Parameter(torch.zeros(network.hidden_size)) if "norm" in network.biases else None

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if scale is None or shift is None:
            return self._normed(x, weight, bias)
        if len(scale) == 1:  # the same for all rows: fused into the kernel
            scaled = 1 + scale[0].float()
            shifted = shift[0] if bias is None else bias.float() * scaled + shift[0]
            return self._normed(x, weight.float() * scaled, shifted)
        return torch.addcmul(shift[:, None], self._normed(x, weight, bias), 1 + scale[:, None])

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch's kernels compute in fp32 whatever the dtype of their input.
        shape, weight = (x.shape[-1],), weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if not self.rms:
            return F.layer_norm(x, shape, weight, bias, self.eps)
        normed = F.rms_norm(x, shape, weight, self.eps)
        return normed if bias is None else normed + bias
