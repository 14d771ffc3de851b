"""From a model in PyTorch to ONNX files, and from those to other precisions; each is measured before it is believed."""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip import zoo
from cn_clip.clip.backends import half, int8, parity
from cn_clip.clip.backends.base import Kind, TowerFacts
from cn_clip.clip.backends.onnx_files import (
    INPUTS,
    METADATA_KEY,
    OUTPUTS,
    metadata,
    read_metadata,
    save,
)
from cn_clip.clip.backends.parity import Reference, Report
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.extras import require

if TYPE_CHECKING:
    from onnx import ModelProto

    from cn_clip.clip.model import CLIP

OPSET = 18
# The packages that writing and measuring a form takes, each with the extra that installs it.
PACKAGES = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}


def check_packages(forms: Collection[str]) -> None:
    """Raises MissingExtraError for a package that exporting from PyTorch to these forms takes and that is absent."""
    for module, extra in PACKAGES.items():
        if module != "openvino" or "int8.openvino" in forms:
            require(module, extra=extra, purpose=f"exporting to ONNX ({', '.join(forms)})")


def export_tower(
    model: "CLIP",
    kind: Kind,
    path: Path,
    expected: Reference,
    *,
    tolerance: float | None = None,
    max_length: int | None = None,
) -> Report:
    """Writes one tower of a float32 model in eval mode, batch size and text length free; returns how close it is.

    expected: rows of this model. max_length: the longest text that the file says it takes, in tokens; default: all
    that the model takes. Raises MissingExtraError without the packages, ConfigError for more tokens than the model
    takes, CheckpointError when the file does not compute what the model does.
    """
    check_packages(["fp32"])
    facts = facts_of_model(model, kind)
    if kind == "text" and max_length is not None:
        if facts.max_length is not None and max_length > facts.max_length:
            raise ConfigError(
                f"context length {max_length}: this model takes texts of at most {facts.max_length} tokens"
            )
        facts = replace(facts, max_length=max_length)
    proto = _translated(model, kind)
    _add_metadata(proto, facts)
    save(proto, path)
    return parity.compare(expected, path, kind, "fp32", tolerance=tolerance)


def derive(
    base: Path, kind: Kind, form: str, path: Path, expected: Reference, *, tolerance: float | None = None
) -> Report:
    """Writes another form of a float32 file: "fp16", "int8" or "int8.openvino"; returns how close it is.

    Needs no PyTorch. Raises CheckpointError when it is further from float32 than the tolerance of its form.
    """
    choice = share = None
    if form == "fp16":
        proto = half.halved(base)
    elif form in ("int8", "int8.openvino"):
        choice = int8.choose(base, kind, form, path, expected)
        share = int8.share(base, choice.left_out)
        proto = int8.quantised(base, form, choice)
    else:
        raise ConfigError(f"form: expected fp16, int8 or int8.openvino, got {form!r}")
    facts = _facts(base, kind, proto)
    facts = replace(facts, precision=form.partition(".")[0])
    if choice is not None and share is not None:
        facts = replace(facts, left_out=choice.left_out, levels=choice.levels)
        facts = replace(facts, num_int8=share.num_int8, num_products=share.num_products)
    _add_metadata(proto, facts)
    # Chinese-CLIP's float16 files keep their weights outside, and its guides copy both.
    save(proto, path, outside=True if form == "fp16" else None)
    return parity.compare(expected, path, kind, form, tolerance=tolerance, left_out=facts.left_out, share=share)


def facts_of_model(model: "CLIP", kind: Kind) -> TowerFacts:
    """What the metadata of an exported tower say."""
    part = model.visual if kind == "image" else model.bert
    count = sum(parameter.numel() for parameter in part.parameters())
    names = zoo.tower_names(model.config)
    return TowerFacts(
        kind=kind,
        embed_dim=model.config.vision.embed_dim,
        resolution=model.resolution if kind == "image" else None,
        max_length=model.config.text.text_max_position_embeddings if kind == "text" else None,
        context_length=model.context_length if kind == "text" else None,
        precision="fp32",
        architecture="@".join(name or "?" for name in names) if any(names) else None,
        weights=model.fingerprint(),
        logit_scale=float(model.logit_scale.detach().exp()),
        num_parameters=count + (model.text_projection.numel() if kind == "text" else 0),
    )


def _translated(model: "CLIP", kind: Kind) -> "ModelProto":
    import torch

    script: Any = require("onnxscript.optimizer", extra="onnx", purpose="exporting to ONNX")
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
            _Tower(model, kind).eval(),
            (example,),
            input_names=[INPUTS[kind]],
            output_names=[OUTPUTS[kind]],
            dynamic_shapes=(free,),
            opset_version=OPSET,
            dynamo=True,
        )
        assert program is not None
        # The class token's attention slices its weights; done here, they are plain weights of products.
        everything = 2**62
        script.fold_constants(program.model, input_size_limit=everything, output_size_limit=everything)
        script.remove_unused_nodes(program.model)
    proto: ModelProto = program.model_proto
    del proto.graph.value_info[:]  # shapes of the example, some of them wrong; whoever wants them infers them
    for node in proto.graph.node:  # lines of source and paths of this machine
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    return proto


def _facts(base: Path, kind: Kind, proto: "ModelProto") -> TowerFacts:
    text = {one.key: one.value for one in proto.metadata_props}.get(METADATA_KEY)
    known = read_metadata(str(base), kind, text)
    if "embed_dim" not in known:
        raise CheckpointError("was not written by this package; export the model again", at=base)
    return TowerFacts(**{**known, "kind": kind})


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
