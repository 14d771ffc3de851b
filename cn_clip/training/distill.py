"""Distillation: the teacher, whose picture features the student learns too, and the loss between the two."""

# B batch, R resolution, N rows of a batch, D features

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip import zoo
from cn_clip.clip.loading import open_model
from cn_clip.errors import CheckpointError, ConfigError, DownloadError
from cn_clip.extras import require
from cn_clip.training.logs import logger

Encode = Callable[[Tensor], Any]

# Where the picture encoder sits in the models of ModelScope that Chinese-CLIP names as teachers, by their kind.
MODELSCOPE_ENCODERS = (("clip_model", "encode_image"), ("model", "encode_image"), ("model", "image_model"))
_MODELSCOPE_ID = re.compile(r"[\w-]+/[\w.-]+")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class Teacher:
    """A picture tower that is not trained. `encode` takes pixels and returns features, or a tuple that begins so.

    resolution: what pixels are resized to (bicubic, antialiased); None: they are handed over as they are.
    """

    def __init__(self, encode: Encode, *, resolution: int | None) -> None:
        self.encode, self.resolution = encode, resolution

    @torch.no_grad()
    def features(self, pixels_B3RR: Tensor) -> Tensor:
        """Features (B, D), float32, not normalised, without gradient; mixed precision as the caller has it."""
        output = self.encode(self._resized(pixels_B3RR.float()))
        features_BD: Tensor = output[0] if isinstance(output, tuple) else output
        return features_BD.float()

    def _resized(self, pixels_B3RR: Tensor) -> Tensor:
        if self.resolution in (None, pixels_B3RR.shape[-1]):
            return pixels_B3RR
        size = [self.resolution, self.resolution]
        return F.interpolate(pixels_B3RR, size=size, mode="bicubic", antialias=True, align_corners=False)


def open_teacher(name: str, device: torch.device | str) -> Teacher:
    """The teacher of this name on `device`: a checkpoint file, a model's name, or "OWNER/MODEL" on ModelScope.

    Raises CheckpointError for a file that cannot be read or a name that is not known, ConfigError for a ModelScope
    model that encodes no pictures, DownloadError when ModelScope fails, MissingExtraError without its package.
    """
    is_local = zoo.named(name) is not None or Path(name).exists() or name.endswith(_WEIGHT_SUFFIXES)
    if not is_local and _MODELSCOPE_ID.fullmatch(name):
        return _modelscope_teacher(name, device)
    model, _ = open_model(name)
    del model.bert  # the text tower would only take memory
    _frozen(model, device)
    logger.info("Teacher model loaded from %s (%d features)", name, model.config.vision.embed_dim)
    return Teacher(model.encode_image, resolution=model.resolution)


def _modelscope_teacher(name: str, device: torch.device | str) -> Teacher:
    models = require("modelscope.models", extra="modelscope", purpose=f"the teacher {name} from ModelScope")
    try:
        model = models.Model.from_pretrained(name)
    except Exception as error:  # whatever its loaders raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Unexpected key(s) in state_dict" in reason:
            raise CheckpointError(f"{name} on ModelScope: {reason}; try pip install --upgrade modelscope") from error
        raise DownloadError(
            f"{name} on ModelScope: {reason}; try again, or give --teacher-model-name a checkpoint file or ViT-L-14"
        ) from error
    encode = _modelscope_encoder(model, name)
    _frozen(model, device)
    logger.info("Teacher model loaded from %s", name)
    return Teacher(encode, resolution=None)


def _modelscope_encoder(model: nn.Module, name: str) -> Encode:
    for part, method in MODELSCOPE_ENCODERS:
        encode = getattr(getattr(model, part, None), method, None)
        if callable(encode):
            found: Encode = encode
            return found
    expected = ", ".join(".".join(path) for path in MODELSCOPE_ENCODERS)
    raise ConfigError(f"--teacher-model-name {name}: a {type(model).__name__} has none of {expected} for pictures")


def _frozen(model: nn.Module, device: torch.device | str) -> None:
    model.requires_grad_(False).eval().to(device)


def feature_distillation_loss(teacher_ND: Tensor, student_ND: Tensor) -> Tensor:
    """1 - the mean cosine of the rows, in float32, in [0, 2]; gradients reach both arguments.

    The numbers of features may differ: the student's rows are then stretched or shrunk to the teacher's by linear
    interpolation, as Chinese-CLIP does. Raises ValueError when the numbers of rows differ.
    """
    if len(teacher_ND) != len(student_ND):
        raise ValueError(f"{len(teacher_ND)} rows of the teacher, but {len(student_ND)} of the student")
    teacher_ND, student_ND = teacher_ND.float(), student_ND.float()
    if teacher_ND.shape[1] != student_ND.shape[1]:
        student_N1D = student_ND.unsqueeze(1)
        stretched = F.interpolate(student_N1D, size=teacher_ND.shape[1], mode="linear", align_corners=False)
        student_ND = stretched.squeeze(1)
    return 1 - F.cosine_similarity(teacher_ND, student_ND, dim=1).mean()
