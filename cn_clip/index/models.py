"""Opens the model of an index, and tells it from others; for the commands of this package."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import ranks, zoo
from cn_clip.clip.backends.base import KINDS, ExportedBackend, Kind, check_precision
from cn_clip.clip.backends.onnx_files import extra_path
from cn_clip.clip.backends.opening import open_backend
from cn_clip.command import Speaker
from cn_clip.retrieval.manifest import ModelInfo

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Backend
    from cn_clip.clip.encoder import Encoder
    from cn_clip.clip.transforms import Decode
    from cn_clip.index.options import ModelOptions

BLOCK = 1 << 20


def open_encoder(
    model: str, options: "ModelOptions", say: Speaker, *, kinds: Sequence[Kind] = KINDS, decode: "Decode" = "exact"
) -> "tuple[Encoder, ModelInfo]":
    """The towers wanted, and what an index says of their model; raises as `open_backend`."""
    from cn_clip.clip.encoder import Encoder

    if options.backend == "torch":
        opened, fingerprint = _open_torch(model, options)
    else:
        opened = open_backend(
            model,
            backend=options.backend,
            precision=options.precision,
            device=None if options.device == "auto" else options.device,
            download_root=options.download_root,
            num_threads=options.num_threads,
            kinds=kinds,
            say=say.note,
        )
        assert isinstance(opened, ExportedBackend)
        known = _known_fingerprint(opened)
        if known is None and set(kinds) != set(KINDS):
            # It is made of both files, whichever is asked for.
            return open_encoder(model, options, say, decode=decode)
        fingerprint = known or _fingerprint_of_files(opened)
    return Encoder(opened, decode=decode), ModelInfo(full_name(model), fingerprint, opened.embed_dim)


def full_name(model: str) -> str:
    """A published name as it is, a path from the root on: the index may be opened from another folder."""
    return model if zoo.named(model) else str(Path(model).absolute())


def _open_torch(model: str, options: "ModelOptions") -> "tuple[Backend, str]":
    from cn_clip.clip.backends.export import fingerprint
    from cn_clip.clip.backends.pytorch import TorchBackend
    from cn_clip.clip.loading import open_model

    precision = check_precision("torch", options.precision)
    device = ranks.choose_device(options.device)
    loaded, _ = open_model(model, download_root=options.download_root)
    # Of the weights as they are exported too, before they are rounded for a precision.
    digits = fingerprint(loaded.float())
    return TorchBackend(loaded, device=device, precision=precision, num_threads=options.num_threads), digits


def _known_fingerprint(backend: ExportedBackend) -> str | None:
    """What the files say of the weights they were exported from; nothing in those of other exporters."""
    towers = [tower for tower in (backend.image, backend.text) if tower is not None]
    return next((tower.facts.weights for tower in towers if tower.facts.weights), None)


def _fingerprint_of_files(backend: ExportedBackend) -> str:
    digest = hashlib.blake2b(digest_size=8)
    places = [Path(tower.place) for tower in (backend.image, backend.text) if tower is not None]
    for path in (one for place in places for one in (place, extra_path(place)) if one.is_file()):
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return f"file:{digest.hexdigest()}"
