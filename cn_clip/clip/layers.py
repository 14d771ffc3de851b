"""Building blocks both towers share: attention, layer normalisation in float32, the quick GELU."""

# B batch, L tokens, Q queries (L, or 1 when only the class token is wanted), D width, H heads

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cn_clip.errors import ConfigError

# Packages whose modules treat each token by itself where this package has them, or wrap such modules.
_KNOWN_PACKAGES = ("torch.", "peft.", "cn_clip.")


def check_pixels(x: Tensor, resolution: int | None) -> None:
    """Raises ConfigError unless x is a batch of pictures (B, 3, R, R); R is `resolution`, or any if that is None."""
    side = "R" if resolution is None else resolution
    if x.ndim != 4 or x.shape[1] != 3 or (resolution is not None and x.shape[2:] != (resolution, resolution)):
        raise ConfigError(f"pictures of shape {tuple(x.shape)}; this model takes (B, 3, {side}, {side})")


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 whatever the input's type, returned in that type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension in float32; the result has the type of x."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """x * sigmoid(1.702 x), elementwise."""
        return x * torch.sigmoid(1.702 * x)


def split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    """(B, L, D) as (B, H, L, D / H)."""
    return x_BLD.reshape(x_BLD.shape[0], x_BLD.shape[1], heads, -1).transpose(1, 2)


def attend(query_BQD: Tensor, key_BLD: Tensor, value_BLD: Tensor, heads: int, **options: Any) -> Tensor:
    """Multi-head attention of projected rows, (B, Q, D); `options` go to scaled_dot_product_attention.

    PyTorch picks the kernel: FlashAttention where device, type and mask allow it.
    """
    query, key, value = (split_heads(x, heads) for x in (query_BQD, key_BLD, value_BLD))
    context: Tensor = F.scaled_dot_product_attention(query, key, value, **options)
    return context.transpose(1, 2).flatten(2)


def attention_scores(query_BQD: Tensor, key_BLD: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """What `attend` computes without showing it: the share (B, H, Q, L) of each token in each row, summing to 1."""
    query_BHQD, key_BHLD = split_heads(query_BQD, heads), split_heads(key_BLD, heads)
    scores: Tensor = query_BHQD @ key_BHLD.transpose(2, 3) / math.sqrt(query_BHQD.shape[-1])
    return (scores if bias is None else scores + bias).softmax(dim=-1)


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with its call, names and results, (L, B, D), by scaled_dot_product_attention.

    Rows that lie in memory picture by picture, as those of `x_BLD.transpose(0, 1)`, are not copied.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output (Q, B, D), weights (B, Q, L) or None), as `nn.MultiheadAttention`; also without a batch, (Q, D).

        `is_causal` only says of what kind `attn_mask` is. Raises RuntimeError when it is set without a mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal describes attn_mask and needs one; pass attn_mask too")
        if query.ndim == 2:
            padding = None if key_padding_mask is None else key_padding_mask[None]
            rows = (x[:, None] for x in (query, key, value))
            output, weights = self(*rows, padding, need_weights, attn_mask, average_attn_weights)
            return output[:, 0], None if weights is None else weights[0]
        # Batch first, by as few products as equal inputs allow.
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        x_BLD = key.transpose(0, 1)
        if query is key and key is value:
            rows_BQD, rows_BLD, values_BLD = F.linear(x_BLD, weight, bias).chunk(3, dim=-1)
        else:
            rows_BQD = F.linear(query.transpose(0, 1), weight[:width], bias[:width])
            if key is value:
                rows_BLD, values_BLD = F.linear(x_BLD, weight[width:], bias[width:]).chunk(2, dim=-1)
            else:
                rows_BLD = F.linear(x_BLD, weight[width : 2 * width], bias[width : 2 * width])
                values_BLD = F.linear(value.transpose(0, 1), weight[2 * width :], bias[2 * width :])
        score_bias = _score_bias(attn_mask, key_padding_mask, rows_BLD, self.num_heads)
        if not need_weights:
            context_BQD = attend(rows_BQD, rows_BLD, values_BLD, self.num_heads, attn_mask=score_bias)
            return self.out_proj(context_BQD).transpose(0, 1), None
        shares_BHQL = attention_scores(rows_BQD, rows_BLD, self.num_heads, score_bias)
        context_BQD = (shares_BHQL @ split_heads(values_BLD, self.num_heads)).transpose(1, 2).flatten(2)
        weights = shares_BHQL.mean(dim=1) if average_attn_weights else shares_BHQL
        return self.out_proj(context_BQD).transpose(0, 1), weights


def _score_bias(attn_mask: Tensor | None, padding_BL: Tensor | None, rows_BLD: Tensor, heads: int) -> Tensor | None:
    """One bias of the scores (B or 1, H or 1, Q or 1, L) for both masks; True in a mask forbids."""
    if attn_mask is not None:
        shape = (1, 1) if attn_mask.ndim == 2 else (rows_BLD.shape[0], heads)
        attn_mask = attn_mask.reshape(*shape, *attn_mask.shape[-2:])
    masks = (attn_mask, None if padding_BL is None else padding_BL[:, None, None])
    bias = None
    for mask in masks:
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = rows_BLD.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))
        bias = mask.to(rows_BLD.dtype) if bias is None else bias + mask
    return bias


# --- who looks on -----------------------------------------------------------------------------------------------------


def unwatched(*modules: nn.Module) -> bool:
    """Whether no program sees or changes what passes through the modules and their parts, so that shortcuts are safe.

    It would by a hook, a `forward` put on one object, or a module of its own that replaces one of ours.
    """
    return not _has_any_global_hook() and all(map(_unwatched, modules))  # type: ignore[no-untyped-call]


def _unwatched(module: nn.Module) -> bool:
    if not unhooked(module):
        return False
    for part in module._modules.values():  # noqa: SIM110 - a generator would take twice the time, in every pass
        if part is not None and not _unwatched(part):
            return False
    return True


def unhooked(module: nn.Module) -> bool:
    """`unwatched` for the module itself, whatever its parts. The hooks by which FSDP gathers weights do not count."""
    if "forward" in module.__dict__ or not type(module).__module__.startswith(_KNOWN_PACKAGES):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        found = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        homes = (getattr(hook, "__module__", None) or "" for hooks in found for hook in hooks.values())
        return all(home.startswith("torch.distributed.") for home in homes)
    return True
