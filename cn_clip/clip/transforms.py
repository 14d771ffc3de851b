"""Pictures to pixels: the one place that knows size, interpolation, mean and standard deviation."""

# R resolution

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Of OpenAI's CLIP training pictures, red, green, blue, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTransform:
    """Callable: PIL picture of any mode to a float32 tensor (3, R, R), normalised. Can be pickled.

    The picture is squeezed to R x R (bicubic), then turned into RGB; the first frame of an animation, no rotation by
    EXIF. Palette pictures are scaled by nearest neighbour, as PIL does.
    """

    def __init__(self, resolution: int) -> None:
        if resolution < 1:
            raise ConfigError(f"image_size: expected a positive number of pixels, got {resolution}")
        self.resolution = resolution

    def __call__(self, image: "Image") -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.array(image))

    def array(self, image: "Image") -> NDArray[np.float32]:
        """The same pixels without PyTorch, float32 (3, R, R)."""
        from PIL.Image import Resampling

        size = (self.resolution, self.resolution)
        if image.size != size:
            image = image.resize(size, Resampling.BICUBIC)
        pixels_RR3 = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        planes_3RR = np.empty((3, *size), dtype=np.float32)
        for channel, table in enumerate(_value_tables()):
            np.take(table, pixels_RR3[:, :, channel], out=planes_3RR[channel])
        return planes_3RR

    def __repr__(self) -> str:
        return f"ImageTransform({self.resolution})"


@lru_cache(maxsize=1)
def _value_tables() -> NDArray[np.float32]:
    """Normalised value of each of the 256 levels of each channel, (3, 256): exact, and one look-up a value."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    mean, std = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)
    tables: NDArray[np.float32] = (levels - mean[:, None]) / std[:, None]
    return tables


def image_transform(image_size: int = 224) -> ImageTransform:
    """The preprocessing of a model that takes `image_size` pixels a side."""
    return ImageTransform(image_size)
