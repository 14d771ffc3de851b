"""Times PyTorch, ONNX and TensorRT: `python cn_clip/deploy/speed_benchmark.py --model-arch ViT-B-16 …`."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from cn_clip import command, drop_in, ranks, settings
from cn_clip.deploy.model_arch import RequiredArch, check_arch, open_arch, vision_name
from cn_clip.errors import ConfigError
from cn_clip.option_types import Json, OnnxImage, OnnxText
from cn_clip.settings import Range

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Backend, Kind, Pixels, TokenIds
    from cn_clip.clip.model import CLIP

# What Chinese-CLIP's test measures with; the picture is the one of examples/pokemon.jpeg.
PICTURE, TEXT = "🐢", "杰尼龟"

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options:
    """Times each model given: one picture, and one text, as often as a batch takes.

    Measured is what callers wait for: from an array in memory to unit rows in memory, also on CUDA.
    """

    model_arch: RequiredArch = None
    pytorch_ckpt: str | None = None
    """Checkpoint for PyTorch"""
    pytorch_precision: Literal["fp16", "fp32"] = "fp16"
    """Arithmetic of PyTorch"""
    onnx_image_model: OnnxImage = None
    onnx_text_model: OnnxText = None
    tensorrt_image_model: str | None = None
    """TensorRT engine of the picture tower"""
    tensorrt_text_model: str | None = None
    """TensorRT engine of the text tower"""
    batch_size: Annotated[int, Range(least=1)] = 1
    """Pictures or texts of a call"""
    n: Annotated[int, Range(least=1)] = 100
    """Timed calls"""
    warmup: Annotated[int, Range(least=0)] = 10
    """Calls before them"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is one. TensorRT wants cuda"""
    context_length: Annotated[int, Range(least=3)] = 52
    """Tokens that the text is padded to, [CLS] and [SEP] included"""
    json: Json = False

    def __post_init__(self) -> None:
        check_arch(self.model_arch)
        settings.check(self)
        files = {name: getattr(self, name) for name in EXPORTED}
        if not (self.pytorch_ckpt or any(files.values())):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in ("pytorch_ckpt", *EXPORTED))
            raise ConfigError(f"nothing to measure; give one or more of {flags}")
        for name, path in files.items():
            flag = f"--{name.replace('_', '-')}"
            if path and not Path(path).is_file():
                raise ConfigError(f"{flag}: {path} is no file; expected the exported model")
            if path and name.startswith("tensorrt") and self.device == "cpu":
                raise ConfigError(f"{flag}: TensorRT runs on NVIDIA GPUs alone; leave out --device cpu")


EXPORTED = ("onnx_image_model", "onnx_text_model", "tensorrt_image_model", "tensorrt_text_model")


class Subject(NamedTuple):
    """What is measured: its names in the log lines, where it lies, and what opens it."""

    name: str
    title: str
    place: str
    open: "Callable[[Options, Kind], tuple[Backend, str]]"


def run(options: Options) -> None:
    """Times what is given, pictures first; raises CnClipError when something cannot be opened."""
    say = command.Speaker(quiet=options.json)
    say.params(options)
    if options.device == "cuda":
        ranks.choose_device("cuda")  # says at once, and in one sentence, that there is none
    result: dict[str, dict[str, float]] = {}
    kinds: tuple[Kind, ...] = ("image", "text")
    for kind in kinds:
        say(f"Begin the {kind} feature extraction speed test...")
        for subject in _subjects(options, kind):
            result[f"{subject.name.lower()}_{kind}"] = _time(options, kind, subject, say)
    say("Done!")
    say.result({"batch_size": options.batch_size, "unit": "ms", **result})


def _subjects(options: Options, kind: "Kind") -> list[Subject]:
    onnx = getattr(options, f"onnx_{kind}_model")
    engine = getattr(options, f"tensorrt_{kind}_model")
    subjects = [
        Subject("Pytorch", "Pytorch model", options.pytorch_ckpt or "", _open_torch),
        Subject("ONNX", f"ONNX {kind} model", onnx or "", _open_onnx),
        Subject("TensorRT", f"TensorRT {kind} model", engine or "", _open_engine),
    ]
    return [subject for subject in subjects if subject.place]


def _time(options: Options, kind: "Kind", subject: Subject, say: command.Speaker) -> dict[str, float]:
    from cn_clip.clip.backends.base import facts_of
    from cn_clip.deploy.timing import call_seconds, summary, summary_line

    say(f"Prepare the {subject.title} from {subject.place}")
    with command.stdout_to_stderr(when=options.json):
        backend, place = subject.open(options, kind)
    _check_architecture(options, subject, facts_of(backend).architecture)
    say(f"Device: {place}")
    call = _call(options, kind, backend)
    say(f"Forward the {subject.name} {kind} model...")
    milliseconds = summary(call_seconds(call, repeats=options.n, warmup=options.warmup))
    say(summary_line(f"{subject.name} {kind} inference speed (batch-size: {options.batch_size}):", milliseconds))
    return milliseconds


def _check_architecture(options: Options, subject: Subject, found: str | None) -> None:
    """Raises ConfigError for an exported file that says it is of another architecture."""
    assert options.model_arch is not None
    vision = found.split("@")[0] if found else "?"
    if vision not in ("?", vision_name(options.model_arch)):
        raise ConfigError(
            f"--model-arch {options.model_arch}: {subject.place} is of {found}; give --model-arch as it was exported"
        )


def _call(options: Options, kind: "Kind", backend: "Backend") -> "Callable[[], object]":
    if kind == "image":
        pixels = _pixels(options)
        return lambda: backend.encode_pixels(pixels)
    token_ids = _token_ids(options)
    return lambda: backend.encode_tokens(token_ids)


def _pixels(options: Options) -> "Pixels":
    from cn_clip import emoji_pack, zoo
    from cn_clip.clip.pictures import open_picture
    from cn_clip.clip.transforms import ImageTransform

    assert options.model_arch is not None
    (picture,) = (one.picture for one in emoji_pack.load() if one.emoji == PICTURE)
    resolution = zoo.vision_config(vision_name(options.model_arch)).image_resolution
    return (
        ImageTransform(resolution).array(open_picture(picture, name=PICTURE))[None].repeat(options.batch_size, axis=0)
    )


def _token_ids(options: Options) -> "TokenIds":
    from cn_clip.clip import tokenizer

    return tokenizer.pad(tokenizer.encode([TEXT] * options.batch_size, options.context_length), options.context_length)


def _open_torch(options: Options, kind: "Kind") -> "tuple[Backend, str]":
    from cn_clip.clip.backends.pytorch import TorchBackend

    assert options.model_arch is not None
    device = ranks.choose_device(None if options.device == "auto" else options.device)
    model = open_arch(options.model_arch, options.pytorch_ckpt, flag="--pytorch-ckpt")
    return TorchBackend(model, device=device, precision=options.pytorch_precision), device.type


def _open_onnx(options: Options, kind: "Kind") -> "tuple[Backend, str]":
    from cn_clip.clip.backends.base import ExportedBackend
    from cn_clip.clip.backends.onnx_runtime import OnnxTower

    path = getattr(options, f"onnx_{kind}_model")
    tower = OnnxTower(path, kind, device=None if options.device == "auto" else options.device)
    return ExportedBackend(*((tower, None) if kind == "image" else (None, tower))), tower.provider


def _open_engine(options: Options, kind: "Kind") -> "tuple[Backend, str]":
    from cn_clip.clip.backends.tensor_rt import open_engines

    path = getattr(options, f"tensorrt_{kind}_model")
    return open_engines(*((path, None) if kind == "image" else (None, path))), "cuda"


# --- the names of Chinese-CLIP ----------------------------------------------------------------------------------------

onnx_execution_provider_map = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def prepare_pytorch_model(args: Namespace) -> "CLIP":
    """The model of `args.pytorch_ckpt` in eval mode, in `args.pytorch_precision`, on CUDA if `args.device` says so.

    Raises CheckpointError when it is not of `args.model_arch`.
    """
    from cn_clip.clip.model import convert_weights

    model = open_arch(args.model_arch, args.pytorch_ckpt, flag="--pytorch-ckpt")
    if args.pytorch_precision == "fp16":
        convert_weights(model)
    return model.to(ranks.choose_device(args.device))


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, required=("model_arch",), device="cuda")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
