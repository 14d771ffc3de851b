"""Which model: the options that name one, how it is opened, and what tells its rows from those of others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeAlias

import tyro

from cn_clip import zoo
from cn_clip.clip.backends.base import KINDS, BackendName, Kind, check_precision
from cn_clip.clip.families.names import is_foreign
from cn_clip.clip.families.snapshots import files_of as foreign_files
from cn_clip.clip.transforms import Decode
from cn_clip.command import Speaker
from cn_clip.errors import ConfigError
from cn_clip.option_types import BackendDevice, DownloadRoot, NumThreads, PictureTower, TextTower

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Backend, ExportedBackend, Precision, Tower
    from cn_clip.clip.encoder import Encoder

EvalPrecision: TypeAlias = Literal["amp", "auto", "fp16", "fp32", "bf16", "int8"]
Model: TypeAlias = Annotated[
    str | None,
    tyro.conf.arg(
        help="Checkpoint: a file, a transformers folder, or the name of a published model; of other families hf:FOLDER "
        "or open_clip:ARCHITECTURE@FILE",
        help_behavior_hint="(required)",
        aliases=("--model",),
        metavar="MODEL",
    ),
]
Runner: TypeAlias = Annotated[
    BackendName,
    tyro.conf.arg(
        help="What runs the model; all but torch export it at first use, and keep the export in DOWNLOAD_ROOT/exported"
    ),
]
Arithmetic: TypeAlias = Annotated[
    EvalPrecision,
    tyro.conf.arg(
        help="Arithmetic; amp is float32 here, as in Chinese-CLIP. auto: the fastest close to it (cosine 0.999) that "
        "the device has. int8: onnx and openvino"
    ),
]
Decoding: TypeAlias = Annotated[
    Decode,
    tyro.conf.arg(
        help="fast: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where enough remains; the features differ a "
        "little. reference: grey of 16 bits is clipped to white, as by Chinese-CLIP, not scaled to 8 bits"
    ),
]
# What decides on the rows a tower gives, besides its inputs: values that JSON can hold.
Identity: TypeAlias = Callable[[Kind], Mapping[str, object]]


@dataclass(frozen=True)
class ModelSettings:
    """The options with which a command names a model and says how it is computed."""

    resume: Model = None
    vision_model: PictureTower = None
    text_model: TextTower = None
    precision: Arithmetic = "amp"
    backend: Runner = "torch"
    device: BackendDevice = "auto"
    num_threads: NumThreads = None
    download_root: DownloadRoot = None


class ModelOptions(Protocol):
    """What `open_encoder` is told: `ModelSettings`, how pictures are decoded, how long texts are."""

    @property
    def resume(self) -> str | None: ...
    @property
    def vision_model(self) -> str | None: ...
    @property
    def text_model(self) -> str | None: ...
    @property
    def backend(self) -> BackendName: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def num_threads(self) -> int | None: ...
    @property
    def decode(self) -> Decode: ...
    @property
    def download_root(self) -> str | None: ...


def check(options: ModelOptions) -> None:
    """Raises ConfigError for settings of which no model could be opened."""
    if options.resume is None:
        raise ConfigError("--resume: expected a checkpoint file, or a model's name such as ViT-B-16")
    if is_foreign(options.resume):
        _check_foreign(options)
    try:
        check_precision(options.backend, _plain(options.precision))
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
    if options.backend == "tensorrt" and options.num_threads is not None:
        raise ConfigError("--num-threads: the tensorrt backend computes on the GPU; leave it out")


def _check_foreign(options: ModelOptions) -> None:
    from cn_clip.clip.families.opening import check as check_name

    try:
        check_name(options.resume or "", options.backend)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
    if options.vision_model or options.text_model:
        raise ConfigError(f"{options.resume}: is of another family and says itself what its towers are; name no others")


def precision_of(options: ModelOptions) -> "Precision":
    """What is computed in: "amp" is "fp32", as in Chinese-CLIP's evaluation, "auto" what is the fastest here.

    Raises ConfigError for one that the backend, or this processor, does not have.
    """
    from cn_clip.clip.backends.opening import settle_precision

    try:
        return settle_precision(options.backend, _plain(options.precision), options.device)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


def _plain(precision: str) -> str:
    return "fp32" if precision == "amp" else precision


def open_encoder(options: ModelOptions, say: Speaker, *, kinds: Sequence[Kind] = KINDS) -> "Encoder":
    """The encoder that the settings ask for, of exported models only the towers wanted; raises as `open_backend`."""
    from cn_clip.clip.encoder import Encoder

    assert options.resume is not None
    if options.precision == "auto":
        say(f"精度 / precision: auto -> {precision_of(options)}")
    if is_foreign(options.resume):
        return _open_foreign(options, say)
    for kind, name in (("vision", options.vision_model), ("text", options.text_model)):
        if name:
            say(f"Loading {kind} model config from {zoo.config_path(name)}")
    opened = _open_torch(options, say, kinds) if options.backend == "torch" else _open_exported(options, say, kinds)
    return Encoder(opened, context_length=options.context_length, decode=options.decode)


def _open_foreign(options: ModelOptions, say: Speaker) -> "Encoder":
    from cn_clip.clip.encoder import Encoder

    assert options.resume is not None
    say(f"Begin to load model checkpoint from {options.resume}.")
    encoder = Encoder(
        options.resume,
        precision=precision_of(options),
        device=options.device,
        context_length=options.context_length,
        download_root=options.download_root,
        num_threads=options.num_threads,
        decode=options.decode,
    )
    say(f"=> opened '{options.resume}' (texts of at most {encoder.context_length} tokens)")
    return encoder


def _open_torch(options: ModelOptions, say: Speaker, kinds: Sequence[Kind]) -> "Backend":
    from cn_clip import ranks
    from cn_clip.clip.backends.pytorch import TorchBackend
    from cn_clip.clip.loading import open_model

    assert options.resume is not None
    say(f"Begin to load model checkpoint from {options.resume}.")
    device = ranks.choose_device(options.device)
    model, checkpoint = open_model(
        options.resume, vision=options.vision_model, text=options.text_model, download_root=options.download_root
    )
    if "text" in kinds:
        _check_length(options.resume, model.config.text.text_max_position_embeddings, options.context_length)
    say(f"=> loaded checkpoint '{options.resume}' (epoch {checkpoint.epoch} @ {checkpoint.step} steps)")
    return TorchBackend(model, device=device, precision=precision_of(options), num_threads=options.num_threads)


def _open_exported(options: ModelOptions, say: Speaker, kinds: Sequence[Kind]) -> "Backend":
    from cn_clip.clip.backends.base import ExportedBackend
    from cn_clip.clip.backends.opening import open_backend

    assert options.resume is not None
    opened = open_backend(
        options.resume,
        backend=options.backend,
        precision=precision_of(options),
        device=None if options.device == "auto" else options.device,
        vision=options.vision_model,
        text=options.text_model,
        download_root=options.download_root,
        num_threads=options.num_threads,
        kinds=kinds,
        say=say.note,
    )
    assert isinstance(opened, ExportedBackend)
    check_context_length(opened, options.context_length)
    say(f"=> opened '{options.resume}' ({options.backend}, {precision_of(options)})")
    return opened


def check_context_length(backend: "ExportedBackend", context_length: int) -> None:
    """Raises ConfigError when the text tower takes shorter texts alone, before any is computed."""
    if backend.text is None:
        return
    facts = backend.text.facts
    _check_length(backend.text.path, facts.length or facts.max_length, context_length)


def _check_length(place: str, longest: int | None, context_length: int) -> None:
    if longest is not None and context_length > longest:
        raise ConfigError(
            f"--context-length {context_length}: {place} takes texts of at most {longest} tokens; "
            f"use --context-length {longest}"
        )


def identity(options: ModelOptions, encoder: "Encoder") -> Identity:
    """What tells the rows of this model from those of others."""
    from cn_clip.clip.backends.base import ExportedBackend
    from cn_clip.clip.weights import hub

    settings = {
        "backend": options.backend,
        "precision": precision_of(options),
        "num_threads": options.num_threads,
        "vision_model": options.vision_model,
        "text_model": options.text_model,
    }
    backend = encoder.backend
    if isinstance(backend, ExportedBackend):
        of_towers = tower_identity(backend)
        return lambda kind: {**settings, **of_towers(kind)}
    if is_foreign(options.resume):
        files = foreign_files(options.resume or "", download_root=options.download_root)
        settings["name"] = options.resume
    else:
        files = hub.files_of(hub.weight_file(options.resume or "", download_root=options.download_root))
    facts = {**settings, "model": _files(files), "device": str(getattr(backend, "device", ""))}
    return lambda _: facts


def tower_identity(backend: "ExportedBackend") -> Identity:
    """The files of the towers, and where they are computed."""

    def of(kind: Kind) -> Mapping[str, object]:
        from cn_clip.clip.backends.onnx_files import extra_path

        tower: Tower | None = backend.image if kind == "image" else backend.text
        assert tower is not None, "the towers wanted are open"
        place = Path(tower.path)
        return {"model": _files([place, extra_path(place)]), "device": getattr(tower, "provider", "")}

    return of


def _files(paths: Sequence[Path]) -> list[list[object]]:
    found = [(path.resolve(), path.stat()) for path in paths if path.is_file()]
    return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]


def num_parameters(backend: "Backend") -> tuple[int, int]:
    """All parameters, and those of the picture tower; zeros where a backend does not know them."""
    total, visual = getattr(backend, "num_parameters", (0, 0))
    return total, visual
