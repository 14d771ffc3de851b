"""Which model: the options with which a command names one, and the value they become, which `clip.opening` opens."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

import tyro

from cn_clip.clip import merge_rules
from cn_clip.clip.backends.names import DEFAULT_CONTEXT_LENGTH, BackendChoice, check_cosine, check_precision
from cn_clip.clip.families import names
from cn_clip.clip.picture_names import Decode
from cn_clip.errors import ConfigError
from cn_clip.option_types import (
    BackendDevice,
    Dimensions,
    DownloadRoot,
    MergeTokens,
    NumThreads,
    PictureTower,
    StrictFp32,
    TextTower,
)

DEFAULT_MODEL = "ViT-B-16"
FORMS = (
    "a published name, a checkpoint file, a transformers folder, or the prefix of exported files; of other families "
    + names.FORMS
)

Model: TypeAlias = Annotated[str | None, tyro.conf.arg(help=f"Model: {FORMS}; default: {DEFAULT_MODEL}")]
ModelOfIndex: TypeAlias = Annotated[
    str | None, tyro.conf.arg(help=f"Model: {FORMS}; default: that of the index, else {DEFAULT_MODEL}")
]
Checkpoint: TypeAlias = Annotated[
    str | None,
    tyro.conf.arg(
        name="resume",
        aliases=("--model",),
        help=f"Model: {FORMS}",
        help_behavior_hint="(required)",
        metavar="MODEL",
    ),
]
Runner: TypeAlias = Annotated[
    BackendChoice,
    tyro.conf.arg(
        help="What runs the model; all but torch export it at first use, and keep that in DOWNLOAD_ROOT/exported. "
        "auto: the fastest here of those installed; with --precision auto also the fastest precision, int8 among them, "
        "that is close enough to float32 (--min-cosine)"
    ),
]
Arithmetic: TypeAlias = Annotated[
    Literal["amp", "auto", "fp16", "fp32", "bf16", "int8"],
    tyro.conf.arg(
        help="Arithmetic; amp is float32 here, as in Chinese-CLIP. auto: the fastest close to it (cosine 0.999) that "
        "the device has. int8: onnx and openvino"
    ),
]
Closeness: TypeAlias = Annotated[
    float | None,
    tyro.conf.arg(
        help="With --backend auto: the smallest cosine to float32 that a precision may have, as measured on this model "
        "and processor; default: 0.999 with --precision auto, else any"
    ),
]
RemoteCode: TypeAlias = Annotated[
    bool,
    tyro.conf.arg(
        help="Run the code that comes with a model of st:FOLDER; read it before. Without it none is run, and a model "
        "that needs it is refused"
    ),
]
Decoding: TypeAlias = Annotated[
    Decode,
    tyro.conf.arg(
        help="fast: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where enough remains; the features differ a "
        "little. auto: the same where more than enough remains (512 pixels, twice the model's side), so that they "
        "hardly differ. reference: grey of 16 bits is clipped to white, as by Chinese-CLIP, not scaled to 8 bits"
    ),
]
DecodingOfIndex: TypeAlias = Annotated[
    Decode | None,
    tyro.conf.arg(
        help="How JPEGs are decoded. exact: at full size; auto: at a fraction if 512 pixels and twice the model's side "
        "remain; fast: if the model's side remains. Default: as the index has it, else auto"
    ),
]


@dataclass(frozen=True)
class Choice:
    """A model, and how it is computed: all that decides on the rows it gives, besides its inputs.

    model: a name, file, folder or prefix, see `FORMS`. vision, text: its towers, for weights that leave them open.
    precision: "auto" is the fastest that the device has. device: "auto", "cpu", "cuda", "cuda:N" or "mps".
    decode: None is as the index at hand says. upright: pictures are turned by their EXIF orientation.
    context_length: longest text in tokens, special ones included. strict_fp32: no TF32 on CUDA.
    backend: "auto" is what `backends.choosing` takes; min_cosine: the bound that it keeps.
    merge_tokens: patches merged in each layer of a ViT; None is none, or as the index at hand says. dimensions: the
    first so many numbers of each vector; None is all, or as the index at hand says.
    trust_remote_code: the code that comes with a folder of st: is run.
    """

    model: str
    vision: str | None = None
    text: str | None = None
    backend: BackendChoice = "torch"
    precision: str = "fp32"
    device: str = "auto"
    num_threads: int | None = None
    download_root: str | None = None
    decode: Decode | None = "exact"
    upright: bool = False
    context_length: int = DEFAULT_CONTEXT_LENGTH
    strict_fp32: bool = False
    min_cosine: float | None = None
    merge_tokens: int | None = None
    trust_remote_code: bool = False
    dimensions: int | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether it is a model of another family."""
        return names.is_foreign(self.model)


@dataclass(frozen=True)
class ModelSettings:
    """The options with which a command names a model and says how it is computed; `chosen` is what they ask for."""

    model: Model = None
    backend: Runner = "torch"
    precision: Arithmetic = "fp32"
    min_cosine: Closeness = None
    strict_fp32: StrictFp32 = False
    device: BackendDevice = "auto"
    num_threads: NumThreads = None
    merge_tokens: MergeTokens = None
    dimensions: Dimensions = None
    download_root: DownloadRoot = None
    trust_remote_code: RemoteCode = False

    @property
    def chosen(self) -> Choice:
        """The model asked for. Commands that have more of its settings add them."""
        return Choice(
            self.model or DEFAULT_MODEL,
            backend=self.backend,
            precision="fp32" if self.precision == "amp" else self.precision,
            device=self.device,
            num_threads=self.num_threads,
            download_root=self.download_root,
            strict_fp32=self.strict_fp32,
            min_cosine=self.min_cosine,
            merge_tokens=self.merge_tokens,
            trust_remote_code=self.trust_remote_code,
            dimensions=self.dimensions,
        )


@dataclass(frozen=True)
class CheckpointSettings(ModelSettings):
    """The same under Chinese-CLIP's names: `--resume`, which must be given, and the towers beside it."""

    model: Checkpoint = None
    vision_model: PictureTower = None
    text_model: TextTower = None
    precision: Arithmetic = "amp"

    RENAMED = {"model": "resume"}  # noqa: RUF012  # see `command.print_params`

    @property
    def chosen(self) -> Choice:
        """The model asked for; raises ConfigError when none was given."""
        if self.model is None:
            raise ConfigError("--resume: expected a checkpoint file, or a model's name such as ViT-B-16")
        return replace(super().chosen, model=self.model, vision=self.vision_model, text=self.text_model)


def check(chosen: Choice) -> None:
    """Raises ConfigError, in terms of the options, for settings with which no model could be opened."""
    if chosen.is_foreign and chosen.merge_tokens:
        raise ConfigError(f"--merge-tokens: is for Chinese-CLIP, and {chosen.model} is of another family; leave it out")
    if chosen.is_foreign and (chosen.vision or chosen.text):
        raise ConfigError(f"{chosen.model}: is of another family and says itself what its towers are; name no others")
    try:
        if chosen.is_foreign:
            names.check(chosen.model, "torch" if chosen.backend == "auto" else chosen.backend)
        check_precision(chosen.backend, chosen.precision)
        if chosen.trust_remote_code:
            names.check_trust(chosen.model)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
    check_cosine(chosen.min_cosine, "--min-cosine")
    if chosen.min_cosine is not None and chosen.backend != "auto":
        raise ConfigError(f"--min-cosine and --backend {chosen.backend}: it is for --backend auto; leave one out")
    try:
        merge_rules.check_named(chosen.merge_tokens or 0, chosen.model, chosen.vision)
    except ConfigError as error:
        raise ConfigError(f"--merge-tokens{str(error).removeprefix('merge_tokens')}") from error
    if chosen.strict_fp32 and (chosen.backend, chosen.precision) != ("torch", "fp32"):
        other = f"--backend {chosen.backend}" if chosen.backend != "torch" else f"--precision {chosen.precision}"
        raise ConfigError(f"--strict-fp32 and {other}: it is for float32 in PyTorch; leave one out")
    if chosen.backend == "tensorrt" and chosen.num_threads is not None:
        raise ConfigError("--num-threads: the tensorrt backend computes on the GPU; leave it out")
