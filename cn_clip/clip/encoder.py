"""`Encoder`: pictures and text to unit vectors in one call, over a backend that only knows tensors."""

# N inputs, B batch, R resolution, L tokens, D embedding

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cn_clip.clip import tokenizer
from cn_clip.clip.loading import default_device, open_model
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.transforms import ImageTransform
from cn_clip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "str | Path | bytes | Image"
Rows: TypeAlias = NDArray[np.float32]
Advance: TypeAlias = Callable[[int], object]
T = TypeVar("T")

DEFAULT_CONTEXT_LENGTH = 52
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Texts sorted by length together: long enough to fill batches of equal lengths, short enough to stream.
SORTING_WINDOW = 8192


class Backend(Protocol):
    """What runs the towers. `eval`, `serve` and the benchmarks know nothing else of it."""

    resolution: int
    embed_dim: int

    def encode_pixels(self, pixels_B3RR: Tensor) -> Rows:
        """Unit float32 rows (B, D) of normalised pixels."""
        ...

    def encode_tokens(self, token_ids_BL: Tensor) -> Rows:
        """Unit float32 rows (B, D) of int64 token ids, 0 being padding."""
        ...


class TorchBackend:
    """The towers in PyTorch. `model` itself is moved to `device` and put into `precision`: "fp32", "bf16" or "fp16"."""

    def __init__(self, model: CLIP, *, device: str | torch.device = "cpu", precision: str = "fp32") -> None:
        if precision not in DTYPES:
            raise ConfigError(f"precision: expected one of {sorted(DTYPES)}, got {precision!r}")
        model.float()
        if precision != "fp32":
            convert_weights(model, DTYPES[precision])
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.resolution = model.resolution
        self.embed_dim = model.config.vision.embed_dim

    @torch.inference_mode()
    def encode_pixels(self, pixels_B3RR: Tensor) -> Rows:
        return _unit_rows(self.model.encode_image(pixels_B3RR.to(self.device, non_blocking=True)))

    @torch.inference_mode()
    def encode_tokens(self, token_ids_BL: Tensor) -> Rows:
        return _unit_rows(self.model.encode_text(token_ids_BL.to(self.device, non_blocking=True)))


def _unit_rows(features_BD: Tensor) -> Rows:
    features_BD = features_BD.float()
    rows: Rows = (features_BD / features_BD.norm(dim=-1, keepdim=True)).cpu().numpy()
    return rows


class Encoder:
    """Pictures and Chinese text to unit vectors.

    model: a published name, a checkpoint file, a transformers folder, a loaded `CLIP` (moved to `device` and put into
    `precision` itself, not copied), or a `Backend`.
    device: default CUDA where there is one. precision: "fp32" (default), "bf16" or "fp16".
    Raises CheckpointError, DownloadError or ConfigError.
    """

    def __init__(
        self,
        model: "str | Path | CLIP | Backend" = "ViT-B-16",
        *,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        context_length: int = DEFAULT_CONTEXT_LENGTH,
        download_root: str | Path | None = None,
    ) -> None:
        if isinstance(model, (str, Path)):
            model, _ = open_model(model, download_root=download_root)
        if isinstance(model, CLIP):
            model = TorchBackend(model, device=device or default_device(), precision=precision)
        self.backend: Backend = model
        self.transform = ImageTransform(model.resolution)
        self.context_length = context_length

    @property
    def embed_dim(self) -> int:
        """Dimensions of a vector."""
        return self.backend.embed_dim

    def encode_images(
        self, images: Iterable[Picture], *, batch_size: int = 32, progress: bool = False, num_threads: int = 2
    ) -> Rows:
        """Unit rows (N, D), float32, in the order given.

        images: paths, encoded bytes or PIL pictures. The next batch is decoded by threads while one is computed.
        Raises DataError naming the picture that cannot be read.
        """
        from PIL.Image import Image

        images = [images] if isinstance(images, (str, Path, bytes, Image)) else list(images)
        starts = _starts(images, batch_size)
        with ThreadPoolExecutor(num_threads) as pool, _bar(len(images), "picture", progress) as advance:
            decoded = (
                pool.map(self._pixels, images[start : start + batch_size], range(start, len(images)))
                for start in starts
            )
            return self._joined(self._encode_pictures(list(batch), advance) for batch in _ahead(decoded))

    def encode_texts(self, texts: Iterable[str], *, batch_size: int = 64, progress: bool = False) -> Rows:
        """Unit rows (N, D), float32, in the order given. Texts of like length are computed together."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        with _bar(len(texts), "text", progress) as advance:
            return self._joined(self.encode_text_windows(texts, batch_size=batch_size, advance=advance))

    def encode_text_windows(
        self, texts: Sequence[str], *, batch_size: int = 64, advance: Advance | None = None
    ) -> Iterator[Rows]:
        """The rows of `encode_texts` in consecutive pieces, for writing while computing.

        advance: called with the number of texts of each batch done.
        """
        for start in range(0, len(texts), SORTING_WINDOW):
            rows = tokenizer.encode(list(texts[start : start + SORTING_WINDOW]), self.context_length)
            yield self._encode_sorted(rows, batch_size, advance or (lambda _: None))

    def _encode_sorted(self, rows: list[list[int]], batch_size: int, advance: Advance) -> Rows:
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        output = np.empty((len(rows), self.embed_dim), dtype=np.float32)
        for start in _starts(order, batch_size):
            chosen = order[start : start + batch_size]
            longest = len(rows[chosen[-1]])
            output[chosen] = self.backend.encode_tokens(tokenizer.pad([rows[index] for index in chosen], longest))
            advance(len(chosen))
        return output

    def _encode_pictures(self, pixels: list[Tensor], advance: Advance) -> Rows:
        rows = self.backend.encode_pixels(torch.stack(pixels))
        advance(len(pixels))
        return rows

    def _pixels(self, picture: Picture, number: int) -> Tensor:
        is_named = isinstance(picture, (str, Path))
        return self.transform(open_picture(picture, name=str(picture) if is_named else f"picture {number}"))

    def _joined(self, pieces: Iterable[Rows]) -> Rows:
        return np.concatenate([np.empty((0, self.embed_dim), dtype=np.float32), *pieces])


def open_picture(picture: Picture, *, name: str) -> "Image":
    """A loaded PIL picture from a path, encoded bytes, or PIL itself.

    Raises DataError saying `name` when it cannot be decoded, TypeError for any other kind of object.
    """
    from PIL.Image import DecompressionBombError, Image
    from PIL.Image import open as open_file

    if not isinstance(picture, (str, Path, bytes, Image)):
        raise TypeError(f"{name}: expected a path, bytes or a PIL picture, got {type(picture).__name__}")
    try:
        if isinstance(picture, Image):
            picture.load()
            return picture
        image: Image
        with open_file(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise DataError(f"{name}: not a picture that can be decoded ({error})") from error


def _starts(items: Sequence[Any], batch_size: int) -> range:
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    return range(0, len(items), batch_size)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields `items`, having asked for the next one before handing out the last."""
    previous = next(items, None)
    while previous is not None:
        following = next(items, None)
        yield previous
        previous = following


@contextlib.contextmanager
def _bar(total: int, unit: str, visible: bool) -> Iterator[Advance]:
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=not visible) as bar:
        yield bar.update
