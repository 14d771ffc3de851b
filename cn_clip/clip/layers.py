"""Building blocks both towers share: attention, layer normalisation in float32, the quick GELU."""

# B batch, L tokens, Q queries (L, or 1 when only the class token is wanted), D width, H heads

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 whatever the input's type, returned in that type."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def attend(query_BQD: Tensor, key_BLD: Tensor, value_BLD: Tensor, heads: int, **options: Any) -> Tensor:
    """Multi-head attention of projected rows, (B, Q, D); `options` go to scaled_dot_product_attention.

    PyTorch picks the kernel: FlashAttention where device, type and mask allow it.
    """

    def split(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    context: Tensor = F.scaled_dot_product_attention(split(query_BQD), split(key_BLD), split(value_BLD), **options)
    return context.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention with the parameter names of `nn.MultiheadAttention`: in_proj_weight, in_proj_bias, out_proj."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLD: Tensor, *, first_only: bool = False) -> Tensor:
        """Attention output (B, L, D); with `first_only`, (B, 1, D) for the first token alone."""
        if not first_only:
            query, key, value = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            width = x_BLD.shape[-1]
            query = F.linear(x_BLD[:, :1], self.in_proj_weight[:width], self.in_proj_bias[:width])
            key, value = F.linear(x_BLD, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        output: Tensor = self.out_proj(attend(query, key, value, self.heads))
        return output
