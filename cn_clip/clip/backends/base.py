"""The `Backend` protocol, and a backend made of two exported towers."""

# B batch, R resolution, L tokens, D embedding

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.backends.names import BackendName, Kind, Precision
from cn_clip.clip.blocks import trimmed
from cn_clip.errors import ConfigError, NotFiniteError

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.tokenizer import TextTransform
    from cn_clip.clip.transforms import PictureTransform

T = TypeVar("T")
RowsT = TypeVar("RowsT")
InputsT = TypeVar("InputsT", bound="AnyPixels | TokenIds")
Rows: TypeAlias = NDArray[np.float32]
# Normalised, as every backend takes them; and what a room holds, float32 or, for a backend that takes them, bytes.
Pixels: TypeAlias = NDArray[np.float32]
AnyPixels: TypeAlias = NDArray[np.float32 | np.uint8]
PixelType: TypeAlias = Literal["float32", "uint8"]
TokenIds: TypeAlias = NDArray[np.int64]
# Pictures, and texts, in a batch by default: enough to keep every core busy, few enough to stay in its cache.
USUAL_SIZES = (32, 64)
USUAL_SIZES_ON_GPU = (256, 512)


class Backend(Protocol):
    """What runs the towers. `Encoder`, `evaluation`, `features`, `serve` and the benchmarks know nothing else of it.

    Several threads may call those of this package at once; the rows are those of one thread.
    """

    @property
    def resolution(self) -> int:
        """Pixels a side that the picture tower takes."""
        ...

    @property
    def embed_dim(self) -> int:
        """Dimensions of a row."""
        ...

    def encode_pixels(self, pixels_B3RR: Pixels) -> Rows:
        """Unit float32 rows (B, D) of normalised pixels, B at least 1; raises NotFiniteError for any that is not."""
        ...

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Unit float32 rows (B, D) of int64 token ids, 0 being padding, B at least 1; raises as `encode_pixels`."""
        ...


class AsyncBackend(Backend, Protocol):
    """A backend whose device computes a batch while the program goes on: `rows_ahead` keeps it busy."""

    def room(self, shape: tuple[int, ...], pixel_type: PixelType) -> AnyPixels:
        """Memory that is copied to the device without waiting; free for others once nothing refers to it."""
        ...

    def start_pixels(self, pixels_B3RR: AnyPixels) -> Callable[[], Rows]:
        """`encode_pixels` in two: begins at once, and gives what waits for the rows, and raises.

        The pixels, from `room`, stay as they are until the rows are there.
        """
        ...

    def start_tokens(self, token_ids_BL: TokenIds) -> Callable[[], Rows]:
        """The same for `encode_tokens`."""
        ...


class TensorBackend(Backend, Protocol):
    """A backend of PyTorch, whose rows may stay on its device."""

    def start_pixel_tensors(self, pixels_B3RR: AnyPixels) -> Callable[[], "torch.Tensor"]:
        """Begins `encode_pixels`; gives what waits for the rows, a float32 tensor (B, D) on the device, and raises."""
        ...

    def start_token_tensors(self, token_ids_BL: TokenIds) -> Callable[[], "torch.Tensor"]:
        """The same for `encode_tokens`."""
        ...


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a model are made."""

    pictures: "PictureTransform"
    texts: "TextTransform"


@dataclass(frozen=True)
class Parts:
    """All that an `Encoder` needs: towers, and how their inputs are made."""

    backend: Backend
    pictures: "PictureTransform"
    texts: "TextTransform"


@dataclass(frozen=True)
class Facts:
    """What is known of an open backend besides what every one has; None, 0 or "" where it does not say.

    device: "cpu" or "cuda:0", as PyTorch calls it; provider: the same in the words of ONNX Runtime.
    batch_sizes: pictures, and texts, in a batch by default. max_length: the longest text it takes, in tokens;
    context_length: the longest it was trained with. logit_scale: the factor on cosines, exp of the stored parameter.
    num_parameters: all, and those of the picture tower. architecture: "VISION@TEXT", of exported files.
    weights: a fingerprint, alike for every backend and precision.
    epoch, step: of the checkpoint. pixels: "uint8" for a backend that also takes them before they are normalised, and
    gets them sooner so. merge_tokens: patches merged a layer. matryoshka: the dimensions at which its vectors may be
    cut, besides whole ones. is_async: it is an `AsyncBackend`. has_tensors: it is a
    `TensorBackend`.
    """

    backend: BackendName | None = None
    precision: Precision | None = None
    device: str = ""
    provider: str = ""
    batch_sizes: tuple[int, int] = USUAL_SIZES
    max_length: int | None = None
    context_length: int | None = None
    logit_scale: float | None = None
    num_parameters: tuple[int, int] = (0, 0)
    architecture: str | None = None
    weights: str | None = None
    epoch: int = 0
    step: int = 0
    pixels: PixelType = "float32"
    merge_tokens: int = 0
    matryoshka: tuple[int, ...] = ()
    is_async: bool = False
    has_tensors: bool = False


def facts_of(backend: Backend) -> Facts:
    """`backend.facts`; those of any other object with the methods of a backend say nothing."""
    facts: Facts = getattr(backend, "facts", Facts())
    return facts


def rows_ahead(
    batches: Iterable[tuple[T, InputsT]], start: Callable[[InputsT], Callable[[], RowsT]]
) -> Iterator[tuple[T, RowsT]]:
    """(the same, rows) of (anything, inputs), in order; the rows of a batch are waited for once the next has started.

    An error of `batches` or of `start` is raised after the rows of the batches before it.
    """
    coming = iter(batches)
    waiting: tuple[T, Callable[[], RowsT]] | None = None
    while True:
        started: tuple[T, Callable[[], RowsT]] | None = None
        failure: Exception | None = None
        try:
            if (batch := next(coming, None)) is not None:
                started = batch[0], start(batch[1])
        except Exception as error:
            failure = error
        if waiting is not None:
            yield waiting[0], waiting[1]()
        if failure is not None:
            raise failure
        if started is None:
            return
        waiting = started


def unit_rows(features_BD: NDArray[np.floating]) -> Rows:
    """Rows of length 1, float32; raises as `checked_rows`."""
    features_BD = features_BD.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        lengths_B1 = np.linalg.norm(features_BD, axis=-1, keepdims=True)
        rows: Rows = np.where(np.isinf(lengths_B1), np.float32(np.nan), features_BD / lengths_B1)
    return checked_rows(rows)


def checked_rows(rows_BD: Rows) -> Rows:
    """The rows, once each of them is finite: every backend sends its own through here, and they are not checked again.

    Raises NotFiniteError for those that hold NaN or infinity, as do rows that come from zeros only, which have no
    direction (0 / 0), and from features too large for their length (see `unit_rows`).
    """
    check_finite(np.isfinite(np.einsum("bd,bd->b", rows_BD, rows_BD)))
    return rows_BD


def check_finite(is_finite_B: NDArray[np.bool_]) -> None:
    """Raises NotFiniteError for the rows of a batch that are not."""
    wrong = np.flatnonzero(~is_finite_B)
    if len(wrong):
        raise NotFiniteError(f"row {wrong[0]} of a batch of {len(is_finite_B)}", wrong.tolist())


@contextlib.contextmanager
def named(kind: str, names: Callable[[int], object]) -> Iterator[None]:
    """Names the input in a NotFiniteError from within: `image_id 17` instead of its row in a batch.

    names: from the position of an input to what its user calls it.
    """
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{kind} {names(error.positions[0])!r}", error.positions) from error


@dataclass(frozen=True)
class TowerFacts:
    """What an exported tower takes and gives. None: any number, or not known (files of other exporters say little).

    batch, length: the only batch size and text length taken. max_length: the longest text taken; context_length: the
    longest the model was trained with, None for the usual one. precision: of the weights.
    architecture: "VISION@TEXT". weights: a fingerprint that the two towers of one model share. logit_scale: the factor
    on cosines, exp of the stored parameter. left_out: products that lose too much in int8 and stay float32. levels: the
    largest weight in int8. num_int8, num_products: products with weights in int8, and all of them.
    merge_tokens: patches merged a layer, of a picture tower; None: none. family: of models of another family, which
    have pixels and token ids of their own. shape: of one input of a picture tower, None where it is free. matryoshka:
    as of `Facts`.
    """

    kind: Kind
    embed_dim: int
    resolution: int | None = None
    batch: int | None = None
    length: int | None = None
    max_length: int | None = None
    context_length: int | None = None
    precision: str | None = None
    architecture: str | None = None
    weights: str | None = None
    logit_scale: float | None = None
    num_parameters: int | None = None
    left_out: tuple[str, ...] = ()
    levels: int | None = None
    num_int8: int | None = None
    num_products: int | None = None
    merge_tokens: int | None = None
    family: str | None = None
    shape: tuple[int | None, ...] | None = None
    matryoshka: tuple[int, ...] = ()


class Tower(Protocol):
    """One exported tower, opened."""

    @property
    def facts(self) -> TowerFacts: ...

    @property
    def path(self) -> str:
        """The file, for messages."""
        ...

    @property
    def provider(self) -> str:
        """ONNX Runtime's word for what computes; "" of other runtimes."""
        ...

    @property
    def on_gpu(self) -> bool: ...

    def run(self, inputs: "Pixels | TokenIds") -> NDArray[np.floating]:
        """Raw features (B, D) of inputs whose shape the facts admit."""
        ...


class ExportedBackend:
    """Two exported towers as a backend; a missing one is an error only when it is asked for.

    Towers that take only one batch size or one text length, as those Chinese-CLIP exports, are served what they
    take: batches are cut, the last one filled up, and texts padded.
    """

    def __init__(
        self,
        image: Tower | None,
        text: Tower | None,
        *,
        backend: BackendName | None = None,
        precision: Precision | None = None,
    ) -> None:
        """backend, precision: what computes, and in what, if known.

        Raises ConfigError when the towers are of different models.
        """
        self.image, self.text, self.backend, self.precision = image, text, backend, precision
        if image is None or text is None:
            return
        if image.facts.embed_dim != text.facts.embed_dim:
            raise ConfigError(
                f"{image.path} gives {image.facts.embed_dim} dimensions, {text.path} gives {text.facts.embed_dim}; "
                "give the two files of one model"
            )
        if image.facts.weights and text.facts.weights and image.facts.weights != text.facts.weights:
            raise ConfigError(
                f"{image.path} and {text.path} were exported from different weights; give files of one model"
            )

    @property
    def resolution(self) -> int:
        """The side of a picture in pixels."""
        resolution = self._tower("image").facts.resolution
        assert resolution is not None, "an opened picture tower knows its resolution"
        return resolution

    @property
    def embed_dim(self) -> int:
        """Dimensions of a vector."""
        return self._tower("image" if self.text is None else "text").facts.embed_dim

    @property
    def facts(self) -> Facts:
        """What the files say. num_parameters: of the open towers, and of the picture tower."""
        towers = [tower for tower in (self.image, self.text) if tower is not None]
        text = None if self.text is None else self.text.facts
        first = self._tower("image" if text is None else "text")
        of_image = self.image.facts.num_parameters or 0 if self.image is not None else 0
        return Facts(
            backend=self.backend,
            precision=self.precision,
            provider=first.provider,
            batch_sizes=USUAL_SIZES_ON_GPU if any(tower.on_gpu for tower in towers) else USUAL_SIZES,
            max_length=None if text is None else text.length or text.max_length,
            context_length=None if text is None else text.context_length,
            logit_scale=first.facts.logit_scale,
            num_parameters=(sum(tower.facts.num_parameters or 0 for tower in towers), of_image),
            architecture=first.facts.architecture,
            weights=next((tower.facts.weights for tower in towers if tower.facts.weights), None),
            merge_tokens=(self.image.facts.merge_tokens or 0) if self.image is not None else 0,
            matryoshka=tuple(first.facts.matryoshka),
        )

    def encode_pixels(self, pixels_B3RR: Pixels) -> Rows:
        """Normalised pixels, float32 (B, 3, R, R), to unit float32 rows (B, D); raises ConfigError for other shapes."""
        tower = self._tower("image")
        expected = tower.facts.shape or (3, self.resolution, self.resolution)
        found = pixels_B3RR.shape[1:]
        if len(found) != len(expected) or any(
            size not in (None, one) for size, one in zip(expected, found, strict=True)
        ):
            raise ConfigError(f"takes pictures (B, {expected}), got the shape {pixels_B3RR.shape}", at=tower.path)
        return self._rows(tower, trimmed(pixels_B3RR))

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Token ids, int64 (B, L), padded with 0, to unit rows (B, D), float32."""
        tower = self._tower("text")
        facts, length = tower.facts, token_ids_BL.shape[1]
        if facts.length is None and facts.max_length is not None and length > facts.max_length:
            raise ConfigError(
                f"takes texts of at most {facts.max_length} tokens, got {length}; use a "
                f"context length of {facts.max_length}, or export it again for longer ones",
                at=tower.path,
            )
        if facts.length is not None:
            if length > facts.length:
                raise ConfigError(
                    f"was exported for texts of {facts.length} tokens, got {length}; use "
                    f"a context length of {facts.length}, or export it again",
                    at=tower.path,
                )
            token_ids_BL = np.pad(token_ids_BL, ((0, 0), (0, facts.length - length)))
        return self._rows(tower, token_ids_BL)

    def _rows(self, tower: Tower, inputs: "Pixels | TokenIds") -> Rows:
        batch = tower.facts.batch
        if batch is None:
            return unit_rows(tower.run(inputs))
        pieces = []
        for start in range(0, len(inputs), batch):
            piece = inputs[start : start + batch]
            filled = np.concatenate([piece, np.repeat(piece[:1], batch - len(piece), axis=0)])
            pieces.append(tower.run(filled)[: len(piece)].copy())
        return unit_rows(np.concatenate(pieces))

    def _tower(self, kind: Kind) -> Tower:
        tower = self.image if kind == "image" else self.text
        if tower is None:
            other = self.text if kind == "image" else self.image
            raise ConfigError(f"no {kind} model was opened, only {other.path if other else 'nothing'}; give both files")
        return tower
