"""Pictures to pixels: the one place that knows size, interpolation, mean and standard deviation."""

# R resolution

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cn_clip.errors import ConfigError

if TYPE_CHECKING:
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

    def __call__(self, image: "Image") -> Tensor:
        from PIL.Image import Resampling

        size = (self.resolution, self.resolution)
        if image.size != size:
            image = image.resize(size, Resampling.BICUBIC)
        pixels_RR3 = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        planes = [table[pixels_RR3[:, :, channel]] for channel, table in enumerate(_value_tables())]
        return torch.from_numpy(np.stack(planes))

    def __repr__(self) -> str:
        return f"ImageTransform({self.resolution})"


@lru_cache(maxsize=1)
def _value_tables() -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """Normalised value of each of the 256 levels of each channel, (3, 256): exact, and one look-up a value."""
    levels = torch.arange(256, dtype=torch.uint8).to(torch.float32).div(255)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    tables: np.ndarray[tuple[int, int], np.dtype[np.float32]] = levels.sub(mean[:, None]).div(std[:, None]).numpy()
    return tables


def image_transform(image_size: int = 224) -> ImageTransform:
    """The preprocessing of a model that takes `image_size` pixels a side."""
    return ImageTransform(image_size)
