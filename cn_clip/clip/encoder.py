"""`Encoder`: pictures and text to unit vectors in one call, over a backend that only knows arrays of numbers."""

# N inputs, D embedding

import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray

from cn_clip import progress as bars
from cn_clip import zoo
from cn_clip.clip import merge_rules
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
    TensorBackend,
    TokenIds,
    facts_of,
    rows_ahead,
    unit_rows,
)
from cn_clip.clip.backends.choosing import Decision, decide, only_torch
from cn_clip.clip.backends.names import (
    DEFAULT_CONTEXT_LENGTH,
    BackendChoice,
    Kind,
    check_cosine,
    check_precision,
    check_threads,
)
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.families.names import check_trust, is_foreign
from cn_clip.clip.families.opening import decide as decide_family
from cn_clip.clip.families.opening import full_name, open_parts, resolved
from cn_clip.clip.picture_arrays import is_array
from cn_clip.clip.pictures import (
    Picture,
    Pictures,
    decoded_batches,
    is_data_url,
    open_picture,
    picture_name,
    pictures_of,
)
from cn_clip.clip.row_types import Output, RowType, check_output, of_type, row_type
from cn_clip.clip.scoring import (
    LOGIT_SCALE,
    ArraysGiven,
    Labelled,
    RowsGiven,
    check_labels,
    chosen_templates,
    classifier,
    probabilities,
    similarity,
    unit,
)
from cn_clip.clip.tokenizer import ChineseTexts, TextTransform, text_length
from cn_clip.clip.transforms import Decode, ImageTransform, PictureTransform, check_decode, shape_of, write_pixels
from cn_clip.errors import CnClipError, ConfigError, DataError, NotFiniteError, lacked_memory
from cn_clip.language import both

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.model import CLIP
    from cn_clip.retrieval.flat import Matches

logger = logging.getLogger(__name__)
Advance: TypeAlias = Callable[[int], object]

# Texts sorted by length together: long enough to fill batches of equal lengths, short enough to stream.
SORTING_WINDOW = 8192
# Characters of a text in a message.
_SHOWN = 40


class Encoder:
    """Pictures and Chinese text to unit vectors.

        encoder = Encoder("ViT-B-16")
        texts_ND = encoder.encode_texts(["一只猫", "一只狗"])                   # float32 (2, 512), rows of length 1
        encoder.similarity(texts_ND, encoder.encode_images(["a.jpg"]))         # cosines (2, 1)
        encoder.classify(["a.jpg"], ["猫", "狗"])                              # labels and probabilities

    model: a published name, a checkpoint file, a transformers folder, an id of the Hugging Face hub ("OWNER/NAME",
    perhaps with "@REVISION"), a loaded `CLIP`, a `Backend`, or, for backends other than torch, the prefix of exported
    files. A `CLIP` stays as it is, and its weights are shared, so that the vectors follow its training, unless another
    `device` or `precision` needs copies.
    Models of other families: a folder or an id of the hub (CLIP, SigLIP, SigLIP 2, FG-CLIP 2, TIPSv2, AltCLIP, MetaCLIP
    2; also `hf:FOLDER`), `open_clip:ARCHITECTURE@FILE`, `open_clip:local-dir:FOLDER`, `open_clip:hf-hub:OWNER/NAME`,
    `st:FOLDER` of sentence-transformers, or `Parts`; pictures and texts are prepared as theirs are.
    backend: "torch", "onnx" (ONNX Runtime), "openvino" or "tensorrt". All but torch run an exported model, made at
    first use and kept in `exported/` under `download_root`; once it is there, onnx and openvino do without PyTorch.
    precision: "fp32" (default), "bf16", "fp16" or "int8", as the backend has them; "auto": the fastest that keeps a
    cosine of 0.999 to float32 and that the device has in hardware. `encoder.facts.precision` says which it is.
    backend "auto": the fastest on this processor of those installed; with precision "auto" also the fastest precision,
    int8 among them, whose smallest cosine to float32, measured on this model and processor, is at least `min_cosine`
    (default 0.999). `encoder.decision` says what it took and why; see `backends.choosing`.
    device: "auto", or None: CUDA, else MPS, else the CPU. num_threads: default one a core. compile: `torch.compile`
    both towers.
    context_length: longest text in tokens; default: what the checkpoint was trained with, 52 where it does not say. Of
    FG-CLIP 2 64 (default) or 196, which reads every text as a long one.
    With int8 a row depends a little on those computed with it, for they share the scale of their activations.
    decode: "fast" decodes JPEG files and bytes at 1/2, 1/4 or 1/8 of their size where both sides stay at least as
    long as the model's; the vectors differ a little. "exact" decodes them whole. "reference" as well,
    and clips grey of 16 bits to white, as Chinese-CLIP does; the others scale it to 8 bits.
    merge_tokens: so many patches are merged in each layer of a ViT, the most alike (token merging); 0: none. Faster,
    and pictures get other vectors, see docs/encoder.md. `facts.merge_tokens` says it of any backend.
    dimensions: only the first so many numbers of each vector, as unit rows: for models that were trained so
    (`facts.matryoshka`), others are refused. `cut` is None where nothing is left out.
    upright: turns pictures by their EXIF orientation, as people see them; Chinese-CLIP takes them as they are stored.
    trust_remote_code: lets the code run that comes with a folder of `st:`; without it none is run, and a folder that
    cannot be opened without its code is refused.

    Threads: several may use one Encoder at once, and get the rows that one would; of a `Backend` or `Parts` of your
    own that is for it to say. More threads are not faster: each call keeps all cores or the GPU busy.
    Pickling: an Encoder opened by a name, a file or a folder is opened again from there, with its settings, in the
    process that unpickles it (spawn, Ray, `datasets.map`); one made of a model in memory raises ConfigError.
    A child of `os.fork` may use what its parent opened, except on CUDA, and with openvino, which refuses: PyTorch then
    computes with one thread there. After onnx the child must end by `os._exit`, as those of `multiprocessing` do: ONNX
    Runtime's exit waits for ever.
    Raises CheckpointError, DownloadError, ConfigError, or MissingExtraError naming the package to install.
    """

    def __init__(
        self,
        model: "str | Path | CLIP | Backend | Parts" = "ViT-B-16",
        *,
        backend: BackendChoice = "torch",
        device: "str | torch.device | None" = "auto",
        precision: str = "fp32",
        min_cosine: float | None = None,
        context_length: int = DEFAULT_CONTEXT_LENGTH,
        download_root: str | Path | None = None,
        num_threads: int | None = None,
        compile: bool = False,
        decode: Decode = "exact",
        upright: bool = False,
        merge_tokens: int = 0,
        dimensions: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_decode(decode)
        if trust_remote_code:
            check_trust(model)
        check_cosine(min_cosine)
        if min_cosine is not None and backend != "auto":
            raise ConfigError(f'min_cosine: is for backend="auto", got {backend!r}; leave it out')
        merge_rules.check(merge_tokens)
        self.decode, self.upright = decode, upright
        self.decision: Decision | None = None
        self.cut: int | None = None
        settings: dict[str, Any] = {
            "backend": backend,
            "device": "auto" if device is None else device,
            "precision": precision,
            "num_threads": num_threads,
            "download_root": download_root,
            "compile": compile,
            "merge_tokens": merge_tokens,
        }
        self.opened: Opened | None = None
        # Of each tower, the inputs of a batch that memory had room for, once it has run out.
        self.most_at_once: dict[Kind, int] = {}
        self._pictures: PictureTransform | None = None
        self.texts: TextTransform
        self.backend: Backend
        if isinstance(model, (str, Path)):
            more: dict[str, Any] = {"context_length": context_length, "decode": decode, "upright": upright}
            more |= {"trust_remote_code": trust_remote_code, "dimensions": dimensions}
            root = None if download_root is None else Path(download_root).expanduser().absolute()
            kept = {**settings, **more, "download_root": root}
            self.opened = Opened(full_name(str(model)), str(model), kept)
            check_precision(backend, precision)
            model = resolved(model, download_root=download_root)
        if backend == "auto" and not (isinstance(model, Parts) or hasattr(model, "encode_pixels")):
            self.decision = _decided(model, settings, min_cosine)
            backend, precision = self.decision.mode
            settings |= {"backend": backend, "precision": precision}
            if self.opened is not None:
                self.opened.settings.update(backend=backend, precision=precision)
        if is_foreign(model):
            for setting in ("compile", "merge_tokens"):
                if settings.pop(setting):
                    raise ConfigError(f"{setting}: is for Chinese-CLIP; leave it out")
            asked = None if isinstance(context_length, zoo.UsualLength) else context_length
            more = {"context_length": asked, "trust_remote_code": trust_remote_code}
            model = open_parts(str(model), decode=decode, **more, **settings)
            settings, decode, context_length = {}, "exact", DEFAULT_CONTEXT_LENGTH
        if isinstance(model, Parts):
            _check_unset("parts", decode=decode, **settings)
            longest = model.texts.context_length
            if context_length != longest and not isinstance(context_length, zoo.UsualLength):
                told = f"context_length {context_length}: this model cuts texts at {longest} tokens of its own"
                raise ConfigError(f"{told}; leave it out")
            self.backend, self._pictures, self.texts = model.backend, model.pictures, model.texts
            self.cut = self._checked_cut(dimensions)
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
            sizes: dict[str, Any] = {"num_threads": num_threads, "compile": compile, "merge_tokens": merge_tokens}
            self.backend = sharing(model, device=settings["device"], precision=precision, **sizes)
        self.cut = self._checked_cut(dimensions)
        name = model if isinstance(model, (str, Path)) else "the model"
        self.texts = ChineseTexts(text_length(context_length, self.facts.context_length, name))

    def __repr__(self) -> str:
        facts = f"backend={self.backend_name!r}, precision={self.facts.precision!r}, device={self.device!r}"
        name = "a model in memory" if self.model_name is None else repr(self.model_name)
        return f"Encoder({name}, {facts}, dimensions={self.dimensions}, context_length={self.context_length})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.opened is None:
            raise ConfigError(
                "this Encoder was made of a model in memory, and cannot be pickled; save it "
                '(encoder.save("my-model")), and pickle Encoder("my-model")'
            )
        return _opened_again, (self.opened,)

    @property
    def model_name(self) -> str | None:
        """The name, file or folder as it was given; None of a model in memory."""
        return None if self.opened is None else self.opened.given

    @property
    def backend_name(self) -> str:
        """What runs the model: "torch", "onnx", "openvino" or "tensorrt"; of a backend of your own its type."""
        return self.facts.backend or ("torch" if self.facts.has_tensors else type(self.backend).__name__)

    @property
    def device(self) -> str:
        """Where it computes, as PyTorch calls it: "cpu", "cuda:0", "mps"; of exported files "cpu" or "cuda"."""
        on_cpu = "CPU" in self.facts.provider or not self.facts.provider
        return self.facts.device or ("cpu" if on_cpu else "cuda")

    @property
    def logit_scale(self) -> float | None:
        """The factor on cosines that the model was trained with, exp of its parameter, 100 at most; None: not known."""
        return self.facts.logit_scale

    @property
    def dimensions(self) -> int:
        """D, the numbers of a row; `embed_dim` is the same."""
        return self.cut or self.backend.embed_dim

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
        return self.cut or self.backend.embed_dim

    def _checked_cut(self, dimensions: int | None) -> int | None:
        """None for whole vectors; raises ConfigError for a number that the model was not trained for."""
        whole, trained = self.backend.embed_dim, self.facts.matryoshka
        if dimensions is None or dimensions == whole:
            return None
        if dimensions in trained:
            return dimensions
        if trained:
            raise ConfigError(
                f"dimensions {dimensions}: vectors of this model have {whole} numbers, and were trained to be cut at "
                f"{', '.join(map(str, trained))} alone; give one of these, or leave it out"
            )
        raise ConfigError(
            f"dimensions {dimensions}: vectors of this model have {whole} numbers, and were not trained to be cut; "
            "leave it out, or train the model so (Matryoshka)"
        )

    def _whole_or_cut(self, rows_BD: Rows) -> Rows:
        return rows_BD if self.cut is None else unit_rows(rows_BD[:, : self.cut])

    @property
    def resolution(self) -> int:
        """Pixels a side that the picture tower takes."""
        return self.backend.resolution

    def encode_pixels(self, pixels_B3RR: AnyPixels) -> Rows:
        """Unit rows (B, D) of pixels that `transform` made, or of a `room`; raises as `Backend.encode_pixels`."""
        return self._whole_or_cut(self.backend.encode_pixels(cast("Pixels", pixels_B3RR)))

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Unit rows (B, D) of ids that `texts` made; raises as `Backend.encode_tokens`."""
        return self._whole_or_cut(self.backend.encode_tokens(token_ids_BL))

    @property
    def pixel_type(self) -> PixelType:
        """Of a `room`: a transform of another kind than Chinese-CLIP's knows normalised pixels only."""
        return self.facts.pixels if type(self.transform) is ImageTransform else "float32"

    def room(self, count: int) -> AnyPixels:
        """Memory for the pixels (count, 3, R, R) of pictures, for `transforms.write_pixels`.

        Of the type and kind that the backend gets fastest: for PyTorch on CUDA pinned, and bytes.
        """
        shape = (count, *shape_of(self.transform))
        if self.facts.is_async:
            return cast("AsyncBackend", self.backend).room(shape, self.pixel_type)
        return np.empty(shape, dtype=self.pixel_type)

    def start_pixels(self, pixels_B3RR: AnyPixels) -> Callable[[], Rows]:
        """Begins `encode_pixels`, and gives what waits for the rows, and raises; only on CUDA is there a wait left."""
        return self._cutting(self._within_memory("image", pixels_B3RR))

    def start_tokens(self, token_ids_BL: TokenIds) -> Callable[[], Rows]:
        """The same for `encode_tokens`."""
        return self._cutting(self._within_memory("text", token_ids_BL))

    def _start(self, kind: Kind, inputs: Any) -> Callable[[], Rows]:
        """Begins a batch of the backend, whose rows are whole; of one that cannot wait they are there at once."""
        if self.facts.is_async:
            backend = cast("AsyncBackend", self.backend)
            return backend.start_pixels(inputs) if kind == "image" else backend.start_tokens(inputs)
        rows_BD = self.backend.encode_pixels(inputs) if kind == "image" else self.backend.encode_tokens(inputs)
        return lambda: rows_BD

    def _within_memory(self, kind: Kind, inputs: Any) -> Callable[[], Rows]:
        """`_start`, in halves of halves where memory runs out, down to one input; what was too many once is not tried
        again.
        """
        count = len(inputs)
        size = most = min(self.most_at_once.get(kind, count), count)
        while True:
            try:
                if size == count:
                    return self._start(kind, inputs)
                start, firsts = partial(self._start, kind), range(0, count, size)
                rows_BD = np.concatenate([_rows_from(first, start, inputs, size) for first in firsts])
            except (MemoryError, RuntimeError) as error:
                if size <= 1 or isinstance(error, CnClipError) or not lacked_memory(error):
                    raise
                size //= 2
                continue
            if size < most:
                self.most_at_once[kind] = size
                logger.warning("out of memory with %d %ss at once; going on with %d", most, kind, size)
            return lambda: rows_BD

    def _cutting(self, rows_of: Callable[[], Rows]) -> Callable[[], Rows]:
        return rows_of if self.cut is None else lambda: self._whole_or_cut(rows_of())

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

    @overload
    def encode_images(
        self,
        images: Pictures,
        *,
        batch_size: int | None = ...,
        progress: bool = ...,
        num_threads: int | None = ...,
        output: Literal["torch"],
        dtype: object = ...,
    ) -> "torch.Tensor": ...

    @overload
    def encode_images(
        self,
        images: Pictures,
        *,
        batch_size: int | None = ...,
        progress: bool = ...,
        num_threads: int | None = ...,
        output: Literal["numpy"] = ...,
        dtype: object = ...,
    ) -> NDArray[Any]: ...

    def encode_images(
        self,
        images: Pictures,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        num_threads: int | None = None,
        output: Output = "numpy",
        dtype: object = "float32",
    ) -> "NDArray[Any] | torch.Tensor":
        """Unit rows (N, D) in the order given.

        images: paths, data URLs, encoded bytes, open files, PIL pictures, arrays (height, width[, channels]) and
        tensors (channels, height, width), uint8 or floats from 0 to 1, see `picture_arrays.as_picture`; one of them, a
        batch (N, …) of arrays, or any iterable. An iterable is never made a list: at most four batches of it are in
        memory. Threads decode the next batches while one is computed.
        batch_size: default 32, on a GPU 256. num_threads: that decode; default one a core, at most 16.
        output: "numpy", or "torch": a tensor where the model computes, on CUDA without a copy to the host, with no
        gradient; of onnx, openvino and tensorrt on the CPU.
        dtype: "float32", "float16" or "int8" (see `row_types.of_type`; of those only the cosine means anything).
        Raises DataError naming the picture that cannot be read, NotFiniteError one that the model has no vector for,
        TypeError for what is no picture, ConfigError for a setting.
        """
        batches = self.encode_image_batches(
            images, batch_size=batch_size, progress=progress, num_threads=num_threads, output=output, dtype=dtype
        )
        return self._joined(batches, check_output(output), row_type(dtype))

    def encode_image_batches(
        self,
        images: Pictures,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        num_threads: int | None = None,
        output: Output = "numpy",
        dtype: object = "float32",
    ) -> Iterator["NDArray[Any] | torch.Tensor"]:
        """The rows of `encode_images` (B, D) batch by batch, for streams whose rows do not fit in memory."""
        check_threads(num_threads, least=0)
        start, wanted = self._starts(check_output(output))[0], row_type(dtype)
        batch_size = _size(batch_size, self.facts.batch_sizes[0])
        source = pictures_of(images)
        waiting: deque[list[str]] = deque()  # the names of pictures whose rows are not there yet

        def load(item: tuple[int, Picture], out: AnyPixels) -> str:
            number, picture = item
            name = picture_name(picture, number)
            image = open_picture(picture, name=name, draft_size=self.transform.draft_size, upright=self.upright)
            try:
                write_pixels(self.transform, image, out)
            except DataError as error:
                raise DataError(error, at=name) from error
            return name

        def batches() -> Iterator[tuple[None, AnyPixels]]:
            for names, pixels in decoded_batches(load, enumerate(source), self.room, batch_size, num_threads):
                waiting.append(names)
                yield None, pixels

        return self._pieces(batches(), start, wanted, waiting, _bar(_length(images), "picture", progress))

    def _pieces(
        self,
        batches: Iterable[tuple[None, AnyPixels]],
        start: Callable[[Any], Callable[[], Any]],
        wanted: RowType,
        waiting: deque[list[str]],
        bar: contextlib.AbstractContextManager[Advance],
    ) -> Iterator["NDArray[Any] | torch.Tensor"]:
        done = 0
        with bar as advance:
            try:
                for _, rows_BD in self._started(batches, start):
                    waiting.popleft()
                    done += len(rows_BD)
                    yield of_type(rows_BD, wanted)
                    advance(len(rows_BD))
            except NotFiniteError as error:
                raise NotFiniteError(
                    waiting[0][error.positions[0]], [done + position for position in error.positions]
                ) from error

    @overload
    def encode_texts(
        self,
        texts: Iterable[str],
        *,
        batch_size: int | None = ...,
        progress: bool = ...,
        output: Literal["torch"],
        dtype: object = ...,
    ) -> "torch.Tensor": ...

    @overload
    def encode_texts(
        self,
        texts: Iterable[str],
        *,
        batch_size: int | None = ...,
        progress: bool = ...,
        output: Literal["numpy"] = ...,
        dtype: object = ...,
    ) -> NDArray[Any]: ...

    def encode_texts(
        self,
        texts: Iterable[str],
        *,
        batch_size: int | None = None,
        progress: bool = False,
        output: Output = "numpy",
        dtype: object = "float32",
    ) -> "NDArray[Any] | torch.Tensor":
        """Unit rows (N, D) in the order given. Texts of like length are computed together.

        texts: as people write them; what a model needs (Chinese-CLIP: lower case, straight quotes) is done here. One
        text, or any iterable of them, which is never made a list: 8192 of them are in memory, 16384 on CUDA.
        batch_size: default 64, on a GPU 512. output, dtype: as of `encode_images`.
        Raises TypeError for what is no text, DataError for a picture given as a data URL, NotFiniteError naming a text
        that the model has no vector for, ConfigError for a setting.
        """
        kind, wanted = check_output(output), row_type(dtype)
        with _bar(_length(texts), "text", progress) as advance:
            windows = self._text_windows(texts, batch_size, advance, kind)
            return self._joined((of_type(rows, wanted) for rows in windows), kind, wanted)

    def encode_text_windows(
        self, texts: Iterable[str], *, batch_size: int | None = None, advance: Advance | None = None
    ) -> Iterator[Rows]:
        """The rows of `encode_texts` in consecutive pieces, for writing while computing.

        advance: called with the number of texts of each batch done.
        """
        return cast("Iterator[Rows]", self._text_windows(texts, batch_size, advance, "numpy"))

    def _text_windows(
        self, texts: Iterable[str], batch_size: int | None, advance: Advance | None, output: Output
    ) -> Iterator["Rows | torch.Tensor"]:
        size = _size(batch_size, self.facts.batch_sizes[1])
        source, start = _texts_of(texts), self._starts(output)[1]
        # Of the windows whose rows are not all there: their texts. Of the batches: which of their window.
        windows: deque[list[str]] = deque()
        waiting: deque[list[int]] = deque()

        def batches() -> Iterator[tuple[None, TokenIds]]:
            begin = 0
            while window := list(islice(source, SORTING_WINDOW)):
                _check_texts(window, begin)
                windows.append(window)
                for chosen, token_ids in sorted_batches(self.texts.rows(window), size, self.texts.pad):
                    waiting.append(chosen)
                    yield None, token_ids
                begin += len(window)

        return self._sorted_back(batches(), start, windows, waiting, advance or (lambda _: None))

    def _sorted_back(
        self,
        batches: Iterable[tuple[None, TokenIds]],
        start: Callable[[Any], Callable[[], Any]],
        windows: deque[list[str]],
        waiting: deque[list[int]],
        advance: Advance,
    ) -> Iterator["Rows | torch.Tensor"]:
        """The rows of each window in the order of its texts, once all are there."""
        begin, pieces, order = 0, list[Any](), list[int]()
        try:
            for _, rows_BD in self._started(batches, start):
                pieces.append(rows_BD)
                order += waiting.popleft()
                advance(len(rows_BD))
                if len(order) == len(windows[0]):
                    yield _in_order(pieces, order)
                    begin += len(windows.popleft())
                    pieces, order = [], []
        except NotFiniteError as error:
            wrong = sorted(waiting[0][position] for position in error.positions)
            text = windows[0][wrong[0]][:_SHOWN]
            positions = [begin + position for position in wrong]
            raise NotFiniteError(f"text {positions[0]} ({text!r})", positions) from error

    def _starts(self, output: Output) -> tuple[Callable[[Any], Callable[[], Any]], Callable[[Any], Callable[[], Any]]]:
        """What begins a batch of pixels, and of token ids, for rows of that kind."""
        if output == "numpy":
            return self.start_pixels, self.start_tokens
        import torch

        if self.facts.has_tensors:
            backend = cast("TensorBackend", self.backend)

            def cutting(start: Callable[[Any], Callable[[], "torch.Tensor"]]) -> Any:
                def begin(inputs: Any) -> Callable[[], torch.Tensor]:
                    rows_of = start(inputs)
                    return lambda: torch.nn.functional.normalize(rows_of()[:, : self.cut], dim=-1)

                return begin if self.cut else start

            return cutting(backend.start_pixel_tensors), cutting(backend.start_token_tensors)

        def as_tensors(start: Callable[[Any], Callable[[], Rows]]) -> Callable[[Any], Callable[[], "torch.Tensor"]]:
            def begin(inputs: Any) -> Callable[[], torch.Tensor]:
                rows_of = start(inputs)
                return lambda: torch.from_numpy(rows_of())

            return begin

        return as_tensors(self.start_pixels), as_tensors(self.start_tokens)

    def _started(
        self, batches: Iterable[tuple[T, InputsT]], start: Callable[[Any], Callable[[], Any]]
    ) -> Iterator[Any]:
        """(the same, rows) of batches that are not empty."""
        if self.facts.is_async:
            return rows_ahead(batches, start)
        return ((own, start(inputs)()) for own, inputs in batches)

    def _joined(
        self, pieces: "Iterable[NDArray[Any] | torch.Tensor]", output: Output, wanted: RowType
    ) -> "NDArray[Any] | torch.Tensor":
        """All rows, (0, D) of none, a tensor on the device."""
        if output == "numpy":
            return np.concatenate([np.empty((0, self.embed_dim), dtype=wanted), *cast("Iterable[Any]", pieces)])
        import torch

        device = self.device if self.facts.has_tensors else "cpu"
        none = torch.empty((0, self.embed_dim), dtype=getattr(torch, wanted), device=device)
        return torch.cat([none, *cast("Iterable[Any]", pieces)])

    # --- the model as files

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the model, whole or not at all, and returns its path.

        path: a folder, which Encoder, transformers and sentence-transformers open; or a file in `.safetensors` or
        `.pt`, the only forms that hold a ResNet. Of a model opened by name the weights are those of its file, whatever
        the backend and precision; of one in memory they are as they are now. Of another family the folder is copied.
        Raises DataError if something is there and `overwrite` is False, or holds other files; ConfigError for what
        cannot be saved so; CheckpointError when it cannot be written.
        """
        from cn_clip.clip.saving import save

        return save(self, path, overwrite=overwrite)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Saves the model as a folder in a repository of the Hugging Face hub, and returns the address of the commit.

        repo: "OWNER/NAME", or "NAME" for your own; made if need be. `Encoder(repo)` opens it. token: default, that of
        `hf auth login` or HF_TOKEN. revision: a branch, made if need be. Reads HF_ENDPOINT.
        Raises as `save`, and DownloadError when the hub does not take it.
        """
        from cn_clip.clip.saving import push

        return push(self, repo, private=private, message=message, token=token, revision=revision)

    # --- what is asked of rows

    @overload
    def similarity(self, first: ArraysGiven, second: ArraysGiven) -> Rows: ...

    @overload
    def similarity(self, first: RowsGiven, second: RowsGiven) -> "Rows | torch.Tensor": ...

    def similarity(self, first: RowsGiven, second: RowsGiven) -> "Rows | torch.Tensor":
        """Cosines (N, M), float32, of rows (N, D) with others (M, D); one row (D) is (1, D).

        Rows of any type: float32, float16, int8, lists. A tensor where one of them is, on its device; else an array.
        Raises DataError naming a row that is not finite or zero, and for rows of different dimensions.
        """
        return similarity(first, second)

    def top_k(self, queries: RowsGiven, gallery: RowsGiven, k: int = 10) -> "Matches":
        """The k rows of the gallery nearest to each query: indices int64 and cosines float32, (Q, min(k, N)).

        Exact: cosines fall along a row, equal ones keep the order of the gallery (see `retrieval.flat.top_k`, which
        computes on the model's device and holds a block of the gallery there). Rows as of `similarity`, on the host.
        For millions of rows build an index (`cn-clip index build`). Raises as `similarity`, and ConfigError for k.
        """
        from cn_clip.retrieval.flat import top_k

        if type(k) is not int:
            raise ConfigError(f"k: expected a whole number of at least 1, got {k!r}")
        device = self.device if self.device.startswith("cuda") else "cpu"
        return top_k(unit(queries, "queries"), unit(gallery, "gallery"), k, device=device)

    def class_rows(
        self,
        labels: Sequence[str],
        templates: Sequence[str] | str | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Rows:
        """Unit rows (C, D) of classes, float32: the mean of each label's texts, one for each template.

        templates: each with one {} for the label; default: the general ones of `cn-clip zeroshot`; "{}" for labels that
        are whole sentences. Raises DataError for no labels, two equal ones, or a template of another form.
        """
        return classifier(
            self, check_labels(labels), chosen_templates(templates), batch_size=batch_size, progress=progress
        )

    def classify(
        self,
        images: Pictures,
        labels: Sequence[str],
        *,
        templates: Sequence[str] | str | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        num_threads: int | None = None,
    ) -> Labelled:
        """What pictures show: the likeliest label of each, and probabilities (N, C), as `cn-clip zeroshot` has them.

        The softmax of the cosines to `class_rows`, times the model's logit scale (100 where it is not known). For many
        calls with the same labels keep `class_rows` and use `similarity`. Raises as `encode_images`, `class_rows`.
        """
        classes_CD = self.class_rows(labels, templates)
        rows_ND = self.encode_images(images, batch_size=batch_size, progress=progress, num_threads=num_threads)
        shares_NC = probabilities(rows_ND, classes_CD, scale=self.logit_scale or LOGIT_SCALE)
        return Labelled([labels[number] for number in shares_NC.argmax(axis=1).tolist()], shares_NC)


@dataclass(frozen=True)
class Opened:
    """What an Encoder was opened from: its name or path from the root on, the same as given, and all settings."""

    model: str
    given: str
    settings: dict[str, Any]


def _decided(model: "str | Path | CLIP", settings: Mapping[str, Any], min_cosine: float | None) -> Decision:
    """What "auto" takes for a name, a file, a model of another family or one in memory."""
    if isinstance(model, (str, Path)) and not is_foreign(model):
        others = {name: settings[name] for name in settings if name != "backend"}
        return decide(model, min_cosine=min_cosine, **others)
    if is_foreign(model):
        others = {name: settings[name] for name in ("precision", "device", "num_threads", "download_root")}
        return decide_family(str(model), min_cosine=min_cosine, **others)
    why = "PyTorch alone runs models in memory"
    return only_torch(settings["precision"], settings["device"], why, min_cosine=min_cosine)


def _opened_again(opened: Opened) -> Encoder:
    """An Encoder in another process, or from another folder."""
    encoder = Encoder(opened.model, **opened.settings)
    encoder.opened = opened
    return encoder


def _rows_from(first: int, start: Callable[[Any], Callable[[], Rows]], inputs: Any, size: int) -> Rows:
    """The rows of `size` inputs of a batch; an error counts its positions from the begin of the batch."""
    try:
        return start(inputs[first : first + size])()
    except NotFiniteError as error:
        raise NotFiniteError(error.what, [first + position for position in error.positions]) from error


def sorted_batches(
    rows: list[list[int]], batch_size: int, pad: Callable[[list[list[int]]], TokenIds]
) -> Iterator[tuple[list[int], TokenIds]]:
    """(positions in `rows`, their token ids (B, L) as `pad` makes them), rows of like length together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), _size(batch_size)):
        chosen = order[start : start + batch_size]
        yield chosen, pad([rows[index] for index in chosen])


def _in_order(pieces: list[Any], order: list[int]) -> Any:
    """The rows of batches in the order that their numbers say."""
    if isinstance(pieces[0], np.ndarray):
        output = np.empty((len(order), pieces[0].shape[1]), dtype=np.float32)
        output[order] = np.concatenate(pieces)
        return output
    import torch

    joined = torch.cat(pieces)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(order, device=joined.device), joined)


def _texts_of(texts: Iterable[str]) -> Iterator[str]:
    """The texts one by one, of one text itself; raises TypeError for what holds no texts in an order."""
    if isinstance(texts, str):
        return iter([texts])
    if isinstance(texts, (bytes, bytearray, Mapping, Set)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a str or several in an order, got {type(texts).__name__}")
    return iter(texts)


def _check_texts(texts: list[str], begin: int) -> None:
    for number, text in enumerate(texts, start=begin):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}]: expected a str, got {type(text).__name__} {text!r:.80}")
        if is_data_url(text):
            raise DataError(f"texts[{number}]: is a picture as a data URL, no text; give it to encode_images")


def _length(inputs: object) -> int | None:
    """How many inputs there are, for a progress bar; None if nobody knows before they have come."""
    if isinstance(inputs, (str, bytes)) or (is_array(inputs) and len(inputs.shape) <= 3):
        return 1
    return len(inputs) if isinstance(inputs, Sized) else None


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
def _bar(total: int | None, unit: str, visible: bool) -> Iterator[Advance]:
    what = both("编码图片", "encoding pictures") if unit == "picture" else both("编码文本", "encoding texts")
    unit = both("张", "pictures") if unit == "picture" else both("条", "texts")
    with bars.progress(total, unit, what, when=visible) as bar:
        yield bar.advance
