"""Exported towers in ONNX Runtime's TensorRT provider, on NVIDIA GPUs: building engine files, keeping and opening them.

An engine file is an ONNX model of one node that holds the engine (an "EP context model"), so it opens without being
built again. It runs on the kind of GPU and the release of TensorRT that built it. Nothing here has run on a GPU yet: it
is written from the documentation of ONNX Runtime and tested with a stand-in for its sessions.
"""

# B batch, L tokens, D embedding

import contextlib
import importlib
import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cn_clip import zoo
from cn_clip.clip.backends import onnx_files, parity
from cn_clip.clip.backends.base import Pixels, TokenIds, TowerFacts
from cn_clip.clip.backends.names import Kind, Precision
from cn_clip.clip.backends.onnx_files import INPUTS, METADATA_KEY, MIDDLE
from cn_clip.clip.backends.onnx_runtime import PROVIDERS, OnnxTower, open_session
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    first_sentence,
    lacked_memory,
)
from cn_clip.extras import install_command, require
from cn_clip.files import HeldFolder
from cn_clip.language import both
from cn_clip.progress import working

TOOL = "python cn_clip/deploy/onnx_to_tensorrt.py"
# The metadata of an engine file that only engines have: versions, shapes, and the command that built it.
ENGINE_KEY = "cn_clip_engine"
# The shapes of engines in the cache: tuned for a batch of pictures or texts, good down to one.
CACHED_BATCH, CACHED_MAX_BATCH, CACHED_LENGTH = 32, 128, 52
SHORTEST_TEXT = 2
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
# Where the kind of the node of an EP context model is written: names before it, the engine behind it.
_HEAD = 1 << 16
Span = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Build:
    """How an engine is built.

    batch: what it is tuned for; max_batch: the largest it takes, the smallest being 1. context_length: longest text.
    workspace_gib: memory of the GPU that the builder may use; default all. timing_cache: a folder of measurements that
    make the next build faster. architecture: the name that the file must fit. command: how to build it again, for the
    sentence on engines of another machine.
    """

    precision: Literal["fp16", "fp32"]
    batch: int = 1
    max_batch: int = 1
    context_length: int = 52
    workspace_gib: float | None = None
    timing_cache: str | None = None
    architecture: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Built:
    """An engine that was written. cosine: the smallest to the rows of the ONNX file."""

    path: str
    onnxruntime: str
    tensorrt: str
    num_bytes: int
    seconds: float
    cosine: float

    def __str__(self) -> str:
        return (
            f"{self.num_bytes / 2**20:.1f} MiB, {self.seconds:.0f} s, ONNX Runtime {self.onnxruntime}, TensorRT "
            f"{self.tensorrt}, cosine to ONNX at least {self.cosine:.6f}"
        )


def engine_path(prefix: str | Path, kind: Kind, precision: str) -> Path:
    """`PREFIX.img.fp16.trt`: the engine of a tower."""
    return Path(f"{prefix}.{MIDDLE[kind]}.{precision}.trt")


def device_of(device: object) -> str:
    """The device in the words of `open_session`: `tensorrt`, or `tensorrt:1` of cuda:1.

    Raises ConfigError for a device that is not a GPU, MissingExtraError when the installed ONNX Runtime has no TensorRT
    provider.
    """
    name, _, number = ("cuda" if device in (None, "auto") else str(device)).partition(":")
    if name != "cuda" or not (number == "" or number.isdigit()):
        raise ConfigError(f"device: the tensorrt backend runs on cuda or cuda:N, got {str(device)!r}")
    runtime: Any = require("onnxruntime", extra="tensorrt", purpose="the tensorrt backend")
    if PROVIDERS["tensorrt"] not in runtime.get_available_providers():
        raise MissingExtraError(
            "the tensorrt backend needs the package `onnxruntime-gpu`: the ONNX Runtime that is installed has no "
            f"TensorRT provider; install it with: pip uninstall onnxruntime && {install_command('tensorrt')}"
        )
    # The provider is linked to libraries that pip puts where the system does not look; once loaded, they are found.
    with contextlib.redirect_stdout(io.StringIO()):
        for load in (lambda: importlib.import_module("tensorrt"), lambda: runtime.preload_dlls()):
            with contextlib.suppress(Exception):
                load()
    return f"tensorrt:{number}" if number else "tensorrt"


def versions() -> dict[str, str]:
    """The versions of ONNX Runtime and TensorRT; "?" for TensorRT that came without its Python package."""
    found = {"onnxruntime": "?", "tensorrt": "?"}
    for name in found:
        with contextlib.suppress(Exception):
            found[name] = str(importlib.import_module(name).__version__)
    return found


def open_engine(path: str | Path, *, device: object = None) -> Any:
    """The `onnxruntime.InferenceSession` of an engine file; device: cuda or cuda:N, default the first GPU.

    Raises what `device_of` raises, ConfigError when the provider cannot start, CheckpointError for a file that is not
    there, holds no engine, or holds one of another release of TensorRT or another kind of GPU.
    """
    where, path = device_of(device), Path(path)
    try:
        with path.open("rb") as stream:
            is_engine = b"EPContext" in stream.read(_HEAD)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror}); build the engine with {TOOL}", at=path) from error
    if not is_engine:
        what = what_it_is(path) or (
            "is not an engine for ONNX Runtime; raw TensorRT engines, which Chinese-CLIP and older versions of this "
            f"package write, cannot be opened: build it again from the ONNX file with {TOOL}"
        )
        raise CheckpointError(what, at=path)
    try:
        return open_session(path, where, otherwise="use the backend openvino or onnx on a processor")
    except CheckpointError as error:
        told: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # whatever is wrong with the file, the first error says it
            proto = onnx_files.load(path)
            told = json.loads(next(one.value for one in proto.metadata_props if one.key == ENGINE_KEY))
        if not told:
            raise
        there, here = (
            f"ONNX Runtime {one['onnxruntime']} and TensorRT {one['tensorrt']}" for one in (told, versions())
        )
        reason, again = str(error).removeprefix(f"{path}: "), told["command"] or f"{TOOL} --help"
        raise CheckpointError(
            f"{reason}; the engine was built with {there}, here is {here}, and engines run on the kind of GPU and the "
            f"TensorRT that built them; build it again: {again}",
            at=path,
        ) from error


def run_engine(path: str, session: Any, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs of an engine by name, in the processor's memory; inputs are cast to what it takes.

    Raises CheckpointError when TensorRT refuses the batch.
    """
    fed = {one.name: inputs[one.name].astype(TYPES[one.type], copy=False) for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, fed), strict=True))
    except Exception as error:  # its errors have no common type
        if lacked_memory(error):
            raise
        raise CheckpointError(f"TensorRT stopped ({first_sentence(error)}); its log may say more", at=path) from error


def shapes_of(session: Any) -> dict[str, list[list[int]]]:
    """The smallest, the usual and the largest shape of each input; nothing for engines of other programs."""
    text = session.get_modelmeta().custom_metadata_map.get(ENGINE_KEY)
    shapes: dict[str, list[list[int]]] = json.loads(text)["shapes"] if text else {}
    return shapes


class TensorRtTower(OnnxTower):
    """One engine file as a tower over numpy arrays."""

    def __init__(self, path: str | Path, kind: Kind, *, device: object = None) -> None:
        """Raises what `open_engine` raises; CheckpointError for an engine that is not a tower of this kind."""
        session = open_engine(path, device=device)
        self._take(path, kind, session)
        shapes = shapes_of(session).get(self._input)
        self._largest = self.facts.batch or (shapes[-1][0] if shapes else 1)

    def run(self, inputs: "Pixels | TokenIds") -> NDArray[np.floating]:
        """Batches larger than the engine takes are cut."""
        pieces = [inputs[start : start + self._largest] for start in range(0, len(inputs), self._largest)]
        rows = [run_engine(self.path, self._session, {self._input: piece})[self._output] for piece in pieces]
        return np.concatenate([np.empty((0, self.facts.embed_dim), dtype=np.float32), *rows])


def build_engine(onnx_path: str | Path, kind: Kind, path: Path, build: Build, *, device: object = None) -> Built:
    """Writes the engine of an ONNX file; sizes that are fixed in the file stay fixed. A failure writes nothing.

    Raises ConfigError for settings that the file cannot have; CheckpointError when the file is not a tower of this
    kind, when TensorRT cannot build it, or when the engine computes something else; what `device_of` raises.
    """
    started, base = time.monotonic(), Path(onnx_path)
    where = device_of(device)
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {path.parent} does not exist; create it first", at=path)
    tower = OnnxTower(base, kind, device="cpu")
    _check(base, tower.facts, build)
    span = _span(str(base), kind, tower.facts, build)
    expected = parity.reference(parity.backend_of(tower, kind), parity.embedded_samples(build.context_length), [kind])
    with HeldFolder(path.parent, f".{path.name}.") as scratch:
        dumped, made = scratch.path / "engine.onnx", scratch.path / path.name
        options = _options(build, dumped, tower.facts, span)
        with working(both(f"构建 TensorRT 引擎（{kind}）", f"building the TensorRT engine ({kind})")):
            session = open_session(base, where, options=options, otherwise="use another machine")
            # If shapes are free, the first batch builds the engine, and the end of the session may write it.
            run_engine(str(base), session, {INPUTS[kind]: np.ones(span[1])})
            del session
        if not dumped.is_file():
            raise CheckpointError(
                "ONNX Runtime wrote no engine of it; its log says which operations TensorRT does not take", at=base
            )
        _describe(dumped, made, tower.facts, span, build)
        cosine = _cosine(base, made, kind, build, expected, device)
        onnx_files.move(made, path.parent)
    size, seconds = path.stat().st_size, time.monotonic() - started
    return Built(str(path), **versions(), num_bytes=size, seconds=seconds, cosine=cosine)


def _check(path: Path, facts: TowerFacts, build: Build) -> None:
    """Raises ConfigError for a file that has no engine of this kind."""
    onnx: Any = require("onnx", extra="tensorrt", purpose="building TensorRT engines")
    weights = onnx_files.load(path, with_weights=False).graph.initializer
    if build.precision == "fp32" and any(one.data_type == onnx.TensorProto.FLOAT16 for one in weights):
        raise ConfigError("holds float16 weights; give the fp32 file for a float32 engine, or use --fp16", at=path)
    sizes = [file.stat().st_size for file in (path, *(path.parent / name for name in onnx_files.outside_files(path)))]
    if sum(sizes) > onnx_files.LARGEST_FILE:
        raise ConfigError(
            "holds more than 2 GiB, and an engine file cannot; export it with --precisions fp16 and give that file, "
            "with --fp16",
            at=path,
        )
    if build.architecture is None:
        return
    entry = zoo.named(build.architecture)
    dimensions = zoo.vision_config(entry.vision if entry else build.architecture).embed_dim
    if facts.embed_dim != dimensions:
        raise ConfigError(
            f"gives {facts.embed_dim} dimensions, {build.architecture} gives {dimensions}; "
            "is it the file of another model, or --model-arch that of another file?",
            at=path,
        )


def _span(path: str, kind: Kind, facts: TowerFacts, build: Build) -> Span:
    """The smallest, the usual and the largest shape of the input; raises ConfigError where the file has others."""
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


def _options(build: Build, dumped: Path, facts: TowerFacts, span: Span) -> dict[str, str]:
    """Options of ONNX Runtime's provider: https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.

    Shapes are given only if some size is free: the provider refuses those of an input that has one shape.
    """
    is_half = str(int(build.precision == "fp16"))
    options = {
        "trt_fp16_enable": is_half,
        "trt_layer_norm_fp32_fallback": is_half,
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(dumped),
        "trt_ep_context_embed_mode": "1",
    }
    if facts.batch is None or (facts.kind == "text" and facts.length is None):
        for which, shape in zip(("min", "opt", "max"), span, strict=True):
            options[f"trt_profile_{which}_shapes"] = f"{INPUTS[facts.kind]}:{'x'.join(map(str, shape))}"
    if build.workspace_gib is not None:
        options["trt_max_workspace_size"] = str(int(build.workspace_gib * 2**30))
    if build.timing_cache is not None:
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": build.timing_cache}
    return options


def _describe(dumped: Path, made: Path, facts: TowerFacts, span: Span, build: Build) -> None:
    """Writes the engine with its metadata: the facts of the tower, and what only engines have."""
    most = span[2]
    facts = replace(
        facts,
        precision=build.precision,
        architecture=facts.architecture or build.architecture,
        max_length=most[1] if facts.kind == "text" else None,
    )
    about = {"shapes": {INPUTS[facts.kind]: span}, **versions(), "command": build.command}
    proto = onnx_files.load(dumped)
    entries = {METADATA_KEY: onnx_files.metadata(facts), ENGINE_KEY: json.dumps(about)}
    onnx_files.set_metadata(proto, entries)
    onnx_files.save(proto, made)


def _cosine(base: Path, made: Path, kind: Kind, build: Build, expected: parity.Reference, device: object) -> float:
    """The smallest cosine of the rows of an engine to those of its file; raises CheckpointError if it is too small."""
    found_ND = parity.rows_of(TensorRtTower(made, kind, device=device), kind, expected)
    cosine = float((found_ND * expected.rows[kind]).sum(axis=1).min())
    if not cosine >= parity.TOLERANCES[build.precision]:  # also when it is NaN
        raise CheckpointError(
            f"its {build.precision} engine differs from it by more than it may: smallest cosine "
            f"{cosine:.6f}, tolerance {parity.TOLERANCES[build.precision]}; use fp32",
            at=base,
        )
    return cosine


def cached_path(base: Path, kind: Kind, precision: Precision, device: object) -> Path:
    """Where the engine of an ONNX file of the cache is kept: of one release of the libraries and one GPU here."""
    key = re.sub(r"[^\w.-]+", "", "-".join([*map("".join, versions().items()), device_of(device)]))
    return engine_path(base.with_name(f"model.{key}"), kind, precision)


def cached_build(precision: Literal["fp16", "fp32"]) -> Build:
    """How engines of the cache are built."""
    return Build(precision, batch=CACHED_BATCH, max_batch=CACHED_MAX_BATCH, context_length=CACHED_LENGTH)
