"""The towers in PyTorch: Chinese-CLIP's, and those of other families."""

# B batch, R resolution, L tokens, D embedding

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cn_clip import ranks
from cn_clip.clip import merge_rules
from cn_clip.clip.backends.base import (
    USUAL_SIZES,
    USUAL_SIZES_ON_GPU,
    AnyPixels,
    Facts,
    PixelType,
    Rows,
    TokenIds,
    check_finite,
    checked_rows,
    unit_rows,
)
from cn_clip.clip.backends.names import Kind, check_threads, settled, torch_precisions
from cn_clip.clip.blocks import trimmed, write_block
from cn_clip.clip.loading import open_model
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.transfers import on_device
from cn_clip.clip.transforms import normalised
from cn_clip.clip.visual import ModifiedResNet, VisualTransformer
from cn_clip.clip.weights.file_formats import owned
from cn_clip.language import both
from cn_clip.processes import compute_alone_in_children
from cn_clip.progress import working

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend:
    """The towers in PyTorch. `model` itself is moved to `device` and put into `precision`.

    precision: "fp32", "bf16", "fp16", or "auto" for the fastest that the device multiplies in hardware.
    compile: `torch.compile` both towers; the first batches take minutes, and every later one is faster.
    num_threads: sets PyTorch's threads, for the whole process. merge_tokens: patches merged in each layer of a ViT.
    """

    def __init__(
        self,
        model: CLIP,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool = False,
        num_threads: int | None = None,
        merge_tokens: int = 0,
    ) -> None:
        merge_rules.check(merge_tokens, model.config.vision)
        self.device = ranks.choose_device(device)
        self.precision = settled("torch", precision, torch_precisions(self.device))
        check_threads(num_threads)
        ranks.use_threads(num_threads)
        model.float()
        if self.precision != "fp32":
            convert_weights(model, DTYPES[self.precision])
        self.model = model.to(self.device).eval()
        if isinstance(model.visual, VisualTransformer):
            model.visual.set_merging(merge_tokens)
        if self.device.type == "cuda" and isinstance(model.visual, ModifiedResNet):
            model.visual.use_channels_last()
        self.resolution = model.resolution
        self.embed_dim = model.config.vision.embed_dim
        total, visual = (sum(one.numel() for one in part.parameters()) for part in (model, model.visual))
        self.facts = Facts(
            backend="torch",
            precision=self.precision,
            device=str(self.device),
            batch_sizes=USUAL_SIZES_ON_GPU if self.device.type == "cuda" else USUAL_SIZES,
            max_length=model.config.text.text_max_position_embeddings,
            context_length=model.context_length,
            logit_scale=float(model.logit_scale.detach().exp()),
            num_parameters=(total, visual),
            merge_tokens=merge_tokens,
            matryoshka=model.matryoshka,
            pixels="uint8" if self.device.type == "cuda" else "float32",
            is_async=self.device.type == "cuda",
            has_tensors=True,
        )
        self._lane = _Lane(self.device)
        self.room = self._lane.room
        self._encode_image, self._encode_text = model.encode_image, model.encode_text
        if compile:
            self._encode_image = torch.compile(model.encode_image, dynamic=True)
            self._encode_text = torch.compile(model.encode_text, dynamic=True)

    def encode_pixels(self, pixels_B3RR: AnyPixels) -> Rows:
        """Normalised pixels, float32 (B, 3, R, R), or uint8 ones, to unit rows (B, D), float32."""
        return self.start_pixels(pixels_B3RR)()

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Token ids, int64 (B, L), padded with 0, to unit rows (B, D), float32."""
        return self.start_tokens(token_ids_BL)()

    def start_pixels(self, pixels_B3RR: AnyPixels) -> Callable[[], Rows]:
        """See `AsyncBackend`; of another device than CUDA, the rows are there at once."""
        # What is compiled sees one type of pixels.
        rows_of = self._lane.started(lambda pixels: _unit(self._encode_image(normalised(pixels))), pixels_B3RR)
        return lambda: checked_rows(rows_of())

    def start_tokens(self, token_ids_BL: TokenIds) -> Callable[[], Rows]:
        """See `AsyncBackend`."""
        padded = self.model.has_padding(token_ids_BL)
        rows_of = self._lane.started(lambda token_ids: _unit(self._encode_text(token_ids, padded=padded)), token_ids_BL)
        return lambda: checked_rows(rows_of())

    def start_pixel_tensors(self, pixels_B3RR: AnyPixels) -> Callable[[], Tensor]:
        """See `TensorBackend`."""
        return self._lane.kept(lambda pixels: _unit(self._encode_image(normalised(pixels))), pixels_B3RR)

    def start_token_tensors(self, token_ids_BL: TokenIds) -> Callable[[], Tensor]:
        """See `TensorBackend`."""
        padded = self.model.has_padding(token_ids_BL)
        return self._lane.kept(lambda token_ids: _unit(self._encode_text(token_ids, padded=padded)), token_ids_BL)


class _Lane:
    """The way to a device and back. On CUDA nothing is waited for but the rows, when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"

    def room(self, shape: tuple[int, ...], pixel_type: PixelType) -> AnyPixels:
        """See `AsyncBackend`; pinned memory is PyTorch's own, which gives it out again once its copies are done."""
        dtype = torch.uint8 if pixel_type == "uint8" else torch.float32
        pixels: AnyPixels = torch.empty(shape, dtype=dtype, pin_memory=self._is_cuda).numpy()
        return pixels

    @torch.inference_mode()
    def started(self, compute: Callable[[Tensor], Tensor], inputs: "AnyPixels | TokenIds") -> Callable[[], Rows]:
        """What waits for the float32 rows of `compute`."""
        host = torch.from_numpy(inputs)
        (moved,) = on_device([host], self._device)
        if not self._is_cuda:
            rows: Rows = compute(moved).cpu().numpy()
            return lambda: rows
        # The inputs are kept too: their memory is not for others before they are copied.
        kept = (compute(moved).to("cpu", non_blocking=True), host)
        done = self._recorded()

        def wait() -> Rows:
            done.synchronize()
            fetched: Rows = kept[0].numpy().copy()  # pinned memory is for what comes next
            return fetched

        return wait

    @torch.inference_mode()
    def kept(self, compute: Callable[[Tensor], Tensor], inputs: "AnyPixels | TokenIds") -> Callable[[], Tensor]:
        """What waits for the float32 rows of `compute`, which stay on the device; raises as `checked_rows`.

        Of the rows only a flag each comes to the host, whether they are finite.
        """
        host = torch.from_numpy(inputs)
        (moved,) = on_device([host], self._device)
        rows = compute(moved)
        is_finite = rows.isfinite().all(dim=1).to("cpu", non_blocking=self._is_cuda)
        if not self._is_cuda:
            check_finite(is_finite.numpy())
            return lambda: rows
        done, whole = self._recorded(), (rows, host)

        def wait() -> Tensor:
            done.synchronize()
            check_finite(is_finite.numpy())
            return whole[0]

        return wait

    def _recorded(self) -> torch.cuda.Event:
        """What is waited for until all that was started has been computed."""
        # Blocking: the threads that decode have the core meanwhile.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return done


def open_torch(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    vision: str | None = None,
    text: str | None = None,
    download_root: str | Path | None = None,
    num_threads: int | None = None,
    compile: bool = False,
    merge_tokens: int = 0,
    with_fingerprint: bool = False,
) -> TorchBackend:
    """The towers of a name, a checkpoint or a transformers folder; raises as `open_model`.

    with_fingerprint: `facts.weights` is known, for which all weights are read once more.
    """
    chosen = ranks.choose_device(device)
    loaded, checkpoint = open_model(model, vision=vision, text=text, download_root=download_root)
    # Of the weights as they are exported too, before they are rounded for a precision.
    with working(both("打开模型", "opening the model")):
        weights = loaded.fingerprint() if with_fingerprint else None
        backend = TorchBackend(
            loaded,
            device=chosen,
            precision=precision,
            compile=compile,
            num_threads=num_threads,
            merge_tokens=merge_tokens,
        )
    backend.facts = replace(backend.facts, weights=weights, epoch=checkpoint.epoch, step=checkpoint.step)
    return backend


def sharing(
    model: object,
    *,
    device: str | torch.device,
    precision: str,
    num_threads: int | None,
    compile: bool,
    merge_tokens: int,
) -> TorchBackend:
    """A backend over the weights of a loaded model, whose mode, types and device stay as they are.

    Raises TypeError for what is no `CLIP`.
    """
    if not isinstance(model, CLIP):
        raise TypeError(f"model: expected a name, a path, a CLIP or a Backend, got {type(model).__name__}")
    memo: dict[int, Any] = {id(one): torch.nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
    memo |= {id(one): one.detach() for one in model.buffers()}
    copied, chosen = copy.deepcopy(model, memo), ranks.choose_device(device)
    sizes: dict[str, Any] = {"num_threads": num_threads, "compile": compile, "merge_tokens": merge_tokens}
    return TorchBackend(copied, device=chosen, precision=precision, **sizes)


class ForeignTowers:
    """A model that is moved to `device` and put into `precision` itself.

    encode_image: pixels of a `shape` as a picture transform makes them, float32 (B, …), to features (B, D).
    encode_text: int64 token ids (B, L) to features (B, D). resolution: the side of a picture, of about as many pixels
    where they differ. visual_parts: beginnings of the names of the picture tower's parameters.
    logit_scale: the factor on cosines. num_threads: sets PyTorch's threads, for the whole process.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        resolution: int,
        shape: tuple[int, ...],
        logit_scale: float | None,
        visual_parts: tuple[str, ...],
        device: torch.device,
        precision: str = "fp32",
        num_threads: int | None = None,
    ) -> None:
        compute_alone_in_children()
        self.precision = settled("torch", precision, torch_precisions(device))
        check_threads(num_threads)
        ranks.use_threads(num_threads)
        self.device = device
        self.model = model.to(device=device, dtype=DTYPES[self.precision]).eval()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in owned(tensors).items():  # transformers leaves them in the mapped file
            tensors[name].data = value
        self.resolution, self.shape = resolution, shape
        sizes = {name: one.numel() for name, one in model.named_parameters()}
        visual = sum(size for name, size in sizes.items() if name.startswith(visual_parts))
        self.facts = Facts(
            backend="torch",
            precision=self.precision,
            device=str(device),
            batch_sizes=USUAL_SIZES_ON_GPU if device.type == "cuda" else USUAL_SIZES,
            logit_scale=logit_scale,
            num_parameters=(sum(sizes.values()), visual),
            is_async=device.type == "cuda",
            has_tensors=True,
        )
        self._lane = _Lane(device)
        self.room = self._lane.room
        self._encode_image, self._encode_text = encode_image, encode_text
        # Each family keeps the width of its rows under another name.
        sample = np.zeros((1, *shape), np.float32)
        if len(shape) == 2:
            write_block(sample[0, 1:], (1, 1), sample[0])
        self.embed_dim = self.encode_pixels(sample).shape[1]

    def module(self, kind: Kind) -> nn.Module:
        """One tower as a module of one input, for export."""
        return _OneInput(self.model, self._encode_image if kind == "image" else self._encode_text)

    def encode_pixels(self, pixels_B3RR: AnyPixels) -> Rows:
        """Pixels of the shape that the picture transform makes, float32 (B, …), to unit rows (B, D), float32."""
        return self.start_pixels(pixels_B3RR)()

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Token ids, int64 (B, L), to unit rows (B, D), float32."""
        return self.start_tokens(token_ids_BL)()

    def start_pixels(self, pixels_B3RR: AnyPixels) -> Callable[[], Rows]:
        """See `AsyncBackend`."""
        features_of = self._lane.started(lambda pixels: self._encode_image(pixels).float(), trimmed(pixels_B3RR))
        return lambda: unit_rows(features_of())

    def start_tokens(self, token_ids_BL: TokenIds) -> Callable[[], Rows]:
        """See `AsyncBackend`."""
        features_of = self._lane.started(lambda token_ids: self._encode_text(token_ids).float(), token_ids_BL)
        return lambda: unit_rows(features_of())

    def start_pixel_tensors(self, pixels_B3RR: AnyPixels) -> Callable[[], Tensor]:
        """See `TensorBackend`."""
        return self._lane.kept(lambda pixels: _unit(self._encode_image(pixels)), trimmed(pixels_B3RR))

    def start_token_tensors(self, token_ids_BL: TokenIds) -> Callable[[], Tensor]:
        """See `TensorBackend`."""
        return self._lane.kept(lambda token_ids: _unit(self._encode_text(token_ids)), token_ids_BL)


class _OneInput(nn.Module):
    """What a model computes of one input, as the exporter takes it."""

    def __init__(self, model: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._encode = model, encode

    def forward(self, given: Tensor) -> Tensor:
        return self._encode(given)


def _unit(features_BD: Tensor) -> Tensor:
    features_BD = features_BD.float()
    lengths_B1 = features_BD.norm(dim=-1, keepdim=True)
    # A length that overflows would make a row of zeros, which looks like an answer.
    rows_BD: Tensor = (features_BD / lengths_B1).masked_fill(lengths_B1.isinf(), float("nan"))
    return rows_BD
