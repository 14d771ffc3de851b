"""From a model in PyTorch to float32 ONNX files; each is measured before it is believed."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cn_clip import zoo
from cn_clip.clip.backends import parity
from cn_clip.clip.backends.base import Parts, TowerFacts
from cn_clip.clip.backends.derived import check_packages
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.backends.onnx_files import INPUTS, METADATA_KEY, OUTPUTS, metadata, onnx_path, save, set_metadata
from cn_clip.clip.backends.parity import Reference, Report, Samples
from cn_clip.clip.backends.pytorch import ForeignTowers, TorchBackend
from cn_clip.clip.blocks import trimmed
from cn_clip.clip.loading import open_model
from cn_clip.clip.model import CLIP
from cn_clip.errors import ConfigError
from cn_clip.extras import require
from cn_clip.language import both
from cn_clip.progress import working

if TYPE_CHECKING:
    from onnx import ModelProto

    from cn_clip.clip.tokenizer import TextTransform

OPSET = 18


def export_model(
    model: str | Path,
    kinds: Sequence[Kind],
    prefix: Path,
    *,
    vision: str | None = None,
    text: str | None = None,
    download_root: str | Path | None = None,
    merge_tokens: int = 0,
) -> Iterator[Report]:
    """Writes towers of a name, a checkpoint or a folder; raises as `open_model` and `export_tower`.

    merge_tokens: patches that the picture tower merges in each layer.
    """
    opened, _ = open_model(model, vision=vision, text=text, download_root=download_root)
    samples = parity.embedded_samples()
    whole = parity.reference(TorchBackend(opened), samples, KINDS if merge_tokens else kinds)
    expected = merged_reference(opened, whole, merge_tokens)
    for kind in kinds:
        yield export_tower(opened, kind, onnx_path(prefix, kind, "fp32"), expected, whole=whole)


def merged_reference(model: CLIP, whole: Reference, merge_tokens: int) -> Reference:
    """The same inputs, and the rows of a model that merges tokens from now on."""
    if not merge_tokens:
        return whole
    merging = TorchBackend(model, merge_tokens=merge_tokens)
    return Reference(whole.inputs, {**whole.rows, "image": parity.rows_by(merging, "image", whole.inputs["image"])})


def export_tower(
    model: CLIP,
    kind: Kind,
    path: Path,
    expected: Reference,
    *,
    tolerance: float | None = None,
    max_length: int | None = None,
    whole: Reference | None = None,
) -> Report:
    """Writes one tower of a float32 model in eval mode, batch size and text length free; returns how close it is.

    expected: rows of this model. whole: those of both towers while it merged no tokens, for the report.
    max_length: the longest text that the file says it takes, in tokens; default: all that the model takes.
    Raises MissingExtraError without the packages, ConfigError for more tokens than the model takes, CheckpointError
    when the file does not compute what the model does.
    """
    check_packages(["fp32"])
    facts = facts_of_model(model, kind)
    if kind == "text" and max_length is not None:
        if facts.max_length is not None and max_length > facts.max_length:
            raise ConfigError(
                f"context length {max_length}: this model takes texts of at most {facts.max_length} tokens"
            )
        facts = replace(facts, max_length=max_length)
    with working(both(f"导出 ONNX（{kind}）", f"exporting to ONNX ({kind})")):
        batch = torch.export.Dim("batch", min=1)
        if kind == "image":
            example = torch.zeros(2, 3, model.resolution, model.resolution)
            free: dict[int, Any] = {0: batch}
        else:
            longest = model.config.text.text_max_position_embeddings
            example = torch.ones(2, 12, dtype=torch.int64)
            free = {0: batch, 1: torch.export.Dim("length", min=2, max=longest)}
        _write((_ImageTower if kind == "image" else _TextTower)(model), kind, example, free, facts, path)
    report = parity.compare(expected, path, kind, "fp32", tolerance=tolerance)
    if whole is not None and facts.merge_tokens:
        report = replace(report, merging=parity.merging(whole, expected, facts.merge_tokens))
    return report


def export_parts(
    parts: Parts, kinds: Sequence[Kind], prefix: Path, *, family: str, samples: Samples
) -> Iterator[Report]:
    """Writes towers of a float32 model of another family in PyTorch; raises as `export_tower`.

    family: what the files say of it. samples: prepared by the parts.
    """
    check_packages(["fp32"])
    towers = parts.backend
    assert isinstance(towers, ForeignTowers), "is opened in PyTorch"
    expected = parity.reference(towers, samples, kinds)
    total, visual = towers.facts.num_parameters
    for kind in kinds:
        of_text: dict[str, Any] = dict.fromkeys(("max_length", "context_length"), parts.texts.context_length)
        facts = TowerFacts(
            kind=kind,
            embed_dim=towers.embed_dim,
            precision="fp32",
            logit_scale=towers.facts.logit_scale,
            num_parameters=visual if kind == "image" else total - visual,
            family=family,
            **({"resolution": towers.resolution} if kind == "image" else of_text),
        )
        example = torch.from_numpy(trimmed(expected.inputs[kind][:2]))
        free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if kind == "text" and (longest := _free_length(parts.texts)):
            free[1] = torch.export.Dim("length", min=2, max=longest)
        if kind == "image" and example.ndim == len(("batch", "patches", "values")):
            free[1] = torch.export.Dim("patches", min=2, max=towers.shape[0])
        path = onnx_path(prefix, kind, "fp32")
        with working(both(f"导出 ONNX（{kind}）", f"exporting to ONNX ({kind})")):
            _write(towers.module(kind), kind, example, free, facts, path)
        yield parity.compare(expected, path, kind, "fp32")


def _free_length(texts: "TextTransform") -> int | None:
    """The longest text in tokens; None where every text is padded to one length."""
    short, long = (texts.pad(texts.rows([text])).shape[1] for text in ("一", "一" * texts.context_length))
    return texts.context_length if short != long else None


def facts_of_model(model: CLIP, kind: Kind) -> TowerFacts:
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
        merge_tokens=(getattr(model.visual, "merge_tokens", 0) or None) if kind == "image" else None,
        matryoshka=model.matryoshka,
        num_parameters=count + (model.text_projection.numel() if kind == "text" else 0),
    )


def _write(module: nn.Module, kind: Kind, example: Tensor, free: dict[int, Any], facts: TowerFacts, path: Path) -> None:
    """Writes the file of a module of one input; free: the axes of any size."""
    proto = _translated(module, kind, example, free)
    set_metadata(proto, {METADATA_KEY: metadata(facts)})
    save(proto, path)


def _translated(module: nn.Module, kind: Kind, example: Tensor, free: dict[int, Any]) -> "ModelProto":
    script: Any = require("onnxscript.optimizer", extra="onnx", purpose="exporting to ONNX")
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
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
    del proto.graph.value_info[:]  # shapes of the example, some of them wrong; readers that want them infer them
    for node in proto.graph.node:  # lines of source and paths of this machine
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    return proto


class _Tower(nn.Module):
    """One tower as a module of one input, which the exporter names after its parameter."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model


class _ImageTower(_Tower):
    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image)


class _TextTower(_Tower):
    def forward(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text)


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
