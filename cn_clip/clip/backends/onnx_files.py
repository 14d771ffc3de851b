"""The ONNX files of a model: names, tensor names and metadata, as `deploy/pytorch_to_onnx.py` writes them."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import __version__
from cn_clip.clip.backends.base import TowerFacts
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.errors import CheckpointError, DataError, lacked_memory, reading
from cn_clip.extras import require
from cn_clip.files import settle

if TYPE_CHECKING:
    from onnx import ModelProto

INPUTS: dict[Kind, str] = {"image": "image", "text": "text"}
OUTPUTS: dict[Kind, str] = {"image": "unnorm_image_features", "text": "unnorm_text_features"}
MIDDLE: dict[Kind, str] = {"image": "img", "text": "txt"}
EXTRA_SUFFIX = ".extra_file"
METADATA_KEY = "cn_clip"
# Protocol buffers end at 2 GiB; larger weights lie in a file of their own.
LARGEST_FILE = 2**31 - 2**24
# Tensors of fewer bytes stay in the graph when the weights lie outside: readers want the shapes among them there.
_SMALLEST_OUTSIDE = 1024
# A file with its weights outside is a graph of a megabyte or two; a larger one has them inside.
_LARGEST_GRAPH = 1 << 25
_LOCATION = b"\x0a\x08location\x12"

# The facts that are not whole numbers.
FACT_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("kind", "precision", "architecture", "weights", "family"), (str,)),
    "logit_scale": (int, float),
}

Shape = tuple[int | None, ...]


def onnx_path(prefix: str | Path, kind: Kind, form: str) -> Path:
    """`PREFIX.img.fp32.onnx`: the file of a tower. form: a precision, or "int8.openvino"."""
    return Path(f"{prefix}.{MIDDLE[kind]}.{form}.onnx")


def extra_path(path: Path) -> Path:
    """Where the weights of an ONNX file lie that are not in it."""
    return path.with_name(path.name + EXTRA_SUFFIX)


def load(path: Path, *, with_weights: bool = True) -> "ModelProto":
    """The model of a file; with_weights: also those of its outside file. Raises CheckpointError."""
    onnx: Any = require("onnx", extra="onnx", purpose="exporting to ONNX")
    with reading(path, CheckpointError, what="is not an ONNX file", step="export the model again", look=what_it_is):
        proto: ModelProto = onnx.load(os.fspath(path), load_external_data=with_weights)
    return proto


def save(proto: "ModelProto", path: Path, *, outside: bool | None = None) -> None:
    """Writes a model; outside: its weights into PATH.extra_file, by default only where one file cannot hold them.

    The name of that file is kept without a folder, so that both can be moved together. `proto` may lose its weights.
    Raises DataError when it cannot be written.
    """
    onnx: Any = require("onnx", extra="onnx", purpose="exporting to ONNX")
    beside = extra_path(path)
    beside.unlink(missing_ok=True)  # onnx would add to it
    if outside is None:
        outside = sum(len(one.raw_data) for one in proto.graph.initializer) > LARGEST_FILE
    with _written(path):
        onnx.save_model(
            proto,
            os.fspath(path),
            save_as_external_data=outside,
            location=beside.name,
            size_threshold=_SMALLEST_OUTSIDE,
        )
        if outside:
            beside.chmod(path.stat().st_mode)  # onnx makes it readable by its owner only


def move(path: Path, folder: Path) -> Path:
    """Moves a file and that of its outside weights, the one that names the other last; returns the new path."""
    target, beside = folder / path.name, extra_path(path)
    with _written(target):
        if beside.exists():
            os.replace(beside, extra_path(target))
        else:
            extra_path(target).unlink(missing_ok=True)
        os.replace(path, target)
    return target


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error}); make room or choose another folder", at=path.name
        ) from error


# Facts that are lists, and of what.
_LISTS: dict[str, type] = {"left_out": str, "matryoshka": int}


def metadata(facts: TowerFacts) -> str:
    """The facts as the metadata of a file hold them, under METADATA_KEY."""
    return json.dumps({"writer": f"cn_clip {__version__}", **asdict(facts)})


def set_metadata(proto: "ModelProto", entries: Mapping[str, str]) -> None:
    """Replaces the metadata of a model."""
    del proto.metadata_props[:]
    for key, value in entries.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value


def reading_facts(path: str) -> contextlib.AbstractContextManager[None]:
    """For asking a runtime about an opened file, whose names may be no UTF-8; raises CheckpointError."""
    return reading(path, CheckpointError, what="its names or metadata cannot be read", step="export it again")


def facts_of(
    path: str, kind: Kind, *, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], metadata: str | None
) -> TowerFacts:
    """The facts of an opened file: shapes from its tensors, the rest from its metadata if it has any.

    Raises CheckpointError when it is not a tower of this kind.
    """
    # A picture is (3, R, R), or a block of patches.
    wanted = [{INPUTS[kind]: axes} for axes in ((4, 3) if kind == "image" else (2,))]
    if {name: len(shape) for name, shape in inputs.items()} not in wanted or OUTPUTS[kind] not in outputs:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in [*inputs.items(), *outputs.items()])
        raise CheckpointError(
            f"expected the {kind} model, with the input {INPUTS[kind]!r} and the output {OUTPUTS[kind]!r}; "
            f"it has {found}; are the two files swapped, or is it another model?",
            at=path,
        )
    shape, result = inputs[INPUTS[kind]], outputs[OUTPUTS[kind]]
    embed_dim = result[-1] if result else None  # a damaged file may call it a single number
    known = read_metadata(path, kind, metadata)
    if embed_dim is None:
        embed_dim = known.get("embed_dim")
    if not isinstance(embed_dim, int) or (kind == "image" and shape[-1] is None):
        raise CheckpointError(f"does not say its size ({list(shape)} to {embed_dim}); export it again", at=path)
    fixed: dict[str, Any] = {"batch": shape[0], "embed_dim": embed_dim}
    if kind == "image":
        fixed["shape"] = tuple(shape[1:])
        fixed["resolution"] = shape[-1] if len(shape) == 4 else known.get("resolution")
        if fixed["resolution"] is None:
            raise CheckpointError("does not say the size of its pictures; export it again", at=path)
    else:
        fixed["length"] = shape[1]
    return TowerFacts(**{**known, **fixed, "kind": kind})


def read_metadata(path: str, kind: Kind, text: str | None) -> dict[str, Any]:
    """The facts in metadata, none in None; raises CheckpointError when they are damaged, or of the other tower."""
    if text is None:
        return {}
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")
        names = {field.name for field in fields(TowerFacts)} - {"shape"}  # which the tensors of the file say
        known = {name: values[name] for name in names if name in values}
        for name, value in known.items():
            if name in _LISTS:
                is_right = isinstance(value, list) and all(type(one) is _LISTS[name] for one in value)
            else:
                is_plain = isinstance(value, FACT_TYPES.get(name, (int,))) and not isinstance(value, bool)
                is_right = value is None or is_plain
            if not is_right:
                raise ValueError(f"{name}: {value!r}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its metadata {METADATA_KEY!r} cannot be read ({error}); export it again", at=path
        ) from error
    known |= {name: tuple(known.get(name, ())) for name in _LISTS}
    if known.get("kind", kind) != kind:
        raise CheckpointError(f"is the {known['kind']} model; expected the {kind} model", at=path)
    return known


def missing_weights(path: str | Path) -> str | None:
    """A sentence when the file, or the file of its outside weights, is not there; None when nothing is missing.

    First an export that was killed while its files were moved is finished; raises DataError as `files.settle`.
    """
    path = Path(path)
    settle(path.parent)
    if not path.is_file():
        return f"{path}: no such file; export the model with deploy/pytorch_to_onnx.py"
    gone = [name for name in outside_files(path) if not (path.parent / name).exists()]
    if gone:
        return f"{path}: its weights are in {gone[0]}, which is not beside it; copy both files together"
    return None


def not_opened(path: str, where: str, reason: str, error: Exception) -> CheckpointError:
    """What to raise when a file that is there cannot be opened; reason: what the library says."""
    for file in (Path(path), *(Path(path).parent / name for name in outside_files(Path(path)))):
        if (known := what_it_is(file)) is not None:
            return CheckpointError(known, at=file)
    advice = "close other programs" if lacked_memory(error) else "if the file is damaged, export it again"
    return CheckpointError(f"cannot be opened by {where} ({reason[:300]}); {advice}", at=path)


def not_taken(path: str, fed: NDArray[np.generic], reason: str) -> CheckpointError:
    """What to raise when a file does not take a batch of this shape and type; reason: what the library says."""
    return CheckpointError(
        f"does not take a batch of {fed.dtype} {fed.shape} ({reason[:300]}); export the model again", at=path
    )


def outside_files(path: Path) -> list[str]:
    """The files an ONNX file keeps weights in, relative to its folder: the `location` entries of its tensors."""
    if path.stat().st_size > _LARGEST_GRAPH:
        return []
    # Field 1 of an entry is its key, field 2 its value: a length below 128 in one byte, then the name.
    pieces = path.read_bytes().split(_LOCATION)[1:]
    return sorted({piece[1 : 1 + piece[0]].decode(errors="replace") for piece in pieces if piece and piece[0] < 128})
