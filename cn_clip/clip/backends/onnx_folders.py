"""Folders of ONNX files as Immich and transformers.js open them, made of the exported towers of a model.

`cn-clip convert` writes them. Both get texts through the rules of `clip.tokenizer`, and vectors of unit length.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip.clip.backends import exported
from cn_clip.clip.backends.exported import Announce, Source
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.backends.onnx_files import (
    INPUTS,
    LARGEST_FILE,
    METADATA_KEY,
    OUTPUTS,
    extra_path,
    load,
    read_metadata,
    save,
    set_metadata,
)
from cn_clip.clip.tokenizer import CONTEXT_LENGTH
from cn_clip.clip.transforms import MEAN, STD
from cn_clip.clip.weights.forms import PROCESSOR_FIELDS, TOKENIZER_FIELDS, tokenizer_json, write_json
from cn_clip.clip.weights.hf import PICTURE_FILE, picture_fields
from cn_clip.errors import ConfigError
from cn_clip.extras import require
from cn_clip.language import both
from cn_clip.progress import working
from cn_clip.zoo import ModelConfig

if TYPE_CHECKING:
    from onnx import ModelProto

# The forms of a tower, and how transformers.js calls the files of each.
JS_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
# The files of transformers.js: each tower by itself, and both in one, which its pipelines open.
JS_NAMES: dict[Kind, str] = {"image": "vision_model", "text": "text_model"}
JS_WHOLE = "model"
_JS_INPUTS: dict[Kind, str] = {"image": "pixel_values", "text": "input_ids"}
_JS_OUTPUTS: dict[Kind, str] = {"image": "image_embeds", "text": "text_embeds"}
# It knows the class by its name in old versions of transformers. In Node its bicubic does not average where a picture
# becomes smaller; its Lanczos does: of a photo, the cosine to `Encoder` is 0.99997 with it and 0.998 with bicubic.
_JS_PICTURES = {"image_processor_type": "ChineseCLIPFeatureExtractor", "resample": 1}
_IMMICH_FOLDERS: dict[Kind, str] = {"image": "visual", "text": "textual"}
# Below any length of a vector; a row of zeros stays one.
_SMALLEST_LENGTH = 1e-12


def write_immich(folder: Path, source: Source, config: ModelConfig, form: str, *, say: Announce) -> int:
    """The folder of a model in Immich's cache, into an existing one; returns how many tensors it holds.

    Source: the loader of Immich's machine learning, `immich_ml/models/clip`. It pads int32 ids to `context_length`.
    Raises as `exported.tower_files`, and ConfigError for a model of another vocabulary.
    """
    tokenizer = _tokenizer(source, config)
    files = exported.tower_files(source, KINDS, form, say=say)
    onnx: Any = require("onnx", extra="onnx", purpose="exporting to ONNX")
    types = {"image": onnx.TensorProto.FLOAT, "text": onnx.TensorProto.INT32}
    num_tensors = 0
    for kind, path in files.items():
        place = folder / _IMMICH_FOLDERS[kind]
        place.mkdir()
        proto = load(path)
        _set_ends(proto, kind, INPUTS[kind], f"unit_{kind}_features", types[kind])
        num_tensors += len(proto.graph.initializer)
        save(proto, place / "model.onnx")
    length = _context_length(files["text"])
    write_json(folder / "textual" / "tokenizer.json", tokenizer)
    write_json(folder / "textual" / "tokenizer_config.json", {**TOKENIZER_FIELDS, "model_max_length": length})
    resolution = config.vision.image_resolution
    write_json(
        folder / "visual" / "preprocess_cfg.json",
        {
            "size": [resolution, resolution],
            "mode": "RGB",
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "fill_color": 0,
        },
    )
    write_json(
        folder / "config.json",
        {
            "embed_dim": config.vision.embed_dim,
            "vision_cfg": {"image_size": resolution},
            "text_cfg": {"context_length": length, "vocab_size": config.text.vocab_size},
        },
    )
    return num_tensors


def write_transformers_js(
    folder: Path, source: Source, config: ModelConfig, forms: Sequence[str], *, say: Announce
) -> int:
    """A ChineseCLIPModel of transformers.js, into an existing folder; returns how many tensors it holds.

    `onnx/` holds, in each of the forms, both towers in one file, and each by itself, as CLIPTextModelWithProjection and
    CLIPVisionModelWithProjection open them. Raises as `exported.tower_files`, ConfigError for a model of another
    vocabulary, or too large for one file.
    """
    tokenizer = _tokenizer(source, config)
    place, num_tensors = folder / "onnx", 0
    place.mkdir()
    length = CONTEXT_LENGTH
    for form in forms:
        files = exported.tower_files(source, KINDS, form, say=say)
        length = _context_length(files["text"])
        if sum(map(_num_bytes, files.values())) > LARGEST_FILE:
            raise ConfigError(
                f"the towers in {form} are too large for one ONNX file, which ends at 2 GiB; convert them in fp16"
            )
        with working(both(f"合并两个塔（{form}）", f"joining the towers ({form})")):
            towers = {kind: load(path) for kind, path in files.items()}
            for kind, proto in towers.items():
                _set_ends(proto, kind, _JS_INPUTS[kind], _JS_OUTPUTS[kind])
                save(proto, place / f"{JS_NAMES[kind]}{JS_SUFFIXES[form]}.onnx")
            whole = _joined(towers["image"], towers["text"], _logit_scale(files["text"]))
            save(whole, place / f"{JS_WHOLE}{JS_SUFFIXES[form]}.onnx")
        num_tensors += len(whole.graph.initializer)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {**TOKENIZER_FIELDS, "model_max_length": length})
    pictures = PROCESSOR_FIELDS | picture_fields(config.vision.image_resolution) | _JS_PICTURES
    write_json(folder / PICTURE_FILE, pictures)
    write_json(
        folder / "config.json",
        {
            "architectures": ["ChineseCLIPModel"],
            "model_type": "chinese_clip",
            "projection_dim": config.vision.embed_dim,
            "text_config": {"model_type": "chinese_clip_text_model", "vocab_size": config.text.vocab_size},
            "vision_config": {
                "model_type": "chinese_clip_vision_model",
                "image_size": config.vision.image_resolution,
            },
        },
    )
    return num_tensors


def _tokenizer(source: Source, config: ModelConfig) -> dict[str, Any]:
    """A tokenizer.json that prepares texts as `ChineseTexts` does: quotes straightened, "[SEP]" three words."""
    try:
        content = tokenizer_json(config.text.vocab_size)
    except ConfigError as error:
        raise ConfigError(str(error), at=source.model) from error
    quotes = [
        {"type": "Replace", "pattern": {"String": curly}, "content": '"'}
        for curly in ("\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}")
    ]
    content["normalizer"] = {"type": "Sequence", "normalizers": [*quotes, content["normalizer"]]}
    # The vocabulary has them already; a text is searched for those named here.
    content["added_tokens"] = []
    return content


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, extra_path(path)) if file.is_file())


def _facts(path: Path) -> dict[str, Any]:
    text = {one.key: one.value for one in load(path, with_weights=False).metadata_props}.get(METADATA_KEY)
    return read_metadata(str(path), "text", text)


def _context_length(path: Path) -> int:
    return int(_facts(path).get("context_length") or CONTEXT_LENGTH)


def _logit_scale(path: Path) -> float:
    return float(_facts(path)["logit_scale"])


def _set_ends(proto: "ModelProto", kind: Kind, given: str, result: str, input_type: int | None = None) -> None:
    """Renames the input and the output of a tower; the input has another type if one is given, the output length 1."""
    onnx: Any = require("onnx", extra="onnx", purpose="exporting to ONNX")
    make, graph = onnx.helper.make_node, proto.graph
    (entry,) = graph.input
    own_type, inside = entry.type.tensor_type.elem_type, f"{INPUTS[kind]}_inside"
    for node in graph.node:
        node.input[:] = [inside if name == INPUTS[kind] else name for name in node.input]
    entry.name = given
    entry.type.tensor_type.elem_type = input_type or own_type
    entry.type.tensor_type.shape.dim[0].dim_param = f"{kind}_batch"
    graph.node.insert(0, make("Cast", [given], [inside], name=inside, to=own_type))
    (last,) = graph.output
    last.type.tensor_type.shape.dim[0].dim_param = f"{kind}_batch"
    length, floor, axis = (f"{kind}_{what}" for what in ("length", "smallest_length", "axis"))
    graph.initializer.extend(
        [
            onnx.helper.make_tensor(axis, onnx.TensorProto.INT64, [1], [-1]),
            onnx.helper.make_tensor(floor, onnx.TensorProto.FLOAT, [], [_SMALLEST_LENGTH]),
        ]
    )
    graph.node.extend(
        [
            make("ReduceL2", [OUTPUTS[kind], axis], [f"{length}_any"], name=f"{length}_any", keepdims=1),
            make("Max", [f"{length}_any", floor], [length], name=length),
            make("Div", [OUTPUTS[kind], length], [result], name=result),
        ]
    )
    last.name = result


def _joined(image: "ModelProto", text: "ModelProto", scale: float) -> "ModelProto":
    """Both towers in one graph, and the logits of every picture and text; `text` is used up.

    scale: the factor on cosines.
    """
    onnx: Any = require("onnx", extra="onnx", purpose="exporting to ONNX")
    for kind, proto in (("image", image), ("text", text)):
        _set_apart(proto, f"{kind}/", kept={*_JS_INPUTS.values(), *_JS_OUTPUTS.values(), ""})
    graph = image.graph
    for field in ("node", "initializer", "input", "output"):
        getattr(graph, field).extend(getattr(text.graph, field))
    make, number = onnx.helper.make_node, onnx.TensorProto.FLOAT
    graph.initializer.append(onnx.helper.make_tensor("logit_scale", number, [], [scale]))
    graph.node.extend(
        [
            make("Transpose", ["text_embeds"], ["text_columns"], name="text_columns", perm=[1, 0]),
            make("MatMul", ["image_embeds", "text_columns"], ["cosines"], name="cosines"),
            make("Mul", ["cosines", "logit_scale"], ["logits_per_image"], name="logits_per_image"),
            make("Transpose", ["logits_per_image"], ["logits_per_text"], name="logits_per_text", perm=[1, 0]),
        ]
    )
    rows, columns = "image_batch", "text_batch"
    graph.output.extend(
        [
            onnx.helper.make_tensor_value_info("logits_per_image", number, [rows, columns]),
            onnx.helper.make_tensor_value_info("logits_per_text", number, [columns, rows]),
        ]
    )
    set_metadata(image, {})
    return image


def _set_apart(proto: "ModelProto", prefix: str, *, kept: Collection[str]) -> None:
    """Puts a prefix before all names of a graph but those kept."""

    def renamed(name: str) -> str:
        return name if name in kept else prefix + name

    for node in proto.graph.node:
        node.name = prefix + node.name
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
    for tensor in proto.graph.initializer:
        tensor.name = renamed(tensor.name)
