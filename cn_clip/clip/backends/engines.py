"""From ONNX files to TensorRT engines: building them, and the cache of engines beside that of ONNX files.

What float16 means: up to TensorRT 10 a float32 file is built with the flag FP16, under which TensorRT chooses, and the
layers that may leave the range of float16 are held to float32. TensorRT 11 has no such flag and computes in the types
of the file ("strongly typed"), so a float32 file is first made a float16 one. A float16 file is built that way since
TensorRT 10. float32 may be TF32 in products on GPUs that have it, as TensorRT does by default.

No engine has been built on a GPU with this yet: it is tested with a stand-in for the Python bindings.
"""

import glob
import importlib.util
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cn_clip import __version__, zoo
from cn_clip.clip.backends import parity, tensor_rt
from cn_clip.clip.backends.base import ExportedBackend, Kind, Precision, TowerFacts
from cn_clip.clip.backends.exported import Announce, Source, announce, forget, kept_file, tower_file
from cn_clip.clip.backends.onnx_files import METADATA_KEY, facts_of, load, missing_weights, save
from cn_clip.clip.backends.tensor_rt import (
    TOOL,
    Gpu,
    TensorRtTower,
    description_path,
    engine_path,
    library,
    make_log,
    open_engines,
    reasons,
    release,
    started,
)
from cn_clip.errors import CheckpointError, ConfigError, DataError, NotFiniteError
from cn_clip.extras import require
from cn_clip.files import HeldFolder, atomic_write, written_together

# The shapes of engines in the cache: tuned for a batch of pictures or texts, good down to one.
CACHED_BATCH, CACHED_MAX_BATCH, CACHED_LENGTH = 32, 128, 52
SHORTEST_TEXT = 2


@dataclass(frozen=True)
class Build:
    """How an engine is built.

    batch: what it is tuned for; max_batch: the largest it takes, the smallest being 1. context_length: longest text.
    kept_float: layers whose name has one of these in it stay float32 in a float16 engine. workspace_gib: memory of the
    GPU that the builder may use; default all. timing_cache: a file of measurements that makes the next build faster.
    command: how to build it again, for the sentence on engines of another machine.
    """

    precision: Literal["fp16", "fp32"]
    batch: int = 1
    max_batch: int = 1
    context_length: int = 52
    kept_float: tuple[str, ...] = ()
    workspace_gib: float | None = None
    timing_cache: str | None = None
    architecture: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Built:
    """An engine that was written. cosine: the smallest to the ONNX file's rows; None without ONNX Runtime to tell."""

    path: str
    tensorrt: str
    gpu: str
    num_bytes: int
    seconds: float
    cosine: float | None


Span = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def build_engine(
    onnx_path: str | Path, kind: Kind, path: Path, build: Build, *, device: str | None = None, say: Announce = announce
) -> Built:
    """Writes the engine of an ONNX file, a plain serialized engine, and its description beside it.

    Sizes that are fixed in the ONNX file stay fixed. Nothing is written when it fails.
    Raises ConfigError for settings that the file or TensorRT cannot have, and without a GPU; CheckpointError when the
    file is no tower of this kind, when TensorRT cannot build it, or when the engine computes something else than the
    file; MissingExtraError without `tensorrt` or `onnx`.
    """
    started = time.monotonic()
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {path.parent} does not exist; create it first", at=path)
    if build.timing_cache is not None:
        _read_timings(build.timing_cache)
    trt = library()
    gpu = tensor_rt.find_gpu(device)
    given = _OnnxFile(Path(onnx_path))
    by_flag = _check_precision(trt, given, build)
    with gpu.current(), written_together(path) as folder, HeldFolder(path.parent, f".{path.name}.") as scratch:
        making = _Making(trt, gpu, build, say)
        source = _typed_source(given, build, scratch.path, by_flag=by_flag)
        network = making.parsed(source, typed=not by_flag)
        facts, span = making.facts_and_span(network, kind, given)
        made = folder / path.name
        made.write_bytes(making.serialized(network, span, by_flag=by_flag))
        _describe(made, trt, gpu, facts, span, build)
        cosine = _check_rows(given.path, made, kind, build, gpu)
    return Built(str(path), trt.__version__, str(gpu), path.stat().st_size, time.monotonic() - started, cosine)


def _typed_source(given: "_OnnxFile", build: Build, scratch: Path, *, by_flag: bool) -> Path:
    """The file whose types are those to compute in: the given one, or a float16 copy of it."""
    if build.precision == "fp32" or given.is_half or by_flag:
        return given.path
    from cn_clip.clip.backends.half import halved

    copy = scratch / given.path.name
    save(halved(given.path), copy)
    return copy


def _check_rows(onnx_path: Path, made: Path, kind: Kind, build: Build, gpu: Gpu) -> float | None:
    """The smallest cosine between rows of the engine and of its file in ONNX Runtime, on embedded pictures or texts."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    expected = parity.file_reference({kind: onnx_path}, parity.embedded_samples(build.context_length))
    inputs, rows_ND = expected.inputs[kind], expected.rows[kind]
    try:
        if kind == "image":
            found_ND = open_engines(made, None, device=gpu.device).encode_pixels(inputs)
        else:
            found_ND = open_engines(None, made, device=gpu.device).encode_tokens(inputs)
        cosine = float((found_ND * rows_ND).sum(axis=1).min())
    except NotFiniteError:
        cosine = math.nan
    if not cosine >= parity.TOLERANCES[build.precision]:  # also when it is NaN
        raise CheckpointError(
            f"its {build.precision} engine differs from it by more than it may: smallest cosine "
            f"{cosine:.6f}, tolerance {parity.TOLERANCES[build.precision]}; use fp32, or keep layers in float32 with "
            "`cn-clip export tensorrt --fp16-banned-ops`",
            at=onnx_path,
        )
    return cosine


class _OnnxFile:
    """An ONNX file as far as TensorRT does not tell: metadata, and whether its weights are float16."""

    def __init__(self, path: Path) -> None:
        onnx: Any = require("onnx", extra="tensorrt", purpose="building TensorRT engines")
        self.path = path
        missing = missing_weights(path)
        if missing:
            raise CheckpointError(missing)
        proto = load(path, with_weights=False)
        self.metadata: str | None = {one.key: one.value for one in proto.metadata_props}.get(METADATA_KEY)
        half = onnx.TensorProto.FLOAT16
        self.is_half: bool = any(one.data_type == half for one in proto.graph.initializer)


def _check_precision(trt: Any, given: _OnnxFile, build: Build) -> bool:
    """Whether float16 comes from the builder's flag, not from the types in the file."""
    if build.precision == "fp32" and given.is_half:
        raise ConfigError(
            "holds float16 weights; give the fp32 file for a float32 engine, or use --fp16", at=given.path
        )
    by_flag = build.precision == "fp16" and hasattr(trt.BuilderFlag, "FP16") and (not given.is_half or _major(trt) < 10)
    if build.kept_float and not by_flag:
        why = "is float32" if build.precision == "fp32" else f"has the types of its file in TensorRT {trt.__version__}"
        raise ConfigError(
            f"--fp16-banned-ops: this engine {why}; leave it out, or use TensorRT 10 with --fp16 and an fp32 file"
        )
    return by_flag


class _Making:
    """The builder of one engine, and its log."""

    def __init__(self, trt: Any, gpu: Gpu, build: Build, say: Announce) -> None:
        self.trt, self.build, self.say = trt, build, say
        self.log = make_log(trt)
        self.builder = started(trt.Builder, self.log, gpu)

    def parsed(self, path: Path, *, typed: bool) -> Any:
        """The network of a file."""
        network = self.builder.create_network(_network_flags(self.trt, typed=typed))
        parser = self._parser = self.trt.OnnxParser(network, self.log)  # holds the weights of the network
        if not parser.parse_from_file(str(path)):
            errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
            told = "; ".join(" ".join(error.split())[:300] for error in errors[:5]) or reasons(self.log)
            raise CheckpointError(f"TensorRT {self.trt.__version__} cannot read it: {told}; export it again", at=path)
        return network

    def facts_and_span(self, network: Any, kind: Kind, given: _OnnxFile) -> tuple[TowerFacts, Span]:
        """What the tower takes and gives, and the shapes of its input: least, tuned for, most."""
        inputs = {one.name: _shape(one) for one in map(network.get_input, range(network.num_inputs))}
        outputs = {one.name: _shape(one) for one in map(network.get_output, range(network.num_outputs))}
        facts = facts_of(str(given.path), kind, inputs=inputs, outputs=outputs, metadata=given.metadata)
        _check_architecture(str(given.path), facts, self.build.architecture)
        span = _span(str(given.path), kind, facts, self.build)
        architecture = facts.architecture or self.build.architecture
        return replace(facts, precision=self.build.precision, architecture=architecture), span

    def serialized(self, network: Any, span: Span, *, by_flag: bool) -> Any:
        config = self._config(network, span)
        if by_flag:
            config.set_flag(self.trt.BuilderFlag.FP16)
            config.set_flag(self.trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            _keep_float(self.trt, network, self.build.kept_float)
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            raise CheckpointError(f"TensorRT {self.trt.__version__} cannot build the engine: {reasons(self.log)}")
        if self.build.timing_cache is not None:
            self._save_timings(config, self.build.timing_cache)
        return plan

    def _save_timings(self, config: Any, path: str) -> None:
        try:
            with atomic_write(path, "wb") as stream:
                stream.write(config.get_timing_cache().serialize())
        except DataError as error:
            self.say(f"未能保存计时 / the measurements are not kept: {error}")

    def _config(self, network: Any, span: Span) -> Any:
        config = self.builder.create_builder_config()
        if self.build.workspace_gib is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, int(self.build.workspace_gib * 2**30))
        if self.build.timing_cache is not None:
            self._use_timings(config, self.build.timing_cache)
        tensor = network.get_input(0)
        if None in _shape(tensor):
            profile = self.builder.create_optimization_profile()
            profile.set_shape(tensor.name, *span)
            if config.add_optimization_profile(profile) < 0:
                raise CheckpointError(f"TensorRT refuses the shapes {span} of {tensor.name}: {reasons(self.log)}")
        return config

    def _use_timings(self, config: Any, path: str) -> None:
        cache = config.create_timing_cache(_read_timings(path))
        if cache is not None and config.set_timing_cache(cache, False):
            return
        self.say(f"{path}: 来自别的环境，重新计时 / is of another GPU or TensorRT; measuring again")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _read_timings(path: str) -> bytes:
    """The content of a timing cache, empty for a new one; raises ConfigError where none can be kept."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        if Path(path).parent.is_dir():
            return b""
        raise ConfigError(f"--timing-cache {path}: the folder {Path(path).parent} does not exist") from error
    except OSError as error:
        raise ConfigError(f"--timing-cache {path}: cannot be read ({error.strerror}); name another file") from error


def _network_flags(trt: Any, *, typed: bool) -> int:
    """Flags of `create_network`. What EXPLICIT_BATCH asks for is all there is since 10, and STRONGLY_TYPED since 11."""
    known, flags = trt.NetworkDefinitionCreationFlag, 0
    if _major(trt) < 10:
        flags |= 1 << int(known.EXPLICIT_BATCH)
    elif _major(trt) == 10 and typed:
        flags |= 1 << int(known.STRONGLY_TYPED)
    return flags


def _check_architecture(path: str, facts: TowerFacts, name: str | None) -> None:
    if name is None:
        return
    entry = zoo.named(name)
    expected = zoo.vision_config(entry.vision if entry else name).embed_dim
    if facts.embed_dim != expected:
        raise ConfigError(
            f"gives {facts.embed_dim} dimensions, {name} gives {expected}; "
            "is it the file of another model, or --model-arch that of another file?",
            at=path,
        )


def _span(path: str, kind: Kind, facts: TowerFacts, build: Build) -> Span:
    if facts.batch is not None and (build.batch, build.max_batch) != (facts.batch, facts.batch):
        raise ConfigError(
            f"was exported for batches of {facts.batch}; use --batch-size {facts.batch}, or export it again", at=path
        )
    batches = (facts.batch or 1, build.batch, build.max_batch)
    if kind == "image":
        assert facts.resolution is not None, "facts_of refuses a picture tower of unknown size"
        side = facts.resolution
        least, tuned, most = ((batch, 3, side, side) for batch in batches)
        return least, tuned, most
    longest = build.context_length
    if facts.length is not None and longest != facts.length:
        raise ConfigError(
            f"was exported for texts of {facts.length} tokens; use --context-length {facts.length}, or export it again",
            at=path,
        )
    if facts.max_length is not None and longest > facts.max_length:
        raise ConfigError(f"--context-length: {path} takes at most {facts.max_length} tokens, got {longest}")
    return (batches[0], facts.length or SHORTEST_TEXT), (batches[1], longest), (batches[2], longest)


def _keep_float(trt: Any, network: Any, kept: Sequence[str]) -> None:
    """Holds layers to float32: normalisations, softmax, sums of powers, and those the user names.

    Only the results of powers, of sums and of named layers are kept in float32 too: others are in the range of float16.
    """
    for layer in map(network.get_layer, range(network.num_layers)):
        named = any(part in layer.name for part in kept)
        wide = layer.type == trt.LayerType.REDUCE or _is_power(trt, layer)
        if not (named or wide or layer.type in (trt.LayerType.NORMALIZATION, trt.LayerType.SOFTMAX)):
            continue
        results = range(layer.num_outputs)
        if any(layer.get_output(index).dtype != trt.DataType.FLOAT for index in results):
            continue  # shapes are computed in integers
        layer.precision = trt.DataType.FLOAT
        if named or wide:
            for index in results:
                layer.set_output_type(index, trt.DataType.FLOAT)


def _is_power(trt: Any, layer: Any) -> bool:
    if layer.type != trt.LayerType.ELEMENTWISE:
        return False
    layer.__class__ = trt.IElementWiseLayer  # the bindings give out the base class, which has no `op`
    return bool(layer.op == trt.ElementWiseOperation.POW)


def _describe(path: Path, trt: Any, gpu: Gpu, facts: TowerFacts, span: Span, build: Build) -> None:
    values = {
        "writer": f"cn_clip {__version__}",
        "tensorrt": trt.__version__,
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "shapes": dict(zip(("min", "opt", "max"), span, strict=True)),
        "command": build.command,
        "facts": asdict(facts),
    }
    description_path(path).write_text(json.dumps(values, indent=1), encoding="utf-8")


def _major(trt: Any) -> int:
    return int(trt.__version__.partition(".")[0])


def _shape(tensor: Any) -> tuple[int | None, ...]:
    return tuple(None if size < 0 else size for size in tensor.shape)


def open_towers(
    source: Source, precision: Precision, kinds: Sequence[Kind], *, device: str | None, say: Announce = announce
) -> ExportedBackend:
    """The engines of a prefix (`deploy/vit-b-16`), or of a name or weight file through the cache, built at first use.

    Raises what `TensorRtTower`, `tower_file` and `build_engine` raise.
    """
    towers = {kind: _open(source, kind, precision, device, say) for kind in kinds}
    return ExportedBackend(towers.get("image"), towers.get("text"), precision=precision)


def _open(source: Source, kind: Kind, precision: Precision, device: str | None, say: Announce) -> TensorRtTower:
    trt = library()
    gpu = tensor_rt.find_gpu(device)
    given = engine_path(source.model, kind, precision)
    if zoo.named(str(source.model)) is None and not Path(source.model).exists() and _is_prefix(source.model):
        if not given.is_file():
            raise CheckpointError(f"{given}: no such file; build it with {TOOL}")
        return TensorRtTower(given, kind, device=device)
    assert precision in ("fp16", "fp32"), "check_precision admits no other"
    form = "fp32" if hasattr(trt.BuilderFlag, "FP16") else precision
    onnx_path = tower_file(source, kind, form, say=say)
    path = onnx_path.with_name(_cached_name(kind, precision, trt, gpu))

    def built() -> Path:
        return kept_file(path, lambda: _build_cached(onnx_path, kind, path, precision, device, say))

    engine = built()
    try:
        return TensorRtTower(engine, kind, device=device)
    except CheckpointError as error:
        say(f"{error}; 重新构建 / building it again")
        forget(path)
    return TensorRtTower(built(), kind, device=device)


def _build_cached(
    onnx_path: Path, kind: Kind, path: Path, precision: Literal["fp16", "fp32"], device: str | None, say: Announce
) -> None:
    chinese, english = "首次使用，正在构建", "first use, building an engine"
    if path.exists():
        chinese, english = "正在重新构建", "building an engine again"
    say(f"{chinese} TensorRT 引擎，需要几分钟 / {english}, some minutes -> {path}")
    build = Build(precision, batch=CACHED_BATCH, max_batch=CACHED_MAX_BATCH, context_length=CACHED_LENGTH)
    build_engine(onnx_path, kind, path, build, device=device, say=say)


def _cached_name(kind: Kind, precision: str, trt: Any, gpu: Gpu) -> str:
    """Of one version of TensorRT and one GPU: no other can open the engine."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"trt{release(trt.__version__)} sm{gpu.capability} {gpu.name}")
    return engine_path(f"model.{key}", kind, precision).name


def _is_prefix(model: str | Path) -> bool:
    parent, name = Path(model).parent, glob.escape(Path(model).name)
    return parent.is_dir() and any([*parent.glob(f"{name}.*.trt"), *parent.glob(f"{name}.*.onnx")])
