"""What the picture transforms of other families share: pictures come as RGB, and go into an array of one shape."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cn_clip.clip.backends.base import Pixels
from cn_clip.clip.transforms import Decode, draft_side, in_8_bits


class RgbPictures(ABC):
    """A `PictureTransform`, of which a family says how a picture is written."""

    shape: tuple[int, ...]
    resolution: int

    def __init__(self, decode: Decode) -> None:
        self.decode = decode

    @abstractmethod
    def _write(self, image: Image.Image, out: Pixels) -> None:
        """Writes an RGB picture of 8 bits into an array of `shape`."""

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        return draft_side(self.decode, self.resolution)

    def array(self, image: Image.Image, out: Pixels | None = None) -> Pixels:
        """The picture as float32 of `shape`, in `out` if it is given."""
        image = in_8_bits(image, self.decode)
        out = np.empty(self.shape, np.float32) if out is None else out
        self._write(image if image.mode == "RGB" else image.convert("RGB"), out)
        return out

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.array(image))
