"""Building blocks both towers share: attention, layer normalisation, the quick GELU.

On CUDA they compute the same by fewer kernels and keep less for the backward pass; elsewhere they are written plainly.
"""

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
QUICK_GELU_SLOPE = 1.702


def check_pixels(x: Tensor, resolution: int | None) -> None:
    """Raises ConfigError unless x is a batch of pictures (B, 3, R, R); R is `resolution`, or any if that is None."""
    side = "R" if resolution is None else resolution
    if x.ndim != 4 or x.shape[1] != 3 or (resolution is not None and x.shape[2:] != (resolution, resolution)):
        raise ConfigError(f"pictures of shape {tuple(x.shape)}; this model takes (B, 3, {side}, {side})")


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 whatever the input's type, returned in that type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension in float32; the result has the type of x."""
        if x.is_cuda:
            return normalised_in_type(x, self.weight, self.bias, self.eps)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def normalised_in_type(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation of the last dimension by one kernel each way, also under autocast; keeps x in its type.

    The kernel computes in float32 within; gain and bias are rounded to the type of x before, which it demands.
    """
    with torch.autocast(x.device.type, enabled=False):  # it would turn x into float32 first, and keep that
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """x * sigmoid(1.702 x), elementwise."""
        return quick_gelu(x)


# The slope is an argument: programs that script the towers (TorchScript) take no global numbers along.
def quick_gelu(x: Tensor, slope: float = QUICK_GELU_SLOPE) -> Tensor:
    """x * sigmoid(1.702 x), elementwise, as is best on its device."""
    return quick_gelu_by_silu(x, slope) if x.is_cuda else x * torch.sigmoid(slope * x)


def quick_gelu_by_silu(x: Tensor, slope: float = QUICK_GELU_SLOPE) -> Tensor:
    """x * sigmoid(1.702 x) by silu(z) = z * sigmoid(z), which keeps one tensor for the backward pass, not two."""
    return F.silu(slope * x) / slope


def quick_gelu_perceptron(x: Tensor, expand: nn.Linear, shrink: nn.Linear) -> Tensor:
    """shrink(quick_gelu(expand(x))), the activation by one kernel each way.

    Its two factors go into the weights, which are far smaller than the rows: with z = 1.702 (W x + b),
    W x + b times sigmoid(z) is silu(z) / 1.702.
    """
    slope = QUICK_GELU_SLOPE
    z = F.linear(x, expand.weight * slope, expand.bias * slope)
    return F.linear(F.silu(z), shrink.weight / slope, shrink.bias)


def in_mixed_type(x: Tensor) -> Tensor:
    """x in the type that autocast multiplies in where it is on, else itself.

    Rows that stay in float32 between layers are turned into that type by every product that takes them.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def split_heads(x_BLD: Tensor, heads: int) -> Tensor:
    """(B, L, D) as (B, H, L, D / H)."""
    return x_BLD.reshape(x_BLD.shape[0], x_BLD.shape[1], heads, -1).transpose(1, 2)


def attend(
    query_BQD: Tensor, key_BLD: Tensor, value_BLD: Tensor, heads: int, *, lengths_vary: bool = False, **options: Any
) -> Tensor:
    """Multi-head attention of projected rows, (B, Q, D); `options` go to scaled_dot_product_attention.

    PyTorch picks the kernel by device, type and mask. On CUDA, without a mask, it is FlashAttention or on newer GPUs
    cuDNN's in half precision, the memory-efficient kernel in float32. lengths_vary: for texts, whose batches have many
    shapes. On CUDA they get the memory-efficient kernel, because cuDNN would build a plan for every shape, and
    FlashAttention takes no mask.
    """
    query, key, value = (split_heads(x, heads) for x in (query_BQD, key_BLD, value_BLD))
    context: Tensor
    if lengths_vary and query.is_cuda and _takes_efficient(query, key, value, **options):
        context = efficient_attention(query, key, value, **options)
    else:
        context = F.scaled_dot_product_attention(query, key, value, **options)
    return context.transpose(1, 2).flatten(2)


def _takes_efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> bool:
    parameters = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, dropout_p, False, False)
    return torch.backends.cuda.can_use_efficient_attention(parameters)


def efficient_attention(
    query_BHQD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """scaled_dot_product_attention by CUDA's memory-efficient kernel, (B, H, Q, D); attn_mask: added to the scores.

    Called by its name: PyTorch's switch between kernels (`sdpa_kernel`) is one for all threads of the process.
    """
    rows = (query_BHQD, key_BHLD, value_BHLD)
    if attn_mask is not None:
        attn_mask = aligned(attn_mask).expand(*query_BHQD.shape[:3], key_BHLD.shape[2])
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in rows)
    context: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        *rows, attn_mask, needs_gradient, dropout_p
    )[0]
    return context


def aligned(mask: Tensor) -> Tensor:
    """The mask (…, L) with rows that begin at multiples of 8 elements, as the kernel demands; itself if they do."""
    if all(stride % 8 == 0 for size, stride in zip(mask.shape[:-1], mask.stride()[:-1], strict=True) if size > 1):
        return mask
    length = mask.shape[-1]
    return F.pad(mask, (0, -length % 8))[..., :length]


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

    def with_keys(self, x_BLD: Tensor, score_bias_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output, keys of all heads), (B, L, D) each, of attention among rows (B, L, D), picture by picture.

        score_bias_BL: what the scores of each row are raised by.
        """
        rows_BLD, keys_BLD, values_BLD = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        bias = None if score_bias_BL is None else score_bias_BL[:, None, None].to(rows_BLD.dtype)
        context_BLD = attend(rows_BLD, keys_BLD, values_BLD, self.num_heads, attn_mask=bias)
        return self.out_proj(context_BLD), keys_BLD


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


def may_draw(module: nn.Module) -> bool:
    """Whether computing the module may take random numbers: it drops something out, or runs code that is not ours."""
    return not unwatched(module) or any(map(_drops_out, module.modules()))


def _drops_out(part: nn.Module) -> bool:
    share = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0.0)
    return part.training and isinstance(share, float) and share > 0


def unhooked(module: nn.Module) -> bool:
    """`unwatched` for the module itself, whatever its parts. The hooks by which FSDP gathers weights do not count."""
    if "forward" in module.__dict__ or not type(module).__module__.startswith(_KNOWN_PACKAGES):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        found = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        homes = (getattr(hook, "__module__", None) or "" for hooks in found for hook in hooks.values())
        return all(home.startswith("torch.distributed.") for home in homes)
    return True
