"""From a name or a file to a running backend: what `Encoder` and the commands call."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cn_clip import ranks
from cn_clip.clip import merge_rules
from cn_clip.clip.backends import onnx_runtime, open_vino, tensor_rt
from cn_clip.clip.backends.base import Backend, ExportedBackend, Tower
from cn_clip.clip.backends.exported import (
    Announce,
    Source,
    announce,
    files_of_prefix,
    forget,
    kept_file,
    tower_file,
    tower_files,
)
from cn_clip.clip.backends.names import (
    KINDS,
    BackendName,
    Kind,
    Precision,
    check_precision,
    check_threads,
    settled,
    torch_precisions,
)
from cn_clip.clip.backends.onnx_files import onnx_path
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.language import both, translated
from cn_clip.progress import working

if TYPE_CHECKING:
    import torch


def open_backend(
    model: str | Path,
    *,
    backend: BackendName = "torch",
    precision: str = "fp32",
    device: "str | torch.device | None" = None,
    vision: str | None = None,
    text: str | None = None,
    download_root: str | Path | None = None,
    num_threads: int | None = None,
    compile: bool = False,
    merge_tokens: int = 0,
    kinds: Sequence[Kind] = KINDS,
    say: Announce = announce,
) -> Backend:
    """The towers of a model, ready to run.

    model: a published or bundled name, a checkpoint, a transformers folder; for backends other than torch also the
    prefix of exported files (`deploy/vit-b-16` for `deploy/vit-b-16.img.fp32.onnx`). What is not exported yet is
    exported into the cache, `exported/` in `download_root`, and `say` prints a line.
    precision: "auto" takes the fastest that keeps a cosine of 0.999 to float32 and that the device has in hardware.
    vision, text: architecture names, for a checkpoint that leaves them open. kinds: the towers wanted.
    device: of torch, onnx and tensorrt; default, or "auto": CUDA where there is one. compile: torch only.
    merge_tokens: patches merged in each layer of a ViT; exported files by their prefix say themselves what they merge.
    Raises CnClipError: no such model, backend, precision or device, or a package that is not installed.
    """
    with working(both("打开模型", "opening the model")):
        merge_rules.check_named(merge_tokens, model, vision)
        return open_source(
            Source(model, vision, text, download_root, merge_tokens),
            backend=backend,
            precision=precision,
            device=device,
            num_threads=num_threads,
            compile=compile,
            kinds=kinds,
            say=say,
        )


def open_source(
    source: Source,
    *,
    backend: BackendName = "torch",
    precision: str = "fp32",
    device: "str | torch.device | None" = None,
    num_threads: int | None = None,
    compile: bool = False,
    kinds: Sequence[Kind] = KINDS,
    say: Announce = announce,
) -> Backend:
    """`open_backend` of weights of any family."""
    check_precision(backend, precision)
    check_threads(num_threads)
    source.check_model(backend)
    if compile and backend != "torch":
        raise ConfigError(f"compile: is for the torch backend; {backend} compiles by itself")
    if backend == "torch":
        return source.open_torch(device=device, precision=precision, num_threads=num_threads, compile=compile)
    merge_tokens = source.merge_tokens
    chosen = settle_precision(backend, precision, device)
    where = None if device is None else str(device)
    towers: Mapping[Kind, Tower]
    if backend == "tensorrt":
        if num_threads is not None:
            raise ConfigError("num_threads: is for processors; the tensorrt backend runs on a GPU")
        tensor_rt.device_of(where)
        towers = {kind: _open_engine(source, kind, chosen, where, say) for kind in kinds}
    else:
        towers = _open_onnx(
            source, kinds, backend=backend, precision=chosen, device=where, num_threads=num_threads, say=say
        )
    for tower in towers.values():
        _check_family(tower, source)
    if (image := towers.get("image")) is not None:
        _check_merging(image, merge_tokens)
    return ExportedBackend(towers.get("image"), towers.get("text"), backend=backend, precision=chosen)


def _check_family(tower: Tower, source: Source) -> None:
    """Raises ConfigError for a file of another family, whose pixels and token ids are not those of Chinese-CLIP."""
    if tower.facts.family != source.family:
        raise ConfigError(
            f"was exported from a model of the family {tower.facts.family}; open that model by its name, with "
            "backend=, and its file is found",
            at=tower.path,
        )


def _check_merging(image: Tower, merge_tokens: int) -> None:
    """Raises ConfigError for a file that merges another number of tokens than was asked for."""
    found = image.facts.merge_tokens or 0
    if merge_tokens not in (0, found):
        raise ConfigError(
            f"was exported with merge_tokens {found}, and {merge_tokens} was asked for; leave it out, or export the "
            "model again",
            at=image.path,
        )


def _open_onnx(
    source: Source,
    kinds: Sequence[Kind],
    *,
    backend: BackendName,
    precision: Precision,
    device: str | None,
    num_threads: int | None,
    say: Announce,
) -> Mapping[Kind, Tower]:
    """The towers in ONNX Runtime or OpenVINO."""
    files = ready_files(source, kinds, backend=backend, precision=precision, device=device, say=say)
    if backend == "openvino":
        vino = functools.partial(open_vino.OpenVinoTower, precision=precision, num_threads=num_threads)
        return {kind: vino(path, kind) for kind, path in files.items()}
    where = "cpu" if precision == "int8" else device
    tower = functools.partial(onnx_runtime.OnnxTower, device=where, num_threads=num_threads)
    return {kind: tower(path, kind) for kind, path in files.items()}


def ready_files(
    source: Source,
    kinds: Sequence[Kind],
    *,
    backend: BackendName,
    precision: Precision,
    device: str | None,
    say: Announce,
) -> dict[Kind, Path]:
    """The files that the onnx or the openvino backend opens, exported if they are not there.

    A device that the backend does not run on is refused before any export.
    """
    if backend == "openvino":
        if device not in (None, "auto", "cpu"):
            raise ConfigError(f"device: the openvino backend runs on cpu, got {device!r}")
        # OpenVINO rounds to bfloat16 while it computes.
        form = {"int8": "int8.openvino", "bf16": "fp32"}.get(precision, precision)
        return _onnx_files(source, kinds, form, say)
    if precision == "int8" and device not in (None, "auto", "cpu"):
        raise ConfigError(f"device: the onnx backend computes int8 on cpu, got {device!r}; use fp16 or cpu")
    onnx_runtime.check_device("cpu" if precision == "int8" else device)
    return _onnx_files(source, kinds, precision, say)


def _onnx_files(source: Source, kinds: Sequence[Kind], form: str, say: Announce) -> dict[Kind, Path]:
    """The files of a prefix, of one tower or of both as they were exported; else those of the cache."""
    names = files_of_prefix(source.model, "onnx")
    if not names and not source.merge_tokens:
        return tower_files(source, kinds, form, say=say)
    if not names:  # the text tower is the same whatever the picture tower merges
        sources = {kind: source if kind == "image" else replace(source, merge_tokens=0) for kind in kinds}
        return {kind: tower_file(one, kind, form, say=say) for kind, one in sources.items()}
    paths = {kind: onnx_path(source.model, kind, form) for kind in kinds}
    found = {kind: path for kind, path in paths.items() if path.is_file()}
    if not found:
        wanted = " or ".join(path.name for path in paths.values())
        raise CheckpointError(
            f"expected {wanted}, found {', '.join(names)}; "
            "choose another precision, or export this one with deploy/pytorch_to_onnx.py",
            at=source.model,
        )
    return found


def _open_engine(source: Source, kind: Kind, precision: Precision, device: str | None, say: Announce) -> Tower:
    """The engine of a prefix, or of a name or weight file through the cache, built at first use."""
    assert precision in ("fp16", "fp32"), "check_precision admits no other"
    if files_of_prefix(source.model, "trt", "onnx"):
        given = tensor_rt.engine_path(source.model, kind, precision)
        if not given.is_file():
            raise CheckpointError(f"no such file; build it with {tensor_rt.TOOL}", at=given)
        return tensor_rt.TensorRtTower(given, kind, device=device)
    base = _onnx_files(source, [kind], precision, say)[kind]
    path = tensor_rt.cached_path(base, kind, precision, device)

    def make() -> None:
        chinese, english = "首次使用，正在构建", "first use, building"
        if path.exists():
            chinese, english = "正在重新构建", "building again"
        say(
            both(
                f"{chinese} TensorRT 引擎，需要几分钟 -> {path}",
                f"{english} the TensorRT engine, this takes minutes -> {path}",
            )
        )
        tensor_rt.build_engine(base, kind, path, tensor_rt.cached_build(precision), device=device)

    engine = kept_file(path, make)
    try:
        return tensor_rt.TensorRtTower(engine, kind, device=device)
    except CheckpointError as error:
        say(both(f"{translated(str(error))}；重新构建", f"{error}; building it again"))
        forget(path)
    return tensor_rt.TensorRtTower(kept_file(path, make), kind, device=device)


def open_files(
    backend: Literal["onnx", "tensorrt"],
    image: str | Path | None,
    text: str | Path | None,
    *,
    device: str,
    num_threads: int | None = None,
) -> ExportedBackend:
    """Exported towers by the paths of their files, None for one that is not wanted; num_threads: of onnx only.

    Raises CnClipError: no such file, device or package, or a file of another kind.
    """
    tower: Callable[[str | Path, Kind], Tower]
    if backend == "tensorrt":
        tower = functools.partial(tensor_rt.TensorRtTower, device=device)
    else:
        tower = functools.partial(onnx_runtime.OnnxTower, device=device, num_threads=num_threads)
    return ExportedBackend(
        None if image is None else tower(image, "image"),
        None if text is None else tower(text, "text"),
        backend=backend,
    )


def settle_precision(backend: BackendName, precision: str, device: "str | torch.device | None" = None) -> Precision:
    """What will be computed in, before anything is loaded or exported.

    Raises ConfigError for a precision that the backend, or OpenVINO on this processor, does not have.
    """
    chosen = check_precision(backend, precision)
    if backend == "openvino":
        chosen = settled(backend, chosen, open_vino.native_precisions())
        open_vino.settings_for(open_vino.capabilities(), chosen)
        return chosen
    if chosen != "auto":
        return chosen
    if backend == "torch":
        return settled(backend, chosen, torch_precisions(ranks.choose_device(device)))
    if backend == "onnx":
        return settled(backend, chosen, onnx_runtime.native_precisions(str(device or "auto")))
    return settled(backend, chosen, ("fp16", "fp32"))
