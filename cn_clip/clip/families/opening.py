"""From `hf:…`, `open_clip:…` or `st:…` to the parts of an `Encoder`: what `Encoder` and the commands call."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip import ranks, zoo
from cn_clip.clip.backends import choosing, parity
from cn_clip.clip.backends.base import Backend, Inputs, Parts
from cn_clip.clip.backends.choosing import Decision
from cn_clip.clip.backends.exported import Announce, Source, announce
from cn_clip.clip.backends.names import BackendName, Kind, check_precision
from cn_clip.clip.backends.opening import open_source
from cn_clip.clip.backends.parity import Report, Samples
from cn_clip.clip.families import names
from cn_clip.clip.families.folders import files_of, folder_of
from cn_clip.clip.families.names import ForeignName, is_foreign, parse
from cn_clip.clip.tokenizer import CONTEXT_LENGTH
from cn_clip.clip.transforms import Decode
from cn_clip.clip.weights import hub
from cn_clip.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.backends.pytorch import ForeignTowers

_ONLY_TORCH = "PyTorch alone runs models of sentence-transformers"


@dataclass(frozen=True)
class FamilySource(Source):
    """Weights of a model of another family, by a name for which `is_foreign`.

    decode: how pictures are. context_length: of a text in tokens, for a family that has several; None: the usual one.
    """

    decode: Decode = "exact"
    context_length: int | None = None

    @property
    def name(self) -> ForeignName:
        """The parts of its name."""
        return parse(str(self.model))

    @property
    def family(self) -> str | None:
        """The scheme of its name: files of one are made from models that say themselves what they are."""
        return self.name.scheme

    @property
    def unmeasured(self) -> str:
        """Nothing was measured of other families."""
        return "in the order that was measured on Chinese-CLIP"

    def files(self) -> tuple[str, list[Path]]:
        """See `Source`; a tag of open_clip has no files."""
        stem = re.sub(r"[^\w.-]+", "-", Path(self.name.source).name or "model")
        return stem, files_of(str(self.model), download_root=self.download_root)

    def more(self) -> tuple[object, ...]:
        """The name, for a tag of open_clip with the version that knows it, and the library that was exported."""
        package = "transformers" if self.name.scheme == "hf" else "open_clip_torch"
        return str(self.name._replace(source=Path(self.name.source).name)), self.context_length, _version(package)

    @cached_property
    def inputs(self) -> Inputs:
        """How its inputs are made; raises as `open_parts`."""
        if self.name.scheme == "hf":
            from cn_clip.clip.families.hf_models import read_folder

            folder = read_folder(folder_of(self.name, download_root=self.download_root))
            return folder.open_inputs(decode=self.decode, context_length=self.context_length)
        from cn_clip.clip.families.open_clip_models import open_inputs

        inputs = open_inputs(self.name, download_root=self.download_root, decode=self.decode)
        _check_length(self.context_length, inputs.texts.context_length)
        return inputs

    def open_torch(self, **settings: Any) -> Backend:
        """See `Source`."""
        return self._towers(
            device=ranks.choose_device(settings["device"]),
            precision=settings["precision"],
            num_threads=settings["num_threads"],
        )

    def check_model(self, backend: BackendName) -> None:
        """See `Source`."""
        names.check(str(self.model), backend)

    def export(self, kinds: Sequence[Kind], prefix: Path) -> Iterator[Report]:
        """See `Source`."""
        from cn_clip.clip.backends import export

        towers = self._towers(device=ranks.choose_device("cpu"), precision="fp32", num_threads=None)
        parts = Parts(towers, self.inputs.pictures, self.inputs.texts)
        return export.export_parts(parts, kinds, prefix, family=self.name.scheme, samples=self.samples())

    def samples(self, context_length: int = CONTEXT_LENGTH) -> Samples:
        """See `Source`; captions are cut at the model's own length."""
        return replace(parity.embedded_samples(), prepared=self.inputs)

    def _towers(self, **settings: Any) -> "ForeignTowers":
        if self.name.scheme == "hf":
            from cn_clip.clip.families.hf_models import read_folder

            folder = read_folder(folder_of(self.name, download_root=self.download_root))
            return folder.open_towers(self.inputs, **settings)
        from cn_clip.clip.families.open_clip_models import open_towers

        return open_towers(self.name, download_root=self.download_root, **settings)


def open_parts(
    name: str,
    *,
    backend: BackendName = "torch",
    precision: str = "fp32",
    device: "str | torch.device | None" = None,
    num_threads: int | None = None,
    download_root: "str | Path | None" = None,
    decode: Decode = "exact",
    context_length: int | None = None,
    trust_remote_code: bool = False,
    say: Announce = announce,
) -> Parts:
    """The towers, the picture transform and the tokenizer of a model of another family.

    name: `hf:FOLDER`, a transformers folder or an id of the Hugging Face hub; `open_clip:ARCHITECTURE@FILE`, or a tag
    instead of the file; `open_clip:local-dir:FOLDER` or `open_clip:hf-hub:OWNER/NAME`; `st:FOLDER`, a folder of
    sentence-transformers. backend: onnx and openvino run what is exported at first use. device: default CUDA where
    there is one. download_root: where downloads are kept.
    context_length: of a text in tokens, for a family that has several. trust_remote_code: of st: only, whether code
    that comes with the folder is run.
    Raises CnClipError: no such model, a family that is not known, or a package that is not installed.
    """
    names.check(name, backend)
    check_precision(backend, precision)
    if trust_remote_code:
        names.check_trust(name)
    parsed = parse(name)
    if parsed.scheme == "st":
        from cn_clip.clip.families.st_models import open_folder

        _check_length(context_length, None)
        return open_folder(
            folder_of(parsed, download_root=download_root),
            device=ranks.choose_device(device),
            precision=precision,
            num_threads=num_threads,
            decode=decode,
            trust_remote_code=trust_remote_code,
        )
    source = FamilySource(name, download_root=download_root, decode=decode, context_length=context_length)
    towers = open_source(source, backend=backend, precision=precision, device=device, num_threads=num_threads, say=say)
    return Parts(towers, source.inputs.pictures, source.inputs.texts)


def decide(name: str, **settings: Any) -> Decision:
    """What backend "auto" takes for a model of another family; settings: of `choosing.decide_for`, `download_root`."""
    download_root = settings.pop("download_root", None)
    if parse(name).scheme == "st":
        return choosing.only_torch(
            settings["precision"], settings["device"], _ONLY_TORCH, min_cosine=settings["min_cosine"]
        )
    return choosing.decide_for(FamilySource(name, download_root=download_root), **settings)


def _check_length(asked: int | None, own: int | None) -> None:
    """Raises ConfigError for another length of texts than the model has; own: None for one that nobody knows."""
    if asked not in (None, own):
        at = "a length" if own is None else f"{own} tokens"
        raise ConfigError(f"context_length {asked}: this model cuts texts at {at} of its own; leave it out")


def resolved(model: str | Path, *, download_root: str | Path | None = None) -> str | Path:
    """What opens a model that is named by an id of the hub alone, or is a folder of another family; others as they are.

    A folder of transformers whose config.json names another family becomes `hf:FOLDER`. An id of the hub,
    "OFA-Sys/chinese-clip-vit-base-patch16", becomes the folder that was downloaded.
    Raises DownloadError.
    """
    if is_foreign(model):
        return model
    folder = Path(model)
    if hub.is_hub_name(model):
        folder = hub.weight_file(model, download_root=download_root)
    elif not os.path.isdir(model):
        return model
    return f"hf:{folder}" if _family_of(folder) not in ("chinese_clip", "") else folder


def _family_of(folder: Path) -> str:
    """The `model_type` of a folder's config.json; "" where there is none, or nobody can tell."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # nested thousands deep
        return ""
    found = content.get("model_type") if isinstance(content, dict) else None
    return found if isinstance(found, str) else ""


def full_name(model: str) -> str:
    """A published name or an id of the hub as it is, a path from the root on: for those who open it elsewhere."""
    if is_foreign(model):
        return names.absolute(model)
    return model if zoo.named(model) or hub.is_hub_name(model) else str(Path(model).absolute())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
