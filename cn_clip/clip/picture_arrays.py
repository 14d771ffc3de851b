"""Pictures in memory, arrays and tensors: which axis is which, and which value is white."""

# H height, W width, C channels

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray

from cn_clip.errors import DataError

if TYPE_CHECKING:
    import torch

# By the number of channels: grey, colour, colour with transparency.
_CHANNELS = (1, 3, 4)


def is_tensor(value: object) -> "TypeGuard[torch.Tensor]":
    """Whether it is a tensor of PyTorch, which is not imported for this: whoever has a tensor has done so."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: object) -> "TypeGuard[NDArray[Any] | torch.Tensor]":
    """Whether it is a tensor, or an array of numbers; arrays of strings or objects hold other things."""
    return is_tensor(value) or (isinstance(value, np.ndarray) and value.dtype.kind not in "OUSV")


def as_picture(given: "NDArray[Any] | torch.Tensor") -> Image:
    """The picture that an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), holds; C is 1, 3 or 4.

    Each is read in its own convention, that of PIL and OpenCV and that of torchvision, also where both would fit.
    Colours are red, green, blue (OpenCV has them the other way round), and perhaps alpha, which is left out.
    uint8: 0 to 255. bool: black and white. uint16: grey or colour of 16 bits, scaled to 8 unless all are below 256.
    Floats of any width: 0 to 1. A tensor may be on any device and require gradients; none reach it.
    Raises DataError, which names no picture, for any other shape, type or value, and for NaN.
    """
    values_HWC = _height_width_channels(given)
    return fromarray(_bytes(values_HWC))


def _height_width_channels(given: "NDArray[Any] | torch.Tensor") -> NDArray[Any]:
    """(H, W) or (H, W, 3), at least one pixel."""
    shape = tuple(given.shape)
    expected = "(height, width) or (channels, height, width)" if is_tensor(given) else "(height, width[, channels])"
    channels = 1 if len(shape) == 2 else shape[0 if is_tensor(given) else -1] if len(shape) == 3 else 0
    if channels not in _CHANNELS or 0 in shape:
        other = ""
        if len(shape) == 3 and shape[-1 if is_tensor(given) else 0] in _CHANNELS and 0 not in shape:
            step = "x.permute(2, 0, 1)" if is_tensor(given) else "x.transpose(1, 2, 0)"
            other = f"; if its channels are at the other end, give {step}"
        kind = "a tensor" if is_tensor(given) else "an array"
        raise DataError(f"{kind} of the shape {shape}; expected {expected} with 1, 3 or 4 channels{other}")
    if is_tensor(given):
        on_host = given.detach().cpu()
        on_host = on_host.float() if on_host.is_floating_point() else on_host
        array = on_host.numpy()
        values: NDArray[Any] = array.transpose(1, 2, 0) if array.ndim == 3 else array
    else:
        values = np.asarray(given)
    if values.ndim == 2:
        return values
    return values[..., 0] if channels == 1 else values[..., :3]


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The same as uint8, in rows one behind the other."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        black_white: NDArray[np.uint8] = values.astype(np.uint8) * np.uint8(255)
        return black_white
    if values.dtype == np.uint16:
        return (values // 256 if values.max() > 255 else values).astype(np.uint8)
    low, high = values.min(), values.max()  # NaN, if any is
    if values.dtype.kind != "f":
        raise DataError(
            f"an array of {values.dtype}, with values from {low} to {high}; expected uint8 (0 to 255), uint16, bool, "
            "or floats from 0 to 1; if they are 0 to 255, give x.astype('uint8')"
        )
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"floats from {low:g} to {high:g}; expected 0 to 1; divide by 255, or, if they are normalised for the "
            "model, give them to encode_pixels"
        )
    scaled: NDArray[np.uint8] = np.round(values.astype(np.float32) * 255).astype(np.uint8)
    return scaled
