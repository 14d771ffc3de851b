"""The settings with which `evaluate` and `linear-probe` name a model: a published name, or weights of one's own."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cn_clip import settings, zoo
from cn_clip.clip import choice
from cn_clip.clip.choice import DEFAULT_MODEL, Choice
from cn_clip.errors import ConfigError
from cn_clip.option_types import NumWorkers
from cn_clip.settings import Range

# The folder of a run in which the training keeps its checkpoints; all runs name them alike.
_CHECKPOINTS = "checkpoints"
_USUAL = frozenset({"torch", "fp32", "amp"})


@dataclass(frozen=True)
class ModelChoice(choice.ModelSettings):
    """Which model computes the features, and how."""

    model: str | None = None
    """A published or bundled model, or one of another family, hf:FOLDER or open_clip:ARCHITECTURE@FILE; ViT-B-16 if no
    checkpoint is given. Beside --checkpoint: the model whose weights these are"""
    checkpoint: str | None = None
    """Weights of your own: a file or a transformers folder"""
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pictures, and texts, in a batch"""
    num_workers: NumWorkers = 4
    decode: choice.Decoding = "exact"

    def __post_init__(self) -> None:
        if self.model and self.checkpoint and zoo.named(self.model) is None:
            raise ConfigError(
                f"--model {self.model}: beside --checkpoint it says what the weights are of; "
                f"expected one of {', '.join(zoo.available_models())}"
            )
        choice.check(self.chosen)
        settings.check(self)

    @property
    def chosen(self) -> Choice:
        """What is opened: the checkpoint, with the towers of the model it is said to be of, or that model."""
        named = zoo.named(self.model) if self.model and self.checkpoint else None
        return replace(
            super().chosen,
            model=self.checkpoint or self.model or DEFAULT_MODEL,
            vision=named.vision if named else None,
            text=named.text if named else None,
            decode=self.decode,
        )

    @property
    def model_name(self) -> str | None:
        """The model meant; None for a checkpoint of which nothing is said."""
        return self.model or (None if self.checkpoint else DEFAULT_MODEL)

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
            return [self.model or DEFAULT_MODEL]
        path = Path(os.path.abspath(self.checkpoint))
        is_of_run = path.parent.name == _CHECKPOINTS
        return [path.parent.parent.name, path.stem] if is_of_run else [path.stem]
