"""Pictures in their own proportions (NaFlex, as of SigLIP 2): what the towers of transformers lack for export."""

# B batch, N patches, S side of the grid of positions, D width

from typing import Any

import torch
from torch import Tensor


def prepare(model: Any) -> None:
    """Has the positions of a model computed for the whole batch at once, without what no exporter translates."""
    model.vision_model.embeddings.resize_positional_embeddings = resized_positions


def resized_positions(positional_embeddings: Tensor, spatial_shapes: Tensor, max_length: int) -> Tensor:
    """The positions (S, S, D) scaled to each picture's (height, width) in patches: (B, N, D), as read line by line.

    Bilinear, each new position over as much of the grid as it covers (`antialias`). Both axes are weights, so that all
    pictures are one product. Of S = 2 scaled to width 1 both weigh 1/2; to width 4 the second is 3/4 and 1/4.
    Patches behind height * width get the first one's, and are masked.
    """
    grid_SSD = positional_embeddings
    numbers_N = torch.arange(max_length, device=grid_SSD.device)
    height_B1, width_B1 = spatial_shapes[:, :1], spatial_shapes[:, 1:]
    numbers_BN = torch.where(numbers_N < height_B1 * width_B1, numbers_N, 0)
    rows_BN = torch.div(numbers_BN, width_B1, rounding_mode="floor")
    rows_BNS = _weights(rows_BN, height_B1, grid_SSD.shape[0])
    columns_BNS = _weights(numbers_BN - rows_BN * width_B1, width_B1, grid_SSD.shape[1])
    both_BNP = (rows_BNS[..., :, None] * columns_BNS[..., None, :]).flatten(-2)
    return (both_BNP @ grid_SSD.float().flatten(0, 1)).to(grid_SSD.dtype)


def _weights(positions_BN: Tensor, size_B1: Tensor, side: int) -> Tensor:
    """How much each of `side` positions counts for those asked for, of an axis that is scaled to a size: (B, N, S)."""
    scale_B11 = (side / size_B1.float())[..., None]
    reach_B11 = scale_B11.clamp(min=1)
    centres_BN1 = (positions_BN.float()[..., None] + 0.5) * scale_B11
    middles_S = torch.arange(side, device=positions_BN.device) + 0.5
    weights_BNS = (1 - (middles_S - centres_BN1).abs() / reach_B11).clamp(min=0)
    return weights_BNS / weights_BNS.sum(dim=-1, keepdim=True)
