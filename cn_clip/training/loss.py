"""The contrastive loss and in-batch accuracy: pure functions of tensors."""

# B batch, D embedding

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity_logits(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosines (B pictures, B texts) of unit rows."""
    return scale * image_BD @ text_BD.t()


def contrastive_loss(logits_BB: Tensor) -> Tensor:
    """InfoNCE, mean of both directions, in nats; pair i is picture i with text i. Source: arXiv:2103.00020, fig. 3."""
    target = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, target) + F.cross_entropy(logits_BB.t(), target)) / 2


def batch_accuracy(logits_BB: Tensor) -> tuple[Tensor, Tensor]:
    """How many pictures rank their own text first, and how many texts their picture; each a count in float32."""
    target = torch.arange(len(logits_BB), device=logits_BB.device)
    image_to_text = (logits_BB.argmax(dim=1) == target).sum().float()
    text_to_image = (logits_BB.argmax(dim=0) == target).sum().float()
    return image_to_text, text_to_image
