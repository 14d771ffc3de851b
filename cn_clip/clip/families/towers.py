"""Towers of other families in PyTorch, as a `Backend`."""

# B batch, R resolution, L tokens, D embedding

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cn_clip import ranks
from cn_clip.clip.backends.base import (
    USUAL_SIZES,
    USUAL_SIZES_ON_GPU,
    Facts,
    Pixels,
    Rows,
    TokenIds,
    check_threads,
    settled,
    unit_rows,
)
from cn_clip.clip.backends.pytorch import DTYPES, native_precisions
from cn_clip.clip.weights.file_formats import owned
from cn_clip.processes import compute_alone_in_children


class ForeignTowers:
    """A model that is moved to `device` and put into `precision` itself.

    encode_image: normalised pixels (B, 3, R, R) in the model's dtype to features (B, D). encode_text: int64 token ids
    (B, L) to features (B, D). visual_parts: beginnings of the names of the picture tower's parameters.
    logit_scale: the factor on cosines. num_threads: sets PyTorch's threads, for the whole process.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        resolution: int,
        logit_scale: float | None,
        visual_parts: tuple[str, ...],
        device: torch.device,
        precision: str = "fp32",
        num_threads: int | None = None,
    ) -> None:
        compute_alone_in_children()
        self.precision = settled("torch", precision, native_precisions(device))
        self._dtype = DTYPES[self.precision]
        check_threads(num_threads)
        ranks.use_threads(num_threads)
        self.device = device
        self.model = model.to(device=device, dtype=self._dtype).eval()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in owned(tensors).items():  # transformers leaves them in the mapped file
            tensors[name].data = value
        self.resolution = resolution
        sizes = {name: one.numel() for name, one in model.named_parameters()}
        visual = sum(size for name, size in sizes.items() if name.startswith(visual_parts))
        self.facts = Facts(
            precision=self.precision,
            device=str(device),
            batch_sizes=USUAL_SIZES_ON_GPU if device.type == "cuda" else USUAL_SIZES,
            logit_scale=logit_scale,
            num_parameters=(sum(sizes.values()), visual),
        )
        self._encode_image, self._encode_text = encode_image, encode_text
        # No two families keep the width of their rows in the same place.
        self.embed_dim = self.encode_pixels(torch.zeros(1, 3, resolution, resolution).numpy()).shape[1]

    @torch.inference_mode()
    def encode_pixels(self, pixels_B3RR: Pixels) -> Rows:
        """Normalised pixels, float32 (B, 3, R, R), to unit rows (B, D), float32."""
        return _rows(self._encode_image(torch.from_numpy(pixels_B3RR).to(self.device, self._dtype)))

    @torch.inference_mode()
    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Token ids, int64 (B, L), to unit rows (B, D), float32."""
        return _rows(self._encode_text(torch.from_numpy(token_ids_BL).to(self.device)))


def _rows(features_BD: Tensor) -> Rows:
    return unit_rows(features_BD.float().cpu().numpy())
