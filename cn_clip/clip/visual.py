"""The picture towers: the Vision Transformer, and the ModifiedResNet.

The parts of the transformer pass rows as (L, B, D), as Chinese-CLIP's do, and programs that look inside expect. In
memory the rows of one picture lie side by side, which is faster: what is passed is the transposed view.
The ResNet has three stem convolutions, anti-aliased strides, and attention pooling.
"""

# B batch, R resolution, L tokens (patches + class token), D width, E embedding,
# C channels, S positions of the last feature map

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cn_clip.clip.layers import (
    LayerNorm,
    QuickGELU,
    SelfAttention,
    attend,
    check_pixels,
    may_draw,
    quick_gelu_perceptron,
    unhooked,
    unwatched,
)
from cn_clip.clip.merge_rules import plan
from cn_clip.clip.merging import merged
from cn_clip.errors import ConfigError


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block, (L, B, D) to (L, B, D).

    attn_mask: None, or as `nn.MultiheadAttention` takes it. `use_flash_attention` changes nothing.
    """

    def __init__(
        self, d_model: int, n_head: int, attn_mask: Tensor | None = None, use_flash_attention: bool = False
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        layers = [
            ("c_fc", nn.Linear(d_model, d_model * 4)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(d_model * 4, d_model)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = LayerNorm(d_model)
        self.attn_mask = attn_mask
        self.use_flash_attention = use_flash_attention

    def attention(self, x: Tensor) -> Tensor:
        """Attention among normalised rows (L, B, D)."""
        return self._attention(x, x)

    def _attention(self, query_QBD: Tensor, x_LBD: Tensor) -> Tensor:
        mask = self.attn_mask
        if mask is not None:
            mask = mask.to(x_LBD.device, x_LBD.dtype if mask.is_floating_point() else mask.dtype)
        output: Tensor = self.attn(query_QBD, x_LBD, x_LBD, need_weights=False, attn_mask=mask)[0]
        return output

    def _plain_perceptron(self, *, rows: int) -> tuple[nn.Linear, nn.Linear] | None:
        """The two layers of the perceptron if all is as here, and the rows so many that scaling weights costs less."""
        expand, gelu, shrink = (self.mlp._modules.get(name) for name in ("c_fc", "gelu", "c_proj"))
        if type(gelu) is not QuickGELU or QuickGELU.forward is not _QUICK_GELU_FORWARD or len(self.mlp) != 3:
            return None
        if type(expand) is not nn.Linear or type(shrink) is not nn.Linear or expand.bias is None:
            return None
        return (expand, shrink) if rows >= 2 * expand.in_features else None

    def forward(self, x: Tensor, *, first_only: bool = False) -> Tensor:
        """All tokens (L, B, D); with `first_only` the class token (1, B, D)."""
        if first_only:
            x_BLD = x.transpose(0, 1)
            normed = self.ln_1(x_BLD)
            attended = self._attention(normed[:, :1].transpose(0, 1), normed.transpose(0, 1))
            x_BLD = x_BLD[:, :1] + attended.transpose(0, 1)
        elif unwatched(self.ln_1, self.mlp, self.ln_2):
            x_BLD = x.transpose(0, 1)
            x_BLD = x_BLD + self.attention(self.ln_1(x_BLD).transpose(0, 1)).transpose(0, 1)
            if x.is_cuda and (layers := self._plain_perceptron(rows=x.shape[0] * x.shape[1])):
                return (x_BLD + quick_gelu_perceptron(self.ln_2(x_BLD), *layers)).transpose(0, 1)
        else:
            x = x + self.attention(self.ln_1(x))
            output: Tensor = x + self.mlp(self.ln_2(x))
            return output
        output = x_BLD + self.mlp(self.ln_2(x_BLD))
        return output.transpose(0, 1)

    def merging(self, x: Tensor, sizes_BL: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
        """(tokens (L - count, B, D), sizes): `count` tokens merged between attention and perceptron, see `merging`.

        sizes_BL: patches in each token, None: one each. A token has as much of the attention as its patches would.
        """
        x_BLD = x.transpose(0, 1)
        attended_BLD, keys_BLD = self.attn.with_keys(self.ln_1(x_BLD), _score_bias(sizes_BL))
        x_BLD = x_BLD + attended_BLD
        if count:
            x_BLD, sizes_BL = merged(x_BLD, sizes_BL, keys_BLD, self.attn.num_heads, count)
        return (x_BLD + self.mlp(self.ln_2(x_BLD))).transpose(0, 1), sizes_BL

    def class_token_of(self, x: Tensor, sizes_BL: Tensor | None) -> Tensor:
        """The class token (1, B, D) after this block, of tokens with sizes."""
        normed = self.ln_1(x.transpose(0, 1)).transpose(0, 1)
        bias_BL = _score_bias(sizes_BL)
        attended = self.attn(normed[:1], normed, normed, key_padding_mask=bias_BL, need_weights=False)[0]
        first = x[:1] + attended
        output: Tensor = first + self.mlp(self.ln_2(first))
        return output


def _score_bias(sizes_BL: Tensor | None) -> Tensor | None:
    """What the scores of tokens are raised by, so that softmax counts each as the patches in it."""
    return None if sizes_BL is None else sizes_BL.log()


class Transformer(nn.Module):
    """A stack of blocks, (L, B, D) to (L, B, D); `grad_checkpointing` trades time for memory in training."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        attn_mask: Tensor | None = None,
        use_flash_attention: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        blocks = [ResidualAttentionBlock(width, heads, attn_mask, use_flash_attention) for _ in range(layers)]
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, *, first_only: bool = False) -> Tensor:
        """All tokens (L, B, D); with `first_only` the last block computes only the class token, (1, B, D)."""
        recompute = self.grad_checkpointing and self.training
        if not (recompute or first_only):
            every: Tensor = self.resblocks(x)
            return every
        last = len(self.resblocks) - 1
        for number, block in enumerate(self.resblocks):
            options: dict[str, Any] = {"first_only": True} if first_only and number == last else {}
            if recompute:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=may_draw(block), **options)
            else:
                x = block(x, **options)
        return x

    def merging(self, x: Tensor, merge_tokens: int) -> Tensor:
        """The class token (1, B, D) of tokens (L, B, D), `merge_tokens` of which are merged in each block."""
        blocks, sizes_BL = cast("list[ResidualAttentionBlock]", list(self.resblocks)), None
        *counts, _ = plan(x.shape[0] - 1, len(blocks), merge_tokens)
        for block, count in zip(blocks[:-1], counts, strict=True):
            x, sizes_BL = block.merging(x, sizes_BL, count)
        return blocks[-1].class_token_of(x, sizes_BL)

    def class_token_suffices(self) -> bool:
        """Whether no program looks at the other tokens of the last block, or has put its own code there."""
        if not len(self.resblocks) or not (unhooked(self) and unhooked(self.resblocks)):
            return False
        last = self.resblocks[-1]
        return (
            isinstance(last, ResidualAttentionBlock)
            and (type(self).forward, type(last).forward) == (_TRANSFORMER_FORWARD, _BLOCK_FORWARD)
            and type(last).attention is _BLOCK_ATTENTION
            and "attention" not in last.__dict__
            and unwatched(last)
        )


# As they are here: a program may replace them by others, which know no `first_only`.
_TRANSFORMER_FORWARD, _BLOCK_FORWARD = Transformer.forward, ResidualAttentionBlock.forward
_BLOCK_ATTENTION, _QUICK_GELU_FORWARD = ResidualAttentionBlock.attention, QuickGELU.forward


class VisualTransformer(nn.Module):
    """Pixels to embeddings: patches, class token, transformer, projection of the class token.

    `use_flash_attention` changes nothing: PyTorch picks the kernel of attention, as `layers.attend` says.
    merge_tokens: patches merged in each layer to save time, see `merging`; `set_merging` sets it. The vectors differ.
    """

    proj: nn.Parameter | None
    merge_tokens: int = 0

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        use_flash_attention: bool = False,
    ) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        side = input_resolution // patch_size
        self.grid_size = (side, side)
        self.output_dim = output_dim
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(side * side + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, use_flash_attention=use_flash_attention)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass, which takes less memory and more time."""
        self.transformer.grad_checkpointing = enable

    def set_merging(self, merge_tokens: int) -> None:
        """Has each layer merge so many patches, see `merging`; 0: none.

        Raises ConfigError for a program's own transformer or blocks, which cannot.
        """
        is_ours = type(self.transformer) is Transformer and all(
            type(one) is ResidualAttentionBlock and type(one.attn) is SelfAttention
            for one in self.transformer.resblocks
        )
        if merge_tokens and not is_ours:
            raise ConfigError("merge_tokens: a layer of this picture tower is a program's own; leave it out")
        self.merge_tokens = merge_tokens

    def forward(self, x: Tensor, mask_ratio: float = 0.0) -> Tensor:
        """Embeddings (B, E) of pixels (B, 3, R, R), not normalised; with `proj` None, (B, D).

        mask_ratio: in [0, 1), the share of the patches dropped at random.
        Raises ConfigError for another share, and for pixels that the position embedding does not fit.
        """
        if not 0 <= mask_ratio < 1:
            raise ConfigError(f"mask_ratio: expected a value in [0, 1), got {mask_ratio}")
        # A program that gave the tower a position embedding of its own knows what fits.
        own_positions = self.positional_embedding.shape[0] == self.grid_size[0] * self.grid_size[1] + 1
        check_pixels(x, self.input_resolution if own_positions else None)
        patches_BLD = self.conv1(x).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(patches_BLD.dtype).expand(patches_BLD.shape[0], 1, -1)
        x = torch.cat([class_token, patches_BLD], dim=1) + self.positional_embedding.to(patches_BLD.dtype)
        if mask_ratio:
            x = self.random_masking(x, mask_ratio)
        x_LBD = self.ln_pre(x).transpose(0, 1)
        if self.merge_tokens:
            embedding: Tensor = self.ln_post(self.transformer.merging(x_LBD, self.merge_tokens)[0])
            return embedding if self.proj is None else embedding @ self.proj
        # A program may have replaced the transformer by a module of its own.
        shortcut = isinstance(self.transformer, Transformer) and self.transformer.class_token_suffices()
        x_LBD = self.transformer(x_LBD, first_only=True) if shortcut else self.transformer(x_LBD)
        embedding = self.ln_post(x_LBD.transpose(0, 1)[:, 0])
        return embedding if self.proj is None else embedding @ self.proj

    def random_masking(self, x: Tensor, mask_ratio: float) -> Tensor:
        """As `keep_random_patches`."""
        return keep_random_patches(x, mask_ratio)


def keep_random_patches(x_BLD: Tensor, mask_ratio: float) -> Tensor:
    """FLIP masking: the class token and int((L - 1) * (1 - mask_ratio)) patches, drawn per picture.

    Source: arXiv:2212.00794.
    """
    batch, length, _ = x_BLD.shape
    num_kept = int((length - 1) * (1 - mask_ratio))
    order = torch.rand(batch, length - 1, device=x_BLD.device).argsort(dim=1)
    kept = (order[:, :num_kept] + 1).unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1])
    return torch.cat([x_BLD[:, :1], x_BLD.gather(1, kept)], dim=1)


# --- ModifiedResNet


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; a stride is an average pool before the last one."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outplanes = planes * Bottleneck.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.downsample: nn.Module | None = None
        if stride > 1 or inplanes != outplanes:
            # "-1", "0", "1" are the names in every published checkpoint
            shortcut = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inplanes, outplanes, 1, bias=False)),
                ("1", nn.BatchNorm2d(outplanes)),
            ]
            self.downsample = nn.Sequential(OrderedDict(shortcut))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4 * planes, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        out = out + (x if self.downsample is None else self.downsample(x))
        activated: Tensor = self.relu(out)
        return activated


class AttentionPool2d(nn.Module):
    """One attention query, the mean position, over all positions of the feature map."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        """Pooled embedding (B, E) of a feature map (B, C, H, W)."""
        x_BSC = x.flatten(2).transpose(1, 2)
        x_BSC = torch.cat([x_BSC.mean(dim=1, keepdim=True), x_BSC], dim=1)
        x_BSC = x_BSC + self.positional_embedding.to(x_BSC.dtype)
        pooled = attend(self.q_proj(x_BSC[:, :1]), self.k_proj(x_BSC), self.v_proj(x_BSC), self.num_heads)
        embedding: Tensor = self.c_proj(pooled[:, 0])
        return embedding


class ModifiedResNet(nn.Module):
    """Pixels (B, 3, R, R) to embeddings (B, E), not normalised."""

    def __init__(
        self, layers: Sequence[int], output_dim: int, heads: int, input_resolution: int = 224, width: int = 64
    ) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.num_stages = len(layers)
        self._inplanes = width
        for number, blocks in enumerate(layers):
            stage = self._make_layer(width * 2**number, blocks, stride=1 if number == 0 else 2)
            setattr(self, f"layer{number + 1}", stage)
        self.attnpool = AttentionPool2d(input_resolution // 32, width * 32, heads, output_dim)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        stage = [Bottleneck(self._inplanes, planes, stride)]
        self._inplanes = planes * Bottleneck.expansion
        stage += [Bottleneck(self._inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def initialize_parameters(self) -> None:
        """Draws the weights of the attention pool, and lets every block begin as what its shortcut passes."""
        pool = self.attnpool
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(projection.weight, std=pool.c_proj.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def use_channels_last(self) -> None:
        """Lays the weights of the convolutions out as `forward` does the pictures, or cuDNN copies them in every pass.

        Values, shapes and names stay. Not for FSDP, which takes only contiguous weights.
        """
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Does nothing: recomputing would update the running statistics of batch normalisation twice a step."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises ConfigError for pixels of another size than `input_resolution`."""
        # A program that put a pool of its own here knows what fits.
        check_pixels(x, self.input_resolution if isinstance(self.attnpool, AttentionPool2d) else None)
        x = x.to(self.conv1.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last)  # the layout convolutions are fastest in
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(conv(x)))
        x = self.avgpool(x)
        for number in range(self.num_stages):
            stage: nn.Module = getattr(self, f"layer{number + 1}")
            x = stage(x)
        embedding: Tensor = self.attnpool(x)
        return embedding
