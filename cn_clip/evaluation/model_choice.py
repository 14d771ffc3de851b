"""The settings with which `evaluate` and `linear-probe` name a model: a published name, or weights of one's own."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cn_clip import settings, zoo
from cn_clip.clip import choice
from cn_clip.clip.backends.base import DEFAULT_CONTEXT_LENGTH
from cn_clip.errors import ConfigError
from cn_clip.option_types import BackendDevice, DownloadRoot, NumThreads, NumWorkers
from cn_clip.settings import Range

DEFAULT_MODEL = "ViT-B-16"
# The folder of a run in which the training keeps its checkpoints; all runs name them alike.
_CHECKPOINTS = "checkpoints"
_USUAL = frozenset({"torch", "fp32", "amp"})


@dataclass(frozen=True)
class ModelChoice:
    """Which model computes the features, and how; `cn_clip.clip.choice` opens it."""

    model: str | None = None
    """A published or bundled model, or one of another family, hf:FOLDER or open_clip:ARCHITECTURE@FILE; ViT-B-16 if no
    checkpoint is given. Beside --checkpoint: the model whose weights these are"""
    checkpoint: str | None = None
    """Weights of your own: a file or a transformers folder"""
    backend: choice.Runner = "torch"
    precision: choice.EvalPrecision = "fp32"
    """Arithmetic; amp is fp32. auto: the fastest close to it (cosine 0.999) that the device has. int8: onnx and
    openvino"""
    device: BackendDevice = "auto"
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pictures, and texts, in a batch"""
    num_workers: NumWorkers = 4
    num_threads: NumThreads = None
    decode: choice.Decoding = "exact"
    download_root: DownloadRoot = None

    def __post_init__(self) -> None:
        if self.model and self.checkpoint and zoo.named(self.model) is None:
            raise ConfigError(
                f"--model {self.model}: beside --checkpoint it says what the weights are of; "
                f"expected one of {', '.join(zoo.available_models())}"
            )
        choice.check(self)
        settings.check(self)

    @property
    def resume(self) -> str:
        """What is opened."""
        return self.checkpoint or self.model or DEFAULT_MODEL

    @property
    def model_name(self) -> str | None:
        """The model meant; None for a checkpoint of which nothing is said."""
        return self.model or (None if self.checkpoint else DEFAULT_MODEL)

    @property
    def context_length(self) -> int:
        """Longest text in tokens; commands that read texts have it as a setting."""
        return DEFAULT_CONTEXT_LENGTH

    @property
    def file_name(self) -> str:
        """The model in the names of files: letters of words, digits, `-` and `.` alone.

        A checkpoint of a run has the name of the run before its own; backend and precision follow where they are not
        the usual ones.
        """
        arithmetic = [one for one in (self.backend, self.precision) if one not in _USUAL]
        return re.sub(r"[^\w.-]+", "_", "-".join([*self._name_parts, *arithmetic]))

    @property
    def _name_parts(self) -> list[str]:
        if not self.checkpoint:
            return [self.resume]
        path = Path(os.path.abspath(self.checkpoint))
        is_of_run = path.parent.name == _CHECKPOINTS
        return [path.parent.parent.name, path.stem] if is_of_run else [path.stem]

    @property
    def vision_model(self) -> str | None:
        """The picture tower of a checkpoint said to be of a model; None: what the weights hold."""
        named = self._named
        return named.vision if named else None

    @property
    def text_model(self) -> str | None:
        """The text tower, likewise."""
        named = self._named
        return named.text if named else None

    @property
    def _named(self) -> zoo.Published | zoo.Bundled | None:
        return zoo.named(self.model) if self.model and self.checkpoint else None
