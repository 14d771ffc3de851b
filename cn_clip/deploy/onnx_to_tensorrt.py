"""Builds TensorRT engines: `python cn_clip/deploy/onnx_to_tensorrt.py --model-arch ViT-B-16 --convert-vision …`.

Tested with a stand-in for the Python bindings of TensorRT, and not yet on a GPU.
"""

import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cn_clip import command, drop_in, settings
from cn_clip.deploy.model_arch import RequiredArch, check_arch
from cn_clip.deploy.prefixes import check_targets
from cn_clip.errors import ConfigError
from cn_clip.option_types import ConvertText, ConvertVision, CudaDevice, Json, OnnxImage, OnnxText, OutputPrefix
from cn_clip.settings import Range

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Kind
    from cn_clip.clip.backends.engines import Build, Built

Form = Literal["fp32", "fp16"]
# Of a tower: its name in flags and messages.
TITLES: "dict[Kind, str]" = {"text": "text", "image": "vision"}

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options:
    """Writes PREFIX.txt.fp16.trt, PREFIX.img.fp16.trt and their fp32 forms from the files of pytorch_to_onnx.py.

    Engines run on the version of TensorRT and the kind of GPU they are built with. Sizes that are fixed in the ONNX
    file stay fixed.
    """

    model_arch: RequiredArch = None
    convert_text: ConvertText = False
    text_onnx_path: OnnxText = None
    convert_vision: ConvertVision = False
    vision_onnx_path: OnnxImage = None
    batch_size: Annotated[int, Range(least=1)] = 1
    """Pictures or texts the engine is tuned for"""
    max_batch_size: int | None = None
    """The most pictures or texts of one call, the least being 1; default: --batch-size"""
    context_length: Annotated[int, Range(least=3)] = 52
    """The longest text in tokens, [CLS] and [SEP] included"""
    save_tensorrt_path: OutputPrefix = None
    fp16: bool = False
    """Write float16 engines; normalisations stay float32"""
    fp32: bool = False
    """Write float32 engines"""
    fp16_banned_ops: str = ""
    """Layers that stay float32 in float16 engines: parts of their names, separated by commas; up to TensorRT 10"""
    workspace_gib: float | None = None
    """GPU memory the builder may use, in GiB; default: all"""
    timing_cache: str | None = None
    """A file that keeps measurements for later builds"""
    device: CudaDevice = "cuda"
    json: Json = False

    ADDED = ("max_batch_size", "timing_cache")  # see `command.spelled_out`

    def __post_init__(self) -> None:
        check_arch(self.model_arch)
        if self.save_tensorrt_path is None:
            raise ConfigError("--save-tensorrt-path: expected the prefix of the engines to write, such as out/vit-b-16")
        if not (self.convert_text or self.convert_vision):
            raise ConfigError("give --convert-text, --convert-vision, or both")
        if not (self.fp16 or self.fp32):
            raise ConfigError("give --fp16, --fp32, or both")
        for name, wanted in (("text", self.convert_text), ("vision", self.convert_vision)):
            given = getattr(self, f"{name}_onnx_path")
            if wanted and given is None:
                raise ConfigError(f"--convert-{name}: give the ONNX file with --{name}-onnx-path")
            if given is not None and not wanted:
                raise ConfigError(f"--{name}-onnx-path: is for --convert-{name}, which was not given")
        if self.fp16_banned_ops and not self.fp16:
            raise ConfigError("--fp16-banned-ops: is for --fp16, which was not given")
        self._check_numbers()

    def _check_numbers(self) -> None:
        settings.check(self)
        if self.max_batch_size is not None and self.max_batch_size < self.batch_size:
            raise ConfigError(f"--max-batch-size: expected at least {self.batch_size}, got {self.max_batch_size}")
        if self.workspace_gib is not None and not 0 < self.workspace_gib < float("inf"):
            raise ConfigError(f"--workspace-gib: expected a number above 0, got {self.workspace_gib}")

    @property
    def onnx_paths(self) -> "dict[Kind, str | None]":
        """The ONNX files of the towers to convert."""
        return {"text": self.text_onnx_path, "image": self.vision_onnx_path}


def run(options: Options) -> None:
    """Builds what is asked for; raises CnClipError when an ONNX file or a setting does not fit, and without a GPU."""
    from cn_clip.clip.backends.tensor_rt import engine_path, find_gpu, library

    assert options.save_tensorrt_path is not None
    targets = [engine_path(options.save_tensorrt_path, kind, form) for form, kind, _ in _wanted(options)]
    check_targets("--save-tensorrt-path", options.save_tensorrt_path, targets)
    say = command.Speaker(quiet=options.json)
    say.params(options)
    library()
    find_gpu(options.device)
    built = [(kind, form, _build(options, kind, form, say)) for form, kind, _ in _wanted(options)]
    say("Finished ONNX to TensorRT conversion...")
    for kind, form, engine in sorted(built, key=lambda one: one[0], reverse=True):
        say(f">>> The {TITLES[kind]} {form.upper()} TensorRT model is saved at {engine.path}")
    say.result({"engines": [{"kind": kind, "precision": form, **asdict(engine)} for kind, form, engine in built]})


def _wanted(options: Options) -> "Iterator[tuple[Form, Kind, str]]":
    """Precision, tower and ONNX file of each engine to build."""
    forms: tuple[tuple[Form, bool], ...] = (("fp32", options.fp32), ("fp16", options.fp16))
    for form, is_wanted in forms:
        for kind, path in options.onnx_paths.items():
            if is_wanted and path is not None:
                yield form, kind, path


def _build(options: Options, kind: "Kind", form: Form, say: command.Speaker) -> "Built":
    from cn_clip.clip.backends.engines import build_engine
    from cn_clip.clip.backends.tensor_rt import engine_path

    onnx_path = options.onnx_paths[kind]
    assert onnx_path is not None
    assert options.save_tensorrt_path is not None
    path = engine_path(options.save_tensorrt_path, kind, form)
    say.note(f"正在构建，需要几分钟 / building, this takes minutes: {onnx_path} -> {path}")
    engine = build_engine(onnx_path, kind, path, _settings(options, form), device=options.device, say=say.note)
    size = f"{engine.num_bytes / 2**20:.1f} MiB, {engine.seconds:.0f} s, TensorRT {engine.tensorrt}, {engine.gpu}"
    say(f"  {size}" + (f", cosine to ONNX at least {engine.cosine:.6f}" if engine.cosine is not None else ""))
    return engine


def _settings(options: Options, form: Form) -> "Build":
    from cn_clip.clip.backends.engines import Build

    banned = options.fp16_banned_ops if form == "fp16" else ""
    return Build(
        precision=form,
        batch=options.batch_size,
        max_batch=options.max_batch_size or options.batch_size,
        context_length=options.context_length,
        kept_float=tuple(part for part in map(str.strip, banned.split(",")) if part),
        workspace_gib=options.workspace_gib,
        timing_cache=options.timing_cache,
        architecture=options.model_arch,
        command=command_line(options),
    )


def command_line(options: Options) -> str:
    """The command with these options, for a shell."""
    from cn_clip.clip.backends.tensor_rt import TOOL

    words = TOOL.split()
    for field in fields(options):
        value: Any = getattr(options, field.name)
        if value == field.default or field.name == "json":
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, required=("model_arch", "save_tensorrt_path"))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
