"""Pictures to pixels: only this module knows size, interpolation, mean and standard deviation."""

# R resolution

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling, fromarray

from cn_clip.clip.picture_names import Decode as Decode
from cn_clip.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

# Of OpenAI's CLIP training pictures, red, green, blue, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN_311 = np.array(MEAN, dtype=np.float32)[:, None, None]
_STD_311 = np.array(STD, dtype=np.float32)[:, None, None]

_LARGEST_16_BITS = 65535
# "auto" leaves so many times the side of the model's pictures, and enough for a thumbnail of an index.
_AUTO_TIMES, _AUTO_SIDE = 2, 512

# 255, mean and standard deviation as tensors of the devices that have normalised pixels.
_CONSTANTS: dict["torch.device", tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]] = {}


class PictureTransform(Protocol):
    """From a PIL picture of any mode to normalised pixels; called by several threads at once."""

    @property
    def resolution(self) -> int:
        """R, pixels a side."""
        ...

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        ...

    def array(self, image: Image, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """float32 (3, R, R), in `out` where it is given."""
        ...

    def __call__(self, image: Image) -> "torch.Tensor":
        """The same pixels as a tensor."""
        ...


@dataclass
class Resize:
    """A PIL picture, or a tensor (..., height, width), at another size: (height, width), bicubic, not cut."""

    size: tuple[int, int]
    interpolation: str = "bicubic"

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        if not hasattr(image, "resize_"):  # which tensors have and pictures do not
            return image.resize((width, height), Resampling[self.interpolation.upper()])
        import torch.nn.functional as F

        batch = image.reshape(-1, *image.shape[-3:]).float()
        resized = F.interpolate(batch, (height, width), mode=self.interpolation, antialias=True)
        resized = resized.reshape(*image.shape[:-2], height, width)
        return resized if image.is_floating_point() else resized.round().clamp(0, 255).to(image.dtype)


def _convert_to_rgb(image: Image) -> Image:
    return image.convert("RGB")


@dataclass
class ToTensor:
    """A PIL picture, or an array (height, width[, C]), as a tensor (C, height, width); bytes are divided by 255."""

    def __call__(self, image: Any) -> "torch.Tensor":
        import torch

        values = np.asarray(image)
        if values.dtype == bool:  # of a picture in black and white
            values = values.astype(np.uint8) * np.uint8(255)
        planes = torch.from_numpy(np.array(np.atleast_3d(values).transpose(2, 0, 1), order="C"))
        return planes.float().div(255) if values.dtype == np.uint8 else planes


@dataclass
class Normalize:
    """(x - mean) / std of a tensor (..., 3, height, width)."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, x: "torch.Tensor") -> "torch.Tensor":
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


class ImageTransform:
    """Callable: PIL picture of any mode to a float32 tensor (3, R, R), normalised. Can be pickled.

    The picture is squeezed to R x R (bicubic), then turned into RGB; the first frame of an animation, no rotation by
    EXIF. Palette pictures are scaled by nearest neighbour, as PIL does.

    decode: decides `draft_size`, for the code that opens picture files; a PIL picture is taken as it is. Grey of more
    than 8 bits goes through `in_8_bits` first, but for "reference", which clips it at 255 as Chinese-CLIP does.
    transforms: the steps, as torchvision's `Compose` has them; each can be called by itself, and the list changed.
    Raises DataError as `in_8_bits`.
    """

    def __init__(self, resolution: int, decode: Decode = "exact") -> None:
        if resolution < 1:
            raise ConfigError(f"image_size: expected a positive number of pixels, got {resolution}")
        check_decode(decode)
        self.resolution = resolution
        self.decode = decode
        self.transforms = _steps(resolution)

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        return draft_side(self.decode, self.resolution)

    def __call__(self, image: Image) -> "torch.Tensor":
        import torch

        if self.transforms == _steps(self.resolution):
            return torch.from_numpy(self.array(image))
        x: Any = image
        for step in self.transforms:
            x = step(x)
        pixels: torch.Tensor = x
        return pixels

    def array(self, image: Image, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The same pixels without PyTorch, float32 (3, R, R), in `out` where it is given.

        Raises ConfigError when `transforms` was changed: such steps are only obeyed by the call.
        """
        pixels_3RR = self._resized(image).transpose(2, 0, 1)
        # Three passes of vector instructions, in place, are faster than one look-up a value, and as exact.
        planes_3RR: NDArray[np.float32] = np.divide(pixels_3RR, np.float32(255), out=out, dtype=np.float32, order="C")
        planes_3RR -= _MEAN_311
        planes_3RR /= _STD_311
        return planes_3RR

    def bytes(self, image: Image, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The pixels before they are normalised, uint8 (3, R, R), in `out` where it is given; raises as `array`.

        `normalised` makes those of `array` of them, on any device: they are a quarter of its bytes to send there.
        """
        pixels_3RR = self._resized(image).transpose(2, 0, 1)
        if out is None:
            return np.ascontiguousarray(pixels_3RR)
        np.copyto(out, pixels_3RR)
        return out

    def _resized(self, image: Image) -> NDArray[np.uint8]:
        """RGB (R, R, 3), a view of what PIL holds."""
        if self.transforms != _steps(self.resolution):
            raise ConfigError(
                "transforms: the steps were changed; call the preprocessing itself, or use them unchanged"
            )
        image = in_8_bits(image, self.decode)
        size = (self.resolution, self.resolution)
        if image.size != size:
            image = image.resize(size, Resampling.BICUBIC)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))

    def __repr__(self) -> str:
        return f"ImageTransform({self.resolution}, decode={self.decode!r})"


def shape_of(transform: PictureTransform) -> tuple[int, ...]:
    """The shape of one picture's array: (3, R, R), unless the transform says another, as those of `blocks` do."""
    shape: tuple[int, ...] | None = getattr(transform, "shape", None)
    return shape or (3, transform.resolution, transform.resolution)


def write_pixels(transform: PictureTransform, image: Image, out: NDArray[np.float32 | np.uint8]) -> None:
    """Writes the pixels (3, R, R) of a picture in the type of `out`; bytes are for an `ImageTransform` only."""
    if out.dtype == np.uint8:
        cast("ImageTransform", transform).bytes(image, cast("NDArray[np.uint8]", out))
    else:
        transform.array(image, cast("NDArray[np.float32]", out))


def normalised(pixels: "torch.Tensor") -> "torch.Tensor":
    """Pixels (..., 3, R, R) of `ImageTransform.bytes` as those of `array`: float32, on the CPU to the last bit.

    Those of any other type than uint8 are taken to be normalised, and come back as they are.
    """
    import torch

    if pixels.dtype != torch.uint8:
        return pixels
    if pixels.device not in _CONSTANTS:
        whole, mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device) for values in ((255.0,), MEAN, STD)
        )
        _CONSTANTS[pixels.device] = (whole, mean[:, None, None], std[:, None, None])
    # By tensors of the device: on CUDA, division by a number is multiplication by its rounded reciprocal.
    whole, mean, std = _CONSTANTS[pixels.device]
    return pixels.div(whole).sub_(mean).div_(std)


def _steps(resolution: int) -> list[Callable[[Any], Any]]:
    return [Resize((resolution, resolution)), _convert_to_rgb, ToTensor(), Normalize(MEAN, STD)]


def is_deep(image: Image) -> bool:
    """Whether a picture is grey of more than 8 bits a pixel: PIL's modes I;16 and its kin, I and F."""
    return image.mode[0] in "IF"


def in_8_bits(image: Image, decode: Decode = "exact") -> Image:
    """Grey of more than 8 bits as grey of 8: PIL's own conversion makes all above 255 white. Others come back as is.

    decode: "reference" leaves all to PIL's conversion, as Chinese-CLIP does.
    Values up to 255 stay what they are. Beyond, 65535 is white: 300 becomes 1, as PIL reads colour of 16 bits.
    Floats from 0 to 1 become 0 to 255. Raises DataError for values below 0, above 65535 or not finite.
    """
    if decode == "reference" or not is_deep(image):
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= _LARGEST_16_BITS:
        raise DataError(f"a grey picture with values from {low:g} to {high:g}; expected 0 to {_LARGEST_16_BITS}")
    if image.mode == "F" and high <= 1:
        return fromarray(np.round(values * 255).astype(np.uint8))
    return fromarray((values // 256).astype(np.uint8)) if high > 255 else image


def draft_side(decode: Decode, resolution: int) -> int | None:
    """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
    if decode == "auto":
        return max(_AUTO_TIMES * resolution, _AUTO_SIDE)
    return resolution if decode == "fast" else None


def check_decode(decode: str) -> None:
    """Raises ConfigError for a way of decoding that there is not."""
    if decode not in get_args(Decode):
        raise ConfigError(f"decode: expected {', '.join(get_args(Decode))}, got {decode!r}")


def image_transform(image_size: int = 224) -> ImageTransform:
    """The preprocessing of a model that takes `image_size` pixels a side."""
    return ImageTransform(image_size)
