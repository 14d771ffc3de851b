"""The models that the deployment commands convert and time: opening them, their ONNX files, and the speed test."""

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cn_clip import emoji_pack, ranks, zoo
from cn_clip.clip import tokenizer
from cn_clip.clip.backends import derived, export, onnx_files, parity
from cn_clip.clip.backends.base import Backend
from cn_clip.clip.backends.derived import check_packages as check_packages
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.backends.onnx_files import onnx_path as onnx_path
from cn_clip.clip.backends.opening import open_files
from cn_clip.clip.backends.parity import Reference, Report, Samples
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.loading import open_model
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.transforms import ImageTransform
from cn_clip.clip.weights.checkpoint import Checkpoint
from cn_clip.clip.weights.writing import write_checkpoint
from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, PairStore
from cn_clip.deploy.benchmark_utils import call_seconds, summary
from cn_clip.deploy.benchmark_utils import summary_line as summary_line
from cn_clip.deploy.model_arch import ArchName, vision_name
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import HeldFolder, written_together

# What Chinese-CLIP's test measures with; the picture is the one of examples/pokemon.jpeg.
PICTURE, TEXT = "🐢", "杰尼龟"
RANDOM_SEED = 0


def open_arch(
    arch: ArchName,
    checkpoint: str | None,
    *,
    flag: str,
    download_root: str | None = None,
    vision: str | None = None,
    text: str | None = None,
) -> CLIP:
    """The float32 model of a checkpoint, or else the published or bundled one of that name; on the CPU, in eval mode.

    flag: the one that gives the checkpoint, for messages. vision, text: towers other than those of the architecture.
    Raises ConfigError when no such model is published, CheckpointError when the checkpoint is of another architecture,
    DownloadError.
    """
    if checkpoint is None and zoo.named(arch) is None:
        raise ConfigError(f"--model-arch {arch}: there are no published weights of it; give {flag}")
    if checkpoint is None:
        return open_model(arch, vision=vision, text=text, download_root=download_root)[0]
    return open_model(checkpoint, vision=vision or vision_name(arch), text=text)[0]


def write_random(path: Path, vision: str, text: str) -> None:
    """Random weights, the same every time, in a file that stays, so that its exports can be used again."""
    if path.is_file():
        return
    torch.manual_seed(RANDOM_SEED)
    model = CLIP.from_config(zoo.model_config(vision, text))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, model.state_dict(), Checkpoint(path, {}))


def reference_rows(backend: Backend) -> Reference:
    """The embedded pictures and captions as inputs, and their rows by `backend`, in float32."""
    return parity.reference(backend, parity.embedded_samples())


# --- ONNX files


@dataclass(frozen=True)
class Written:
    """An ONNX file that was written; extra: the file of its outside weights."""

    kind: Kind
    path: Path
    extra: Path | None
    report: Report


def samples(check_data: str | None, context_length: int) -> Samples:
    """Pairs of a split folder, spread evenly, or else the embedded pictures; raises DataError for an empty one."""
    if check_data is None:
        return parity.embedded_samples(context_length)
    images, pairs = ImageStore(Path(check_data, IMAGES)), PairStore(Path(check_data, PAIRS))
    count = min(parity.NUM_SAMPLES, len(pairs))
    if count == 0:
        raise DataError("holds no pair; expected pictures with their captions", at=check_data)
    chosen = [pairs[number * len(pairs) // count] for number in range(count)]
    return Samples(
        [open_picture(images.picture(one.image_id), name=f"{images.folder}: {one.image_id!r}") for one in chosen],
        [one.text for one in chosen],
        context_length,
    )


def write_onnx(
    model: CLIP,
    prefix: Path,
    kinds: Sequence[Kind],
    forms: Sequence[str],
    compared_on: Samples,
    *,
    max_length: int,
    tolerance: float | None,
    merge_tokens: int = 0,
    say: Callable[[str], object],
) -> list[Written]:
    """Writes towers in several forms, all of them or nothing; `say` prints how close each is to PyTorch.

    merge_tokens: patches that the picture tower merges in each layer; PyTorch then does so too.
    Raises what `export.export_tower` and `derived.derive` raise.
    """
    whole = parity.reference(TorchBackend(model), compared_on)
    expected = export.merged_reference(model, whole, merge_tokens)
    limits: dict[str, Any] = {"max_length": max_length, "tolerance": tolerance, "whole": whole}
    with written_together(prefix) as folder, HeldFolder(prefix.parent, f".{prefix.name}.") as scratch:
        reports: list[tuple[Kind, Report]] = []
        for kind in kinds:
            base, *others = (onnx_path(scratch.path / prefix.name, kind, form) for form in ("fp32", *forms))
            exported = export.export_tower(model, kind, base, expected, **limits)
            for form, path in zip(forms, others, strict=True):
                is_base = form == "fp32"
                report = exported if is_base else derived.derive(base, kind, form, path, expected, tolerance=tolerance)
                say(str(report))
                reports.append((kind, report))
        moved = [onnx_files.move(report.path, folder) for _, report in reports]
        outside = {path.name for path in moved if onnx_files.extra_path(path).exists()}
    written = []
    for kind, report in reports:
        path = prefix.parent / report.path.name
        extra = onnx_files.extra_path(path)
        if path.name not in outside:
            extra.unlink(missing_ok=True)  # of an earlier file
        written.append(Written(kind, path, extra if path.name in outside else None, report))
    return written


def packing_small_onnx_files(onnx_path: str) -> None:
    """Puts the weights of an ONNX file, in it or in many files beside it, into one, FILE.extra_file.

    Chinese-CLIP's. Raises DataError when it cannot be written; then all is as it was.
    """
    path = Path(onnx_path)
    old = [path.parent / name for name in onnx_files.outside_files(path)]
    with written_together(path) as scratch:
        onnx_files.save(onnx_files.load(path), scratch / path.name, outside=True)
    for file in old:
        if file != onnx_files.extra_path(path):
            file.unlink(missing_ok=True)


# --- the speed test


def open_subject(
    name: str, kind: Kind, path: str, *, arch: ArchName, precision: Literal["fp16", "fp32"], device: str
) -> tuple[Backend, str]:
    """What is timed, and the device in its own words. name: "Pytorch", "ONNX" or "TensorRT".

    Raises CnClipError when it cannot be opened; ConfigError for an exported file that says it is of another
    architecture.
    """
    if name == "Pytorch":
        chosen = ranks.choose_device(None if device == "auto" else device)
        model = open_arch(arch, path, flag="--pytorch-ckpt")
        return TorchBackend(model, device=chosen, precision=precision), chosen.type
    paths = (path, None) if kind == "image" else (None, path)
    opened = (
        open_files("onnx", *paths, device=device) if name == "ONNX" else open_files("tensorrt", *paths, device="cuda")
    )
    tower = opened.image if kind == "image" else opened.text
    assert tower is not None
    found = tower.facts.architecture
    if found and found.split("@")[0] not in ("?", vision_name(arch)):
        raise ConfigError(f"--model-arch {arch}: {path} is of {found}; give --model-arch as it was exported")
    return opened, tower.provider if name == "ONNX" else "cuda"


def time_tower(
    backend: Backend, kind: Kind, *, arch: ArchName, batch_size: int, context_length: int, repeats: int, warmup: int
) -> dict[str, float]:
    """Milliseconds, as `summary` has them, of Chinese-CLIP's picture, or its text, as often as a batch takes."""
    call: Callable[[], object]
    if kind == "image":
        (picture,) = (one.picture for one in emoji_pack.load() if one.emoji == PICTURE)
        transform = ImageTransform(zoo.vision_config(vision_name(arch)).image_resolution)
        pixels = transform.array(open_picture(picture, name=PICTURE))[None].repeat(batch_size, axis=0)
        call = functools.partial(backend.encode_pixels, pixels)
    else:
        token_ids = tokenizer.pad(tokenizer.encode([TEXT] * batch_size, context_length), context_length)
        call = functools.partial(backend.encode_tokens, token_ids)
    return summary(call_seconds(call, repeats=repeats, warmup=warmup))


def prepare_pytorch_model(args: Namespace) -> CLIP:
    """The model of `args.pytorch_ckpt` in eval mode, in `args.pytorch_precision`, on CUDA if `args.device` says so.

    Raises CheckpointError when it is not of `args.model_arch`.
    """
    model = open_arch(args.model_arch, args.pytorch_ckpt, flag="--pytorch-ckpt")
    if args.pytorch_precision == "fp16":
        convert_weights(model)
    return model.to(ranks.choose_device(args.device))
