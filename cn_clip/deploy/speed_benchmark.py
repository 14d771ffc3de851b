"""Times PyTorch, ONNX and TensorRT: `python cn_clip/deploy/speed_benchmark.py --model-arch ViT-B-16 …`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cn_clip import command, drop_in, ranks, settings
from cn_clip.deploy.model_arch import RequiredArch, check_arch
from cn_clip.errors import ConfigError
from cn_clip.option_types import Json, OnnxImage, OnnxText
from cn_clip.settings import Range

if TYPE_CHECKING:
    from cn_clip.clip.backends.names import Kind

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
            flags = ", ".join(map(settings.flag, ("pytorch_ckpt", *EXPORTED)))
            raise ConfigError(f"nothing to measure; give one or more of {flags}")
        for name, path in files.items():
            flag = settings.flag(name)
            if path and not Path(path).is_file():
                raise ConfigError(f"{flag}: {path} is no file; expected the exported model")
            if path and name.startswith("tensorrt") and self.device == "cpu":
                raise ConfigError(f"{flag}: TensorRT runs on NVIDIA GPUs alone; leave out --device cpu")


EXPORTED = ("onnx_image_model", "onnx_text_model", "tensorrt_image_model", "tensorrt_text_model")


def run(options: Options) -> None:
    """Times what is given, pictures first; raises CnClipError when something cannot be opened."""
    from cn_clip.deploy import towers

    assert options.model_arch is not None
    say = command.Speaker(quiet=options.json)
    say.params(options)
    if options.device == "cuda":
        ranks.choose_device("cuda")  # says at once, and in one sentence, that there is none
    result: dict[str, dict[str, float]] = {}
    kinds: tuple[Kind, ...] = ("image", "text")
    for kind in kinds:
        say(f"Begin the {kind} feature extraction speed test...")
        for name, title, path in (
            ("Pytorch", "Pytorch model", options.pytorch_ckpt),
            ("ONNX", f"ONNX {kind} model", getattr(options, f"onnx_{kind}_model")),
            ("TensorRT", f"TensorRT {kind} model", getattr(options, f"tensorrt_{kind}_model")),
        ):
            if not path:
                continue
            say(f"Prepare the {title} from {path}")
            with command.stdout_to_stderr(when=options.json):
                backend, device = towers.open_subject(
                    name,
                    kind,
                    path,
                    arch=options.model_arch,
                    precision=options.pytorch_precision,
                    device=options.device,
                )
            say(f"Device: {device}")
            say(f"Forward the {name} {kind} model...")
            milliseconds = towers.time_tower(
                backend,
                kind,
                arch=options.model_arch,
                batch_size=options.batch_size,
                context_length=options.context_length,
                repeats=options.n,
                warmup=options.warmup,
            )
            title = f"{name} {kind} inference speed (batch-size: {options.batch_size}):"
            say(towers.summary_line(title, milliseconds))
            result[f"{name.lower()}_{kind}"] = milliseconds
    say("Done!")
    say.result({"batch_size": options.batch_size, "unit": "ms", **result})


# --- the names of Chinese-CLIP ----------------------------------------------------------------------------------------

onnx_execution_provider_map = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, required=("model_arch",), device="cuda")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
