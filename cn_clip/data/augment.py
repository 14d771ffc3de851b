"""Training pictures varied at random: crop, flip and AutoAugment, drawn from a generator the caller seeds.

A picture's variation depends only on that generator, so it is the same in any process.
"""

# R resolution

import math
import random
from collections.abc import Callable
from typing import TypeAlias

from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform, Transpose

from cn_clip.clip.transforms import MEAN, Decode, draft_side, in_8_bits
from cn_clip.errors import ConfigError

Operation: TypeAlias = Callable[[Image.Image, int, random.Random], Image.Image]
SubPolicy: TypeAlias = tuple[tuple[str, float, int], tuple[str, float, int]]

MIN_AREA = 0.9  # of the picture, kept by the crop
MAX_ASPECT = 4 / 3  # width to height of the crop, or height to width
CROP_ATTEMPTS = 10
FLIP_PROBABILITY = 0.5

FILL = tuple(round(255 * value) for value in MEAN)  # where a rotated or sheared picture leaves corners

# ImageNet's 25 sub-policies (operation, probability, magnitude of 10). Source: arXiv:1805.09501, table 9.
POLICY: tuple[SubPolicy, ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)


class Augmentation:
    """Callable: PIL picture of any mode and a generator to a varied RGB picture of R x R pixels. Can be pickled.

    In this order, as Chinese-CLIP's --use-augment: crop to 90 to 100 % of the area and 3:4 to 4:3, squeezed to R x R
    (bicubic); mirrored half of the time; one sub-policy of AutoAugment.

    decode: as of `ImageTransform`.
    """

    def __init__(self, resolution: int, decode: Decode = "exact") -> None:
        if resolution < 1:
            raise ConfigError(f"resolution: expected a positive number of pixels, got {resolution}")
        self.resolution, self.decode = resolution, decode

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole.

        A crop is at least MIN_AREA of the shorter side, and shall have `resolution` pixels: 249 for 224.
        """
        return draft_side(self.decode, math.ceil(self.resolution / MIN_AREA))

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        image = in_8_bits(image, self.decode)
        crop = image.crop(crop_box(*image.size, rng))  # cropped first: resize(box=...) would look beyond the edges
        image = crop.resize((self.resolution, self.resolution), Resampling.BICUBIC)
        if rng.random() < FLIP_PROBABILITY:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return auto_augment(image if image.mode == "RGB" else image.convert("RGB"), rng)


def crop_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a random crop; the middle of the picture when none of ten draws fits into it."""
    for _ in range(CROP_ATTEMPTS):
        area = rng.uniform(MIN_AREA, 1.0) * width * height
        aspect = math.exp(rng.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if crop_width <= width and crop_height <= height:
            upper, left = rng.randint(0, height - crop_height), rng.randint(0, width - crop_width)
            return left, upper, left + crop_width, upper + crop_height
    crop_width, crop_height = min(width, round(height * MAX_ASPECT)), min(height, round(width * MAX_ASPECT))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def auto_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """An RGB picture after one random sub-policy of AutoAugment."""
    for name, probability, magnitude in rng.choice(POLICY):
        if rng.random() < probability:
            image = OPERATIONS[name](image, magnitude, rng)
    return image


def _signed(value: float, rng: random.Random) -> float:
    return value if rng.random() < 0.5 else -value


def _rotate(image: Image.Image, magnitude: int, rng: random.Random) -> Image.Image:
    """Up to 30 degrees to either side."""
    return image.rotate(_signed(magnitude * 3.0, rng), Resampling.BICUBIC, fillcolor=FILL)


def _shear_x(image: Image.Image, magnitude: int, rng: random.Random) -> Image.Image:
    """Up to 0.3 pixels a row to either side."""
    shift = _signed(magnitude * 0.03, rng)
    return image.transform(image.size, Transform.AFFINE, (1, shift, 0, 0, 1, 0), Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, magnitude: int, _rng: random.Random) -> Image.Image:
    """Keeps 4 (magnitude 0) to 8 (magnitude 10) bits a channel."""
    return ImageOps.posterize(image, 4 + magnitude * 4 // 10)


def _solarize(image: Image.Image, magnitude: int, _rng: random.Random) -> Image.Image:
    """Inverts values of the threshold and above: all at magnitude 0, none at 10."""
    return ImageOps.solarize(image, magnitude * 256 // 10)


def _enhance(
    enhancer: "Callable[[Image.Image], ImageEnhance.Color | ImageEnhance.Contrast | ImageEnhance.Sharpness]",
) -> Operation:
    """Factor 0.1 (magnitude 0) to 1.9 (magnitude 10); 1 changes nothing."""
    return lambda image, magnitude, _rng: enhancer(image).enhance(0.1 + magnitude * 0.18)


# What a magnitude means, also where table 6 of the paper leaves it open, is as in Chinese-CLIP (timm's "original").
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, _magnitude, _rng: ImageOps.autocontrast(image),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "equalize": lambda image, _magnitude, _rng: ImageOps.equalize(image),
    "invert": lambda image, _magnitude, _rng: ImageOps.invert(image),
    "posterize": _posterize,
    "rotate": _rotate,
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "solarize": _solarize,
}
