"""From a name or a file to a running backend: what `Encoder` and the commands call."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import zoo
from cn_clip.clip.backends.base import (
    KINDS,
    Backend,
    BackendName,
    ExportedBackend,
    Kind,
    Precision,
    Tower,
    check_precision,
)
from cn_clip.clip.backends.exported import Announce, Source, announce, forget, tower_file
from cn_clip.clip.backends.onnx_files import onnx_path
from cn_clip.errors import CheckpointError, ConfigError

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
    kinds: Sequence[Kind] = KINDS,
    say: Announce = announce,
) -> Backend:
    """The towers of a model, ready to run.

    model: a published or bundled name, a checkpoint, a transformers folder; for backends other than torch also the
    prefix of exported files (`deploy/vit-b-16` for `deploy/vit-b-16.img.fp32.onnx`). What is not exported yet is
    exported into the cache, `exported/` in `download_root`, and `say` is told.
    vision, text: architecture names, for a checkpoint that leaves them open. kinds: the towers wanted.
    device: of torch and onnx; default CUDA where there is one. compile: torch alone.
    Raises CnClipError: no such model, backend, precision or device, or a package that is not installed.
    """
    chosen = check_precision(backend, precision)
    if compile and backend != "torch":
        raise ConfigError(f"compile: is for the torch backend; {backend} compiles by itself")
    if backend == "torch":
        from cn_clip.clip.backends.pytorch import TorchBackend
        from cn_clip.clip.loading import default_device, open_model

        loaded, _ = open_model(model, vision=vision, text=text, download_root=download_root)
        place = device or default_device()
        return TorchBackend(loaded, device=place, precision=chosen, compile=compile, num_threads=num_threads)
    open_tower = tower_opener(backend, chosen, None if device is None else str(device), num_threads)
    source = Source(model, vision, text, download_root)
    form = "int8.openvino" if (backend, chosen) == ("openvino", "int8") else chosen
    if backend == "openvino" and chosen == "bf16":
        form = "fp32"  # OpenVINO rounds while it computes
    towers = {kind: _open(source, kind, form, open_tower, say) for kind in kinds}
    return ExportedBackend(towers.get("image"), towers.get("text"))


def tower_opener(
    backend: BackendName, precision: Precision, device: str | None, num_threads: int | None
) -> Callable[[Path, Kind], Tower]:
    """What opens an exported file in a backend; raises ConfigError for a device it does not run on."""
    if backend == "openvino":
        if device not in (None, "auto", "cpu"):
            raise ConfigError(f"device: the openvino backend runs on cpu, got {device!r}")

        def open_vino(path: Path, kind: Kind) -> Tower:
            from cn_clip.clip.backends.open_vino import OpenVinoTower

            return OpenVinoTower(path, kind, precision=precision, num_threads=num_threads)

        return open_vino

    def open_onnx(path: Path, kind: Kind) -> Tower:
        from cn_clip.clip.backends.onnx_runtime import OnnxTower

        return OnnxTower(path, kind, device=device, num_threads=num_threads)

    return open_onnx


def _open(source: Source, kind: Kind, form: str, open_tower: Callable[[Path, Kind], Tower], say: Announce) -> Tower:
    given = onnx_path(source.model, kind, form)
    if zoo.named(str(source.model)) is None and not Path(source.model).exists() and _is_prefix(source.model):
        if not given.is_file():
            raise CheckpointError(f"{given}: no such file; export it with deploy/pytorch_to_onnx.py")
        return open_tower(given, kind)
    path = tower_file(source, kind, form, say=say)
    try:
        return open_tower(path, kind)
    except CheckpointError as error:
        say(f"{error}; 重新导出 / exporting it again")
        forget(path)
        return open_tower(tower_file(source, kind, form, say=say), kind)


def _is_prefix(model: str | Path) -> bool:
    parent, name = Path(model).parent, Path(model).name
    return parent.is_dir() and any(parent.glob(f"{name}.*.onnx"))
