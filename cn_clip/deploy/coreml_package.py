"""From a model in PyTorch to Core ML packages; `pytorch_to_coreml` writes them."""

# B batch, R resolution, L tokens, D embedding

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cn_clip.clip.backends.base import TowerFacts
from cn_clip.clip.backends.export import facts_of_model
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.backends.onnx_files import METADATA_KEY, metadata
from cn_clip.clip.model import CLIP
from cn_clip.clip.tokenizer import text_length as text_length
from cn_clip.clip.transforms import MEAN, STD
from cn_clip.deploy.towers import open_arch as open_arch
from cn_clip.errors import CheckpointError, ConfigError, DataError
from cn_clip.extras import require
from cn_clip.files import staged_folder
from cn_clip.language import both
from cn_clip.progress import working

Precision = Literal["fp16", "fp32"]
OUTPUTS: dict[Kind, str] = {"image": "image_features", "text": "text_features"}


def package_path(prefix: str | Path, kind: Kind) -> Path:
    """`PREFIX.image.mlpackage`: the folder of a tower."""
    return Path(f"{prefix}.{kind}.mlpackage")


def write_package(
    model: CLIP, kind: Kind, path: Path, *, precision: Precision, batch_size: int, context_length: int
) -> dict[str, Any]:
    """Writes one tower of a float32 model in eval mode as an ML program for iOS 15 and macOS 12 or later.

    Inputs: `image` float32 (B, 3, R, R), normalised pixels; `text` int32 (B, L), padded with 0. Outputs:
    `image_features`, `text_features`, float32 (B, D), not normalised. B is `batch_size`, L `context_length`.
    precision: of weights and arithmetic. The folder appears whole or not at all. Returns the number of operations
    and the bytes of the weights. Raises MissingExtraError without `coremltools`, CheckpointError when it cannot
    convert the tower, ConfigError for more tokens than the model takes, DataError when it cannot be written.
    """
    longest = model.config.text.text_max_position_embeddings
    if kind == "text" and context_length > longest:
        raise ConfigError(f"--context-length {context_length}: this model takes texts of at most {longest} tokens")
    facts = replace(
        facts_of_model(model, kind),
        precision=precision,
        batch=batch_size,
        length=context_length if kind == "text" else None,
    )
    with working(both(f"转换成 Core ML（{kind}）", f"converting to Core ML ({kind})")), _quietly():
        tools: Any = require("coremltools", extra="coreml", purpose="exporting to Core ML")
        try:
            package = _converted(tools, model, facts)
        except OSError as error:  # it writes the weights to a temporary folder
            raise _not_written(path, error) from error
        except Exception as error:  # coremltools raises errors of many types
            raise CheckpointError(
                f"coremltools {tools.__version__} could not convert the {kind} tower traced by PyTorch "
                f"{torch.__version__} ({_first_line(error)}); install a PyTorch it was tested with",
                at=path.name,
            ) from error
        _describe(package, facts)
        with staged_folder(path) as folder:
            try:
                _save(package, folder)
            except Exception as error:
                raise _not_written(path, error) from error
    (function,) = package.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    num_operations = sum(operation.type != "const" for operation in block.operations)
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"num_operations": num_operations, "num_bytes": num_bytes}


def _converted(tools: Any, model: CLIP, facts: TowerFacts) -> Any:
    if facts.kind == "image":
        example = torch.zeros(facts.batch or 1, 3, facts.resolution or 0, facts.resolution or 0)
    else:
        example = torch.ones(facts.batch or 1, facts.length or 0, dtype=torch.int32)  # Core ML has no int64
    trace: Any = torch.jit.trace
    with torch.no_grad():
        traced = trace(ENCODERS[facts.kind](model).eval(), (example,))
    return tools.convert(
        traced,
        inputs=[tools.TensorType(name=facts.kind, shape=tuple(example.shape), dtype=example.numpy().dtype.type)],
        outputs=[tools.TensorType(name=OUTPUTS[facts.kind])],
        convert_to="mlprogram",
        compute_precision=tools.precision.FLOAT16 if facts.precision == "fp16" else tools.precision.FLOAT32,
        minimum_deployment_target=tools.target.iOS15,
        skip_model_load=True,
    )


class ImageEncoder(nn.Module):
    """The picture tower as a module of one input, as tracing wants it."""

    def __init__(self, clip_model: CLIP) -> None:
        super().__init__()
        self.clip_model = clip_model

    def forward(self, image: Tensor) -> Tensor:
        """Normalised pixels (B, 3, R, R) to features (B, D)."""
        return self.clip_model.encode_image(image)


class TextEncoder(nn.Module):
    """The text tower as a module of one input, as tracing wants it."""

    def __init__(self, clip_model: CLIP) -> None:
        super().__init__()
        self.clip_model = clip_model

    def forward(self, text: Tensor) -> Tensor:
        """Token ids (B, L) to features (B, D)."""
        return self.clip_model.encode_text(text)


ENCODERS: dict[Kind, type[nn.Module]] = {"image": ImageEncoder, "text": TextEncoder}


def _describe(package: Any, facts: TowerFacts) -> None:
    """What Xcode shows of a model, and the facts for programs."""
    package.short_description = f"Chinese-CLIP, {facts.kind} tower: {facts.embed_dim} dimensions, {facts.precision}"
    package.user_defined_metadata[METADATA_KEY] = metadata(facts)
    package.input_description[facts.kind] = (
        f"RGB pixels scaled to {facts.resolution} x {facts.resolution} (bicubic), (value / 255 - mean) / std with mean "
        f"{MEAN} and std {STD}"
        if facts.kind == "image"
        else f"Token ids with [CLS] and [SEP], padded with 0 to {facts.length}"
    )
    package.output_description[OUTPUTS[facts.kind]] = "Features, not normalised: divide each row by its length"


def _save(package: Any, folder: Path) -> None:
    """The contents of the package, without the folder around them, which coremltools insists on naming."""
    inner = folder / "whole.mlpackage"
    package.save(os.fspath(inner))
    for part in inner.iterdir():
        part.rename(folder / part.name)
    inner.rmdir()


def _not_written(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
    return DataError(f"cannot be written ({reason}); make room or choose another folder", at=path.name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what coremltools prints: parts that only macOS has, versions it was not tested with, its every pass."""
    logger = logging.getLogger("coremltools")
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(previous)
