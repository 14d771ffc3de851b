"""Opens the model of an index, and tells it from others; for the commands of this package."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import ranks, zoo
from cn_clip.clip.backends.base import KINDS, ExportedBackend, Kind
from cn_clip.clip.backends.onnx_files import extra_path
from cn_clip.clip.backends.opening import open_backend, settle_precision
from cn_clip.clip.families.names import absolute, is_foreign
from cn_clip.clip.families.snapshots import files_of
from cn_clip.command import Speaker
from cn_clip.digests import add_file
from cn_clip.retrieval.manifest import ModelInfo

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Backend
    from cn_clip.clip.encoder import Encoder
    from cn_clip.clip.transforms import Decode
    from cn_clip.index.options import ModelOptions


def open_encoder(
    model: str, options: "ModelOptions", say: Speaker, *, kinds: Sequence[Kind] = KINDS, decode: "Decode" = "exact"
) -> "tuple[Encoder, ModelInfo]":
    """The towers wanted, and what an index says of their model; raises as `open_backend`."""
    from cn_clip.clip.encoder import Encoder

    if options.precision == "auto":
        precision = settle_precision(options.backend, "auto", options.device)
        say.note(f"精度 / precision: auto -> {precision}")
        options = replace(options, precision=precision)
    if is_foreign(model):
        return _open_foreign(model, options, decode)
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
        fingerprint = known or _fingerprint_of_files(_files_of_towers(opened))
    return Encoder(opened, decode=decode), ModelInfo(full_name(model), fingerprint, opened.embed_dim)


def full_name(model: str) -> str:
    """A published name as it is, a path from the root on: the index may be opened from another folder."""
    if is_foreign(model):
        return absolute(model)
    return model if zoo.named(model) else str(Path(model).absolute())


def _open_foreign(model: str, options: "ModelOptions", decode: "Decode") -> "tuple[Encoder, ModelInfo]":
    from cn_clip.clip.encoder import Encoder

    encoder = Encoder(
        model,
        backend=options.backend,
        precision=options.precision,
        device=options.device,
        download_root=options.download_root,
        num_threads=options.num_threads,
        decode=decode,
    )
    fingerprint = _fingerprint_of_files(files_of(model, download_root=options.download_root))
    return encoder, ModelInfo(full_name(model), fingerprint, encoder.embed_dim)


def _open_torch(model: str, options: "ModelOptions") -> "tuple[Backend, str]":
    from cn_clip.clip.backends.export import fingerprint
    from cn_clip.clip.backends.pytorch import TorchBackend
    from cn_clip.clip.loading import open_model

    device = ranks.choose_device(options.device)
    loaded, _ = open_model(model, download_root=options.download_root)
    # Of the weights as they are exported too, before they are rounded for a precision.
    digits = fingerprint(loaded.float())
    return TorchBackend(loaded, device=device, precision=options.precision, num_threads=options.num_threads), digits


def _known_fingerprint(backend: ExportedBackend) -> str | None:
    """What the files say of the weights they were exported from; nothing in those of other exporters."""
    towers = [tower for tower in (backend.image, backend.text) if tower is not None]
    return next((tower.facts.weights for tower in towers if tower.facts.weights), None)


def _files_of_towers(backend: ExportedBackend) -> list[Path]:
    places = [Path(tower.path) for tower in (backend.image, backend.text) if tower is not None]
    return [one for place in places for one in (place, extra_path(place)) if one.is_file()]


def _fingerprint_of_files(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        add_file(digest, path)
    return f"file:{digest.hexdigest()}"
