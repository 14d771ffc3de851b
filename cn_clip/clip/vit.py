"""The Vision Transformer picture tower."""

# B batch, R resolution, L tokens (patches + class token), D width, E embedding

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cn_clip.clip.layers import LayerNorm, QuickGELU, SelfAttention
from cn_clip.errors import ConfigError


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, width * 4)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(width * 4, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = LayerNorm(width)

    def forward(self, x_BLD: Tensor, first_only: bool = False) -> Tensor:
        residual = x_BLD[:, :1] if first_only else x_BLD
        x = residual + self.attn(self.ln_1(x_BLD), first_only=first_only)
        output: Tensor = x + self.mlp(self.ln_2(x))
        return output


class Transformer(nn.Module):
    """A stack of blocks; `grad_checkpointing` trades time for memory in training."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads) for _ in range(layers)])

    def forward(self, x_BLD: Tensor, *, first_only: bool = False) -> Tensor:
        """All tokens (B, L, D); with `first_only` the last block computes the class token alone, (B, 1, D)."""
        last = len(self.resblocks) - 1
        for number, block in enumerate(self.resblocks):
            arguments = (x_BLD, first_only and number == last)
            if self.grad_checkpointing and self.training:
                x_BLD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BLD = block(*arguments)
        return x_BLD


class VisualTransformer(nn.Module):
    """Pixels to embeddings: patches, class token, transformer, projection of the class token."""

    def __init__(
        self, *, input_resolution: int, patch_size: int, width: int, layers: int, heads: int, output_dim: int
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
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def forward(self, pixels_B3RR: Tensor, mask_ratio: float = 0.0) -> Tensor:
        """Embeddings (B, E), not normalised. `mask_ratio` in [0, 1) drops that share of the patches at random."""
        if not 0 <= mask_ratio < 1:
            raise ConfigError(f"mask_ratio: expected a value in [0, 1), got {mask_ratio}")
        patches_BLD = self.conv1(pixels_B3RR).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(patches_BLD.dtype).expand(patches_BLD.shape[0], 1, -1)
        x = torch.cat([class_token, patches_BLD], dim=1) + self.positional_embedding.to(patches_BLD.dtype)
        if mask_ratio:
            x = keep_random_patches(x, mask_ratio)
        x = self.transformer(self.ln_pre(x), first_only=True)
        embedding: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return embedding


def keep_random_patches(x_BLD: Tensor, mask_ratio: float) -> Tensor:
    """FLIP masking: the class token and int((L - 1) * (1 - mask_ratio)) patches, drawn per picture.

    Source: arXiv:2212.00794.
    """
    batch, length, _ = x_BLD.shape
    num_kept = int((length - 1) * (1 - mask_ratio))
    order = torch.rand(batch, length - 1, device=x_BLD.device).argsort(dim=1)
    kept = (order[:, :num_kept] + 1).unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1])
    return torch.cat([x_BLD[:, :1], x_BLD.gather(1, kept)], dim=1)
