"""From a model in PyTorch to ONNX files, and from those to other precisions; each is measured before it is believed."""

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip.clip.backends import int8, parity
from cn_clip.clip.backends.base import Kind, TowerFacts
from cn_clip.clip.backends.onnx_files import INPUTS, METADATA_KEY, OUTPUTS, extra_path, metadata
from cn_clip.clip.backends.parity import Report
from cn_clip.errors import ConfigError
from cn_clip.extras import require

if TYPE_CHECKING:
    from onnx import ModelProto

    from cn_clip.clip.backends.exported import Source
    from cn_clip.clip.model import CLIP

OPSET = 18
# Protocol buffers end at 2 GiB; larger weights lie in a file of their own.
LARGEST_FILE = 2**31 - 2**24


def export_source(source: "Source", kind: Kind, path: Path) -> Report:
    """Writes one tower of a name or a weight file as float32 ONNX and compares it with PyTorch."""
    from cn_clip.clip.loading import open_model

    model, _ = open_model(source.model, vision=source.vision, text=source.text, download_root=source.download_root)
    return export_tower(model, kind, path)


def export_tower(model: "CLIP", kind: Kind, path: Path, *, outside: bool | None = None) -> Report:
    """Writes one tower of a float32 model in eval mode, batch size and text length free; returns how close it is.

    outside: keep the weights in PATH.extra_file; default: only where they are too large for one file.
    Raises MissingExtraError without the packages, CheckpointError when the file does not compute what the model does.
    """
    import torch

    onnx: Any = require("onnx", extra="onnx", purpose="exporting to ONNX")
    require("onnxscript", extra="onnx", purpose="exporting to ONNX")
    tower = _Tower(model, kind)
    batch = torch.export.Dim("batch", min=1)
    if kind == "image":
        example = torch.zeros(2, 3, model.resolution, model.resolution)
        free: dict[int, Any] = {0: batch}
    else:
        longest = model.config.text.text_max_position_embeddings
        example = torch.ones(2, 12, dtype=torch.int64)
        free = {0: batch, 1: torch.export.Dim("length", min=2, max=longest)}
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            input_names=[INPUTS[kind]],
            output_names=[OUTPUTS[kind]],
            dynamic_shapes=(free,),
            opset_version=OPSET,
            dynamo=True,
        )
    assert program is not None
    proto: ModelProto = program.model_proto
    del proto.graph.value_info[:]  # shapes of the example, some of them wrong; whoever wants them infers them
    _add_metadata(proto, facts_of_model(model, kind))
    save(onnx, proto, path, outside=outside)
    return parity.compare_with_model(model, kind, path)


def facts_of_model(model: "CLIP", kind: Kind) -> TowerFacts:
    """What the metadata of an exported tower say."""
    part = model.visual if kind == "image" else model.bert
    count = sum(parameter.numel() for parameter in part.parameters())
    return TowerFacts(
        kind=kind,
        embed_dim=model.config.vision.embed_dim,
        resolution=model.resolution if kind == "image" else None,
        max_length=model.config.text.text_max_position_embeddings if kind == "text" else None,
        precision="fp32",
        weights=fingerprint(model),
        logit_scale=float(model.logit_scale.detach().exp()),
        num_parameters=count + (model.text_projection.numel() if kind == "text" else 0),
    )


def fingerprint(model: "CLIP") -> str:
    """Sixteen hexadecimal digits that tell one model's weights from another's."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def derive(base: Path, kind: Kind, form: str, path: Path) -> Report:
    """Writes another form of a float32 file: "fp16", "int8" or "int8.openvino"; returns how close it is.

    Raises CheckpointError when it is further from float32 than the tolerance of its precision.
    """
    if form == "fp16":
        to_half(base, path)
    elif form == "int8":
        int8.for_onnx_runtime(base, kind, path)
    elif form == "int8.openvino":
        int8.for_openvino(base, path)
    else:
        raise ConfigError(f"form: expected fp16, int8 or int8.openvino, got {form!r}")
    return parity.compare_files(base, path, kind, form)


def to_half(base: Path, path: Path) -> None:
    """Weights and arithmetic in float16, inputs and outputs in float32."""
    raise NotImplementedError


def save(onnx: Any, proto: "ModelProto", path: Path, *, outside: bool | None = None) -> None:
    """Writes the file, and beside it the file of its weights where they do not fit or `outside` says so.

    Both appear whole: the one that names the other comes last.
    """
    beside = extra_path(path)
    if outside is None:
        outside = proto.ByteSize() > LARGEST_FILE
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        onnx.save_model(
            proto,
            os.fspath(scratch / path.name),
            save_as_external_data=outside,
            location=beside.name,
            size_threshold=1024,
        )
        if outside:
            os.replace(scratch / beside.name, beside)
        else:
            beside.unlink(missing_ok=True)
        os.replace(scratch / path.name, path)
    finally:
        for file in scratch.iterdir():
            file.unlink()
        scratch.rmdir()


def _add_metadata(proto: "ModelProto", facts: TowerFacts) -> None:
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, metadata(facts)


def _Tower(model: "CLIP", kind: Kind) -> Any:  # noqa: N802 - a class made where torch is at hand
    from torch import Tensor, nn

    class ImageTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Tensor:
            return self.model.encode_image(image)

    class TextTower(ImageTower):
        def forward(self, text: Tensor) -> Tensor:
            return self.model.encode_text(text)

    return ImageTower() if kind == "image" else TextTower()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter prints its stages and warns of packages it could use."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
