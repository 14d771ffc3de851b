"""The ModifiedResNet picture tower: three stem convolutions, anti-aliased strides, attention pooling."""

# B batch, R resolution, C channels, S positions of the last feature map, E embedding

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cn_clip.clip.layers import attend, check_pixels


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
