"""Pictures to pixels: the one place that knows size, interpolation, mean and standard deviation."""

# R resolution

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Of OpenAI's CLIP training pictures, red, green, blue, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN_311 = np.array(MEAN, dtype=np.float32)[:, None, None]
_STD_311 = np.array(STD, dtype=np.float32)[:, None, None]

Decode: TypeAlias = Literal["exact", "fast"]


class ImageTransform:
    """Callable: PIL picture of any mode to a float32 tensor (3, R, R), normalised. Can be pickled.

    The picture is squeezed to R x R (bicubic), then turned into RGB; the first frame of an animation, no rotation by
    EXIF. Palette pictures are scaled by nearest neighbour, as PIL does.

    decode: what `draft_size` tells those who open picture files for it; a PIL picture is taken as it is.
    """

    def __init__(self, resolution: int, decode: Decode = "exact") -> None:
        if resolution < 1:
            raise ConfigError(f"image_size: expected a positive number of pixels, got {resolution}")
        check_decode(decode)
        self.resolution = resolution
        self.decode = decode

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        return self.resolution if self.decode == "fast" else None

    def __call__(self, image: "Image") -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.array(image))

    def array(self, image: "Image", out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The same pixels without PyTorch, float32 (3, R, R), in `out` where it is given."""
        from PIL.Image import Resampling

        size = (self.resolution, self.resolution)
        if image.size != size:
            image = image.resize(size, Resampling.BICUBIC)
        pixels_RR3 = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        # Three passes of vector instructions, in place, are faster than one look-up a value, and as exact.
        planes_3RR: NDArray[np.float32] = np.divide(
            pixels_RR3.transpose(2, 0, 1), np.float32(255), out=out, dtype=np.float32, order="C"
        )
        planes_3RR -= _MEAN_311
        planes_3RR /= _STD_311
        return planes_3RR

    def __repr__(self) -> str:
        return f"ImageTransform({self.resolution}, decode={self.decode!r})"


def check_decode(decode: str) -> None:
    """Raises ConfigError for a way of decoding that there is not."""
    if decode not in get_args(Decode):
        raise ConfigError(f"decode: expected {' or '.join(get_args(Decode))}, got {decode!r}")


def image_transform(image_size: int = 224) -> ImageTransform:
    """The preprocessing of a model that takes `image_size` pixels a side."""
    return ImageTransform(image_size)
