"""Token merging: the most alike patches of a picture become one token, so that later layers have less to compute.

Source: "Token Merging: Your ViT But Faster", arXiv:2210.09461, section 3. `merge_rules` says how many in which layer.
"""

# B batch, L tokens (class token first), D width, K width of a head, H heads
# A tokens that may go, C those that they may join, R of A that go, M = L - R tokens left

import torch
import torch.nn.functional as F
from torch import Tensor


def merged(x_BLD: Tensor, sizes_BL: Tensor | None, keys_BLD: Tensor, heads: int, count: int) -> tuple[Tensor, Tensor]:
    """(tokens (B, M, D), sizes (B, M)): of every second patch, the `count` most alike to one between join that one.

    A merged token is the mean of the patches in it; sizes says how many these are, None: one each. Alike are two tokens
    by the cosine of their keys, averaged over the heads. The class token stays as it is, at position 0.
    Of patches 1 to 5, in this order, 2 and 4 may join 1, 3 or 5. If the most alike are 2 and 5, and one is to go, the
    tokens left are: class, 4, 1, 3, 2 with 5. Next time 1 and 2 with 5 may join the others.
    """
    batch, length, _ = x_BLD.shape
    if sizes_BL is None:
        sizes_BL = x_BLD.new_ones(batch, length, dtype=torch.float32)
    # In float32: in bfloat16 too many pairs would be equally alike.
    keys_BLK = F.normalize(keys_BLD.reshape(batch, length, heads, -1).mean(dim=2).float(), dim=-1)
    cosines_BAC = keys_BLK[:, 2::2] @ keys_BLK[:, 1::2].transpose(1, 2)
    best_BA, partner_BA = cosines_BAC.max(dim=-1)
    order_BA = best_BA.argsort(dim=-1, descending=True)
    going_BR, staying_B = order_BA[:, :count], order_BA[:, count:].sort(dim=-1).values
    numbers_C = torch.arange(cosines_BAC.shape[2], device=x_BLD.device)
    joins_BRC = (partner_BA.gather(1, going_BR)[..., None] == numbers_C).float()
    going_BR = 2 * going_BR + 2
    size_BR1, size_BC1 = sizes_BL.gather(1, going_BR)[..., None], sizes_BL[:, 1::2, None]
    total_BC1 = size_BC1 + joins_BRC.transpose(1, 2) @ size_BR1
    # The share of each token in that which it joins, so that no sum grows large.
    shares_BCR = (joins_BRC * size_BR1).transpose(1, 2) / total_BC1
    joined_BCD = x_BLD[:, 1::2] * (size_BC1 / total_BC1).to(x_BLD.dtype)
    joined_BCD = joined_BCD + shares_BCR.to(x_BLD.dtype) @ _rows(x_BLD, going_BR)
    kept_B = torch.cat([torch.zeros_like(order_BA[:, :1]), 2 * staying_B + 2], dim=1)  # the class token is number 0
    tokens_BMD = torch.cat([_rows(x_BLD, kept_B), joined_BCD], dim=1)
    return tokens_BMD, torch.cat([sizes_BL.gather(1, kept_B), total_BC1[..., 0]], dim=1)


def _rows(x_BLD: Tensor, numbers_BR: Tensor) -> Tensor:
    """The tokens (B, R, D) with these numbers in each picture; copies rows, where `gather` would copy values."""
    batch, length, width = x_BLD.shape
    first_B1 = length * torch.arange(batch, device=x_BLD.device)[:, None]
    rows: Tensor = x_BLD.reshape(-1, width).index_select(0, (numbers_BR + first_B1).flatten())
    return rows.reshape(batch, -1, width)
