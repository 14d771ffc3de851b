"""`Encoder`: pictures and text to unit vectors in one call, over a backend that only knows arrays of numbers."""

# N inputs, D embedding

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from cn_clip import zoo
from cn_clip.clip.backends.base import (
    USUAL_SIZES,
    AnyPixels,
    AsyncBackend,
    Backend,
    Facts,
    InputsT,
    Parts,
    Pixels,
    PixelType,
    Rows,
    T,
    TokenIds,
    facts_of,
    rows_ahead,
)
from cn_clip.clip.backends.names import DEFAULT_CONTEXT_LENGTH, BackendName, check_threads
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.families.names import is_foreign
from cn_clip.clip.families.opening import open_parts
from cn_clip.clip.pictures import Picture, decoded_batches, is_data_url, open_picture
from cn_clip.clip.tokenizer import ChineseTexts, TextTransform, text_length
from cn_clip.clip.transforms import Decode, ImageTransform, PictureTransform, check_decode, write_pixels
from cn_clip.errors import ConfigError, DataError, NotFiniteError

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.model import CLIP

Advance: TypeAlias = Callable[[int], object]

# Texts sorted by length together: long enough to fill batches of equal lengths, short enough to stream.
SORTING_WINDOW = 8192
# Characters of a text in a message.
_SHOWN = 40


class Encoder:
    """Pictures and Chinese text to unit vectors.

    model: a published name, a checkpoint file, a transformers folder, a loaded `CLIP`, a `Backend`, or, for backends
    other than torch, the prefix of exported files. A `CLIP` stays as it is, and its weights are shared, so that the
    vectors follow its training, unless another `device` or `precision` needs copies.
    Models of other families: `hf:FOLDER` (CLIP, SigLIP, AltCLIP, MetaCLIP 2; a folder or a hub id),
    `open_clip:ARCHITECTURE@FILE`, or `Parts`; pictures and texts are prepared as theirs are.
    backend: "torch", "onnx" (ONNX Runtime), "openvino" or "tensorrt". All but torch run an exported model, made at
    first use and kept in `exported/` under `download_root`; once it is there, onnx and openvino do without PyTorch.
    precision: "fp32" (default), "bf16", "fp16" or "int8", as the backend has them; "auto": the fastest that keeps a
    cosine of 0.999 to float32 and that the device has in hardware. `encoder.facts.precision` says which it is.
    device: "auto", or None: CUDA, else MPS, else the CPU. num_threads: default one a core. compile: `torch.compile`
    both towers.
    context_length: longest text in tokens; default: what the checkpoint was trained with, 52 where it does not say.
    With int8 a row depends a little on those computed with it, for they share the scale of their activations.
    decode: "fast" decodes JPEG files and bytes at 1/2, 1/4 or 1/8 of their size where both sides stay at least as
    long as the model's; the vectors differ a little. "exact" decodes them whole. "reference" as well,
    and clips grey of 16 bits to white, as Chinese-CLIP does; the others scale it to 8 bits.
    upright: turns pictures by their EXIF orientation, as people see them; Chinese-CLIP takes them as they are stored.
    A child of `os.fork` may use what its parent opened, except on CUDA, and with openvino, which refuses: PyTorch then
    computes with one thread there. After onnx the child must end by `os._exit`, as those of `multiprocessing` do: ONNX
    Runtime's exit waits for ever.
    Raises CheckpointError, DownloadError, ConfigError, or MissingExtraError naming the package to install.
    """

    def __init__(
        self,
        model: "str | Path | CLIP | Backend | Parts" = "ViT-B-16",
        *,
        backend: BackendName = "torch",
        device: "str | torch.device | None" = "auto",
        precision: str = "fp32",
        context_length: int = DEFAULT_CONTEXT_LENGTH,
        download_root: str | Path | None = None,
        num_threads: int | None = None,
        compile: bool = False,
        decode: Decode = "exact",
        upright: bool = False,
    ) -> None:
        check_decode(decode)
        self.decode, self.upright = decode, upright
        settings: dict[str, Any] = {
            "backend": backend,
            "device": "auto" if device is None else device,
            "precision": precision,
            "num_threads": num_threads,
            "download_root": download_root,
            "compile": compile,
        }
        self._pictures: PictureTransform | None = None
        self.texts: TextTransform
        self.backend: Backend
        if is_foreign(model):
            if compile:
                raise ConfigError("compile: is for Chinese-CLIP; leave it out")
            del settings["compile"]
            model = open_parts(str(model), decode=decode, **settings)
            settings, decode = {}, "exact"
        if isinstance(model, Parts):
            _check_unset("parts", decode=decode, **settings)
            longest = model.texts.context_length
            if context_length != longest and not isinstance(context_length, zoo.UsualLength):
                told = f"context_length {context_length}: this model cuts texts at {longest} tokens of its own"
                raise ConfigError(f"{told}; leave it out")
            self.backend, self._pictures, self.texts = model.backend, model.pictures, model.texts
            return
        if isinstance(model, (str, Path)):
            self.backend = open_backend(model, **settings)
        elif hasattr(model, "encode_pixels"):
            _check_unset("a backend", **settings)
            self.backend = cast("Backend", model)
        elif backend != "torch":
            raise ConfigError(f"backend: {backend} runs models from a file or by name; save this one first")
        else:
            from cn_clip.clip.backends.pytorch import sharing

            _check_unset("a CLIP", download_root=download_root)
            sizes: dict[str, Any] = {"num_threads": num_threads, "compile": compile}
            self.backend = sharing(model, device=settings["device"], precision=precision, **sizes)
        name = model if isinstance(model, (str, Path)) else "the model"
        self.texts = ChineseTexts(text_length(context_length, self.facts.context_length, name))

    @property
    def context_length(self) -> int:
        """The longest text in tokens, special ones included."""
        return self.texts.context_length

    @cached_property
    def facts(self) -> Facts:
        """What is known of the backend: its device, precision, usual batch sizes and more."""
        return facts_of(self.backend)

    @cached_property
    def transform(self) -> PictureTransform:
        """From a PIL picture to the pixels the picture tower takes."""
        return self._pictures or ImageTransform(self.backend.resolution, self.decode)

    @property
    def embed_dim(self) -> int:
        """Dimensions of a vector."""
        return self.backend.embed_dim

    @property
    def resolution(self) -> int:
        """Pixels a side that the picture tower takes."""
        return self.backend.resolution

    def encode_pixels(self, pixels_B3RR: AnyPixels) -> Rows:
        """Unit rows (B, D) of pixels that `transform` made, or of a `room`; raises as `Backend.encode_pixels`."""
        return self.backend.encode_pixels(cast("Pixels", pixels_B3RR))

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Unit rows (B, D) of ids that `texts` made; raises as `Backend.encode_tokens`."""
        return self.backend.encode_tokens(token_ids_BL)

    @property
    def pixel_type(self) -> PixelType:
        """Of a `room`: a transform of another kind than Chinese-CLIP's knows normalised pixels only."""
        return self.facts.pixels if type(self.transform) is ImageTransform else "float32"

    def room(self, count: int) -> AnyPixels:
        """Memory for the pixels (count, 3, R, R) of pictures, for `transforms.write_pixels`.

        Of the type and kind that the backend gets fastest: for PyTorch on CUDA pinned, and bytes.
        """
        resolution = self.transform.resolution
        shape = (count, 3, resolution, resolution)
        if self.facts.is_async:
            return cast("AsyncBackend", self.backend).room(shape, self.pixel_type)
        return np.empty(shape, dtype=self.pixel_type)

    def start_pixels(self, pixels_B3RR: AnyPixels) -> Callable[[], Rows]:
        """Begins `encode_pixels`, and gives what waits for the rows, and raises; only on CUDA is there a wait left."""
        if self.facts.is_async:
            return cast("AsyncBackend", self.backend).start_pixels(pixels_B3RR)
        rows_BD = self.encode_pixels(pixels_B3RR)
        return lambda: rows_BD

    def start_tokens(self, token_ids_BL: TokenIds) -> Callable[[], Rows]:
        """The same for `encode_tokens`."""
        if self.facts.is_async:
            return cast("AsyncBackend", self.backend).start_tokens(token_ids_BL)
        rows_BD = self.encode_tokens(token_ids_BL)
        return lambda: rows_BD

    def pixel_rows(self, batches: Iterable[tuple[T, AnyPixels]]) -> Iterator[tuple[T, Rows]]:
        """(anything, unit rows (B, D)) of (the same, pixels of a `room`), batch by batch in order; B may be 0.

        On CUDA a batch is computed while the next is got and started; raises as `encode_pixels`, for the batch whose
        rows are next.
        """
        return self._rows(batches, self.start_pixels)

    def token_rows(self, batches: Iterable[tuple[T, TokenIds]]) -> Iterator[tuple[T, Rows]]:
        """`pixel_rows` of token ids."""
        return self._rows(batches, self.start_tokens)

    def _rows(
        self, batches: Iterable[tuple[T, InputsT]], start: Callable[[InputsT], Callable[[], Rows]]
    ) -> Iterator[tuple[T, Rows]]:
        none = np.empty((0, self.embed_dim), dtype=np.float32)

        def begin(inputs: InputsT) -> Callable[[], Rows]:
            return start(inputs) if len(inputs) else lambda: none

        if self.facts.is_async:
            return rows_ahead(batches, begin)
        return ((own, begin(inputs)()) for own, inputs in batches)

    def encode_images(
        self,
        images: Iterable[Picture],
        *,
        batch_size: int | None = None,
        progress: bool = False,
        num_threads: int | None = None,
    ) -> Rows:
        """Unit rows (N, D), float32, in the order given.

        images: paths, data URLs, encoded bytes or PIL pictures. Threads decode the next batch while one is computed.
        batch_size: default 32, on a GPU 256. num_threads: that decode; default one a core, at most 16.
        Raises DataError naming the picture that cannot be read, NotFiniteError one that the model has no vector for.
        """
        images = [images] if isinstance(images, (str, Path, bytes, Image)) else list(images)
        batch_size = _size(batch_size, self.facts.batch_sizes[0])
        check_threads(num_threads, least=0)

        def load(number: int, out: AnyPixels) -> None:
            name = _picture_name(images[number], number)
            image = open_picture(images[number], name=name, draft_size=self.transform.draft_size, upright=self.upright)
            try:
                write_pixels(self.transform, image, out)
            except DataError as error:
                raise DataError(error, at=name) from error

        rows, done = [np.empty((0, self.embed_dim), dtype=np.float32)], 0
        batches = decoded_batches(load, range(len(images)), self.room, batch_size, num_threads)
        with _bar(len(images), "picture", progress) as advance:
            try:
                for _, rows_BD in self.pixel_rows(batches):
                    rows.append(rows_BD)
                    done += len(rows_BD)
                    advance(len(rows_BD))
            except NotFiniteError as error:
                wrong = [done + position for position in error.positions]
                raise NotFiniteError(_picture_name(images[wrong[0]], wrong[0]), wrong) from error
        return np.concatenate(rows)

    def encode_texts(self, texts: Iterable[str], *, batch_size: int | None = None, progress: bool = False) -> Rows:
        """Unit rows (N, D), float32, in the order given. Texts of like length are computed together.

        texts: as people write them; what a model needs (Chinese-CLIP: lower case, straight quotes) is done here.
        batch_size: default 64, on a GPU 512. Raises DataError for a picture given as a data URL, NotFiniteError naming
        a text that the model has no vector for.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        with _bar(len(texts), "text", progress) as advance:
            windows = self.encode_text_windows(texts, batch_size=batch_size, advance=advance)
            return np.concatenate([np.empty((0, self.embed_dim), dtype=np.float32), *windows])

    def encode_text_windows(
        self, texts: Sequence[str], *, batch_size: int | None = None, advance: Advance | None = None
    ) -> Iterator[Rows]:
        """The rows of `encode_texts` in consecutive pieces, for writing while computing.

        advance: called with the number of texts of each batch done.
        """
        batch_size = _size(batch_size, self.facts.batch_sizes[1])
        for number, text in enumerate(texts):
            if isinstance(text, str) and is_data_url(text):
                raise DataError(f"texts[{number}]: is a picture as a data URL, no text; give it to encode_images")
        numbers: list[int] = []  # of the texts, in the order in which they are computed

        def batches() -> Iterator[tuple[int, TokenIds]]:
            for start in range(0, len(texts), SORTING_WINDOW):
                rows = self.texts.rows(texts[start : start + SORTING_WINDOW])
                for chosen, token_ids in sorted_batches(rows, batch_size, self.texts.pad):
                    numbers.extend(start + position for position in chosen)
                    yield len(numbers), token_ids

        begin = 0
        output = np.empty((min(SORTING_WINDOW, len(texts)), self.embed_dim), dtype=np.float32)
        done = 0
        try:
            for end, rows_BD in self.token_rows(batches()):
                output[np.array(numbers[done:end]) - begin] = rows_BD
                done = end
                if advance is not None:
                    advance(len(rows_BD))
                if done == begin + len(output):
                    yield output
                    begin = done
                    output = np.empty((min(SORTING_WINDOW, len(texts) - begin), self.embed_dim), dtype=np.float32)
        except NotFiniteError as error:
            wrong = sorted(numbers[done + position] for position in error.positions)
            raise NotFiniteError(f"text {wrong[0]} ({texts[wrong[0]][:_SHOWN]!r})", wrong) from error


def sorted_batches(
    rows: list[list[int]], batch_size: int, pad: Callable[[list[list[int]]], TokenIds]
) -> Iterator[tuple[list[int], TokenIds]]:
    """(positions in `rows`, their token ids (B, L) as `pad` makes them), rows of like length together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), _size(batch_size)):
        chosen = order[start : start + batch_size]
        yield chosen, pad([rows[index] for index in chosen])


def _picture_name(picture: Picture, number: int) -> str:
    is_path = isinstance(picture, Path) or (isinstance(picture, str) and not is_data_url(picture))
    return str(picture) if is_path else f"picture {number}"


def _check_unset(what: str, **given: object) -> None:
    """Raises ConfigError for settings of an Encoder that a model which is open already cannot obey."""
    default = {name: one.default for name, one in inspect.signature(Encoder).parameters.items()}
    if changed := [name for name, value in given.items() if value != default[name]]:
        raise ConfigError(f"{', '.join(changed)}: the model is {what}, opened with its own settings; leave it out")


def _size(batch_size: int | None, usual: int = USUAL_SIZES[0]) -> int:
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size!r}")
    return batch_size or usual


@contextlib.contextmanager
def _bar(total: int, unit: str, visible: bool) -> Iterator[Advance]:
    with tqdm(total=total, unit=unit, disable=not visible) as bar:
        yield bar.update
