"""From a name or a file to a running backend: what `Encoder` and the commands call."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from cn_clip import ranks, zoo
from cn_clip.clip.backends.base import (
    KINDS,
    Backend,
    BackendName,
    ExportedBackend,
    Kind,
    Precision,
    Tower,
    check_precision,
    check_threads,
    settled,
)
from cn_clip.clip.backends.exported import Announce, Source, announce, tower_files
from cn_clip.clip.backends.onnx_files import onnx_path
from cn_clip.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

OpenTower: TypeAlias = Callable[[Path, Kind], Tower]


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
    kinds: Sequence[Kind] = KINDS,
    say: Announce = announce,
) -> Backend:
    """The towers of a model, ready to run.

    model: a published or bundled name, a checkpoint, a transformers folder; for backends other than torch also the
    prefix of exported files (`deploy/vit-b-16` for `deploy/vit-b-16.img.fp32.onnx`). What is not exported yet is
    exported into the cache, `exported/` in `download_root`, and `say` is told.
    precision: "auto" takes the fastest that keeps a cosine of 0.999 to float32 and that the device has in hardware.
    vision, text: architecture names, for a checkpoint that leaves them open. kinds: the towers wanted.
    device: of torch, onnx and tensorrt; default, or "auto": CUDA where there is one. compile: torch alone.
    Raises CnClipError: no such model, backend, precision or device, or a package that is not installed.
    """
    check_precision(backend, precision)
    check_threads(num_threads)
    _check_model(model, backend)
    if compile and backend != "torch":
        raise ConfigError(f"compile: is for the torch backend; {backend} compiles by itself")
    if backend == "torch":
        from cn_clip.clip.backends.pytorch import open_torch

        return open_torch(
            model,
            device=device,
            precision=precision,
            vision=vision,
            text=text,
            download_root=download_root,
            num_threads=num_threads,
            compile=compile,
        )
    chosen = settle_precision(backend, precision, device)
    source = Source(model, vision, text, download_root)
    if backend == "tensorrt":
        from cn_clip.clip.backends.tensor_rt import open_towers

        if num_threads is not None:
            raise ConfigError("num_threads: is for processors; the tensorrt backend runs on a GPU")
        return open_towers(source, chosen, kinds, device=device, say=say)
    open_tower = tower_opener(backend, chosen, None if device is None else str(device), num_threads)
    form = "int8.openvino" if (backend, chosen) == ("openvino", "int8") else chosen
    if backend == "openvino" and chosen == "bf16":
        form = "fp32"  # OpenVINO rounds while it computes
    towers = _open_all(source, kinds, form, open_tower, say)
    return ExportedBackend(towers.get("image"), towers.get("text"), precision=chosen)


def open_files(
    backend: Literal["onnx", "tensorrt"], image: str | None, text: str | None, *, device: str, num_threads: int | None
) -> ExportedBackend:
    """Exported towers by the paths of their files, None for one that is not wanted; num_threads: of onnx alone.

    Raises CnClipError: no such file, device or package, or a file of another kind.
    """
    if backend == "tensorrt":
        from cn_clip.clip.backends.tensor_rt import open_engines

        return open_engines(image, text, device=device)
    from cn_clip.clip.backends.onnx_runtime import OnnxTower

    return ExportedBackend(
        None if image is None else OnnxTower(image, "image", device=device, num_threads=num_threads),
        None if text is None else OnnxTower(text, "text", device=device, num_threads=num_threads),
    )


def settle_precision(backend: BackendName, precision: str, device: "str | torch.device | None" = None) -> Precision:
    """What will be computed in, before anything is loaded or exported.

    Raises ConfigError for a precision that the backend, or OpenVINO on this processor, does not have.
    """
    chosen = check_precision(backend, precision)
    if backend == "openvino":
        from cn_clip.clip.backends import open_vino

        chosen = settled(backend, chosen, open_vino.native_precisions())
        open_vino.settings_for(open_vino.capabilities(), chosen)
        return chosen
    if chosen != "auto":
        return chosen
    if backend == "torch":
        from cn_clip.clip.backends.pytorch import native_precisions

        return settled(backend, chosen, native_precisions(ranks.choose_device(device)))
    if backend == "onnx":
        from cn_clip.clip.backends import onnx_runtime

        return settled(backend, chosen, onnx_runtime.native_precisions(str(device or "auto")))
    return settled(backend, chosen, ("fp16", "fp32"))


def tower_opener(backend: BackendName, precision: Precision, device: str | None, num_threads: int | None) -> OpenTower:
    """What opens an exported file in a backend; raises ConfigError for a device it does not run on."""
    if backend == "openvino":
        if device not in (None, "auto", "cpu"):
            raise ConfigError(f"device: the openvino backend runs on cpu, got {device!r}")

        def open_vino(path: Path, kind: Kind) -> Tower:
            from cn_clip.clip.backends.open_vino import OpenVinoTower

            return OpenVinoTower(path, kind, precision=precision, num_threads=num_threads)

        return open_vino

    from cn_clip.clip.backends.onnx_runtime import OnnxTower, check_device

    if precision == "int8":
        if device not in (None, "auto", "cpu"):
            raise ConfigError(f"device: the onnx backend computes int8 on cpu, got {device!r}; use fp16 or cpu")
        device = "cpu"
    check_device(device)

    def open_onnx(path: Path, kind: Kind) -> Tower:
        return OnnxTower(path, kind, device=device, num_threads=num_threads)

    return open_onnx


def _check_model(model: str | Path, backend: BackendName) -> None:
    """Raises ConfigError for what can be told from the name alone to be no model of this backend."""
    if not str(model):
        raise ConfigError("model: expected a name or a path, got ''")
    others = 'use backend="onnx" or backend="openvino"'
    path = Path(model)
    if path.suffix == ".onnx" and os.path.isfile(path):
        named = re.fullmatch(r"(.+)\.(?:img|txt)\.[a-z0-9.]+\.onnx", path.name)
        prefix = path.with_name(named[1]) if named else "of files named PREFIX.img.fp32.onnx and PREFIX.txt.fp32.onnx"
        more = f", and {others}" if backend == "torch" else ""
        raise ConfigError(f"{model}: is one exported tower; give the prefix {prefix}{more}")
    if backend == "torch" and _is_prefix(model):
        raise ConfigError(f"{model}: is the prefix of exported files; {others}")


def _open_all(
    source: Source, kinds: Sequence[Kind], form: str, open_tower: OpenTower, say: Announce
) -> dict[Kind, Tower]:
    if _is_prefix(source.model):
        return {kind: open_tower(path, kind) for kind, path in _given_files(source.model, kinds, form).items()}
    return {kind: open_tower(path, kind) for kind, path in tower_files(source, kinds, form, say=say).items()}


def _is_prefix(model: str | Path) -> bool:
    return zoo.named(str(model)) is None and not os.path.exists(model) and bool(_files_of_prefix(model))


def _files_of_prefix(model: str | Path) -> list[str]:
    parent, name = Path(model).parent, Path(model).name
    return sorted(path.name for path in parent.glob(f"{glob.escape(name)}.*.onnx"))


def _given_files(prefix: str | Path, kinds: Sequence[Kind], form: str) -> dict[Kind, Path]:
    """The files of a prefix in a form: of one tower or of both, as they were exported."""
    paths = {kind: onnx_path(prefix, kind, form) for kind in kinds}
    found = {kind: path for kind, path in paths.items() if path.is_file()}
    if not found:
        wanted = " or ".join(path.name for path in paths.values())
        raise CheckpointError(
            f"expected {wanted}, found {', '.join(_files_of_prefix(prefix))}; "
            "choose another precision, or export this one with deploy/pytorch_to_onnx.py",
            at=prefix,
        )
    return found
