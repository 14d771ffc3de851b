"""Builds TensorRT engines: `python cn_clip/deploy/onnx_to_tensorrt.py --model-arch ViT-B-16 --convert-vision …`.

ONNX Runtime's TensorRT provider builds them. Tested with a stand-in for its sessions, and not yet on a GPU.
"""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cn_clip import command, drop_in, settings
from cn_clip.clip.backends.names import Kind
from cn_clip.deploy.model_arch import TITLES, RequiredArch, check_arch, check_targets
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.option_types import ConvertText, ConvertVision, CudaDevice, Json, OnnxImage, OnnxText, OutputPrefix
from cn_clip.settings import Range

Form = Literal["fp32", "fp16"]

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options:
    """Writes PREFIX.txt.fp16.trt, PREFIX.img.fp16.trt and their fp32 forms from the files of pytorch_to_onnx.py.

    Engines run on the version of TensorRT and the kind of GPU they are built with. Sizes that are fixed in the ONNX
    file stay fixed. Needs onnxruntime-gpu; its TensorRT provider builds and runs them.
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
    """Refused unless empty: ONNX Runtime cannot keep single layers of a float16 engine in float32"""
    workspace_gib: float | None = None
    """GPU memory the builder may use, in GiB; default: all"""
    timing_cache: str | None = None
    """A folder that keeps measurements for later builds"""
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
        if self.fp16_banned_ops:
            raise ConfigError(
                "--fp16-banned-ops: ONNX Runtime builds the engine and cannot keep single layers in float32; leave it "
                "out, and use --fp32 if float16 loses too much"
            )
        settings.check(self)
        if self.max_batch_size is not None and self.max_batch_size < self.batch_size:
            raise ConfigError(f"--max-batch-size: expected at least {self.batch_size}, got {self.max_batch_size}")
        if self.workspace_gib is not None and not 0 < self.workspace_gib < float("inf"):
            raise ConfigError(f"--workspace-gib: expected a number above 0, got {self.workspace_gib}")

    @property
    def onnx_paths(self) -> dict[Kind, str | None]:
        """The ONNX files of the towers to convert."""
        return {"text": self.text_onnx_path, "image": self.vision_onnx_path}


def run(options: Options) -> None:
    """Builds what is asked for; raises CnClipError when an ONNX file or a setting does not fit, and without a GPU."""
    from cn_clip.clip.backends import tensor_rt

    prefix = options.save_tensorrt_path
    assert prefix is not None
    forms: dict[Form, bool] = {"fp32": options.fp32, "fp16": options.fp16}
    files = {kind: path for kind, path in options.onnx_paths.items() if path is not None}
    wanted = [(form, kind, files[kind]) for form in forms if forms[form] for kind in files]
    targets = {(kind, form): tensor_rt.engine_path(prefix, kind, form) for form, kind, _ in wanted}
    check_targets("--save-tensorrt-path", prefix, targets.values())
    say = command.Speaker(quiet=options.json)
    say.params(options)
    tensor_rt.device_of(options.device)
    if options.timing_cache is not None and not Path(options.timing_cache).is_dir():
        raise ConfigError(f"--timing-cache {options.timing_cache}: no such folder; create it first")
    built = []
    for form, kind, onnx_path in wanted:
        path = targets[kind, form]
        build = tensor_rt.Build(
            precision=form,
            batch=options.batch_size,
            max_batch=options.max_batch_size or options.batch_size,
            context_length=options.context_length,
            workspace_gib=options.workspace_gib,
            timing_cache=options.timing_cache,
            architecture=options.model_arch,
            command=command_line(options, tensor_rt.TOOL),
        )
        say.note(
            both(
                f"正在构建引擎，需要几分钟：{onnx_path} -> {path}",
                f"building the engine, this takes minutes: {onnx_path} -> {path}",
            )
        )
        engine = tensor_rt.build_engine(onnx_path, kind, path, build, device=options.device)
        say(f"  {engine}")
        built.append((kind, form, engine))
    say("Finished ONNX to TensorRT conversion...")
    for kind, form, engine in sorted(built, key=lambda one: one[0], reverse=True):
        say(f">>> The {TITLES[kind]} {form.upper()} TensorRT model is saved at {engine.path}")
    say.result({"engines": [{"kind": kind, "precision": form, **asdict(engine)} for kind, form, engine in built]})


def command_line(options: Options, tool: str) -> str:
    """The command `tool` with these options, for a shell."""
    words = tool.split()
    for field in fields(options):
        value: Any = getattr(options, field.name)
        if value == field.default or field.name == "json":
            continue
        words.append(settings.flag(field.name))
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
