"""How pictures and texts become the numbers a model takes: Chinese-CLIP's way, and the protocols of any other."""

# R resolution, B batch, L tokens

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cn_clip import zoo
from cn_clip.clip import tokenizer
from cn_clip.clip.backends.base import Backend, Pixels, TokenIds

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


logger = logging.getLogger(__name__)


class PictureTransform(Protocol):
    """From a PIL picture of any mode to normalised pixels; called by several threads at once."""

    @property
    def resolution(self) -> int:
        """R, pixels a side."""
        ...

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        ...

    def array(self, image: "Image", out: Pixels | None = None) -> Pixels:
        """float32 (3, R, R), in `out` where it is given."""
        ...

    def __call__(self, image: "Image") -> "torch.Tensor":
        """The same pixels as a tensor."""
        ...


class TextTransform(Protocol):
    """From texts, as people wrote them, to token ids; called by several threads at once."""

    @property
    def context_length(self) -> int:
        """The longest row, special tokens included; longer texts are cut."""
        ...

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, before padding. Raises TypeError for what is not a str."""
        ...

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenIds:
        """Rows of ids as the text tower takes them: int64 (B, L), padded to the longest or to a fixed length."""
        ...


def preprocess_text(text: str) -> str:
    """Lower-cased, curly double quotes straightened: how Chinese-CLIP adapts text to its vocabulary."""
    return text.lower().replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"')


@dataclass(frozen=True)
class ChineseTexts:
    """Chinese-CLIP's: `preprocess_text`, its tokenizer, zeros up to the longest row. `clip.tokenize` skips the first.

    context_length: the longest row. Raises ConfigError from `rows` where it is below 2.
    """

    context_length: int

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, prepared, [CLS] and [SEP] included, cut at context_length; raises TypeError."""
        return tokenizer.encode(map(preprocess_text, tokenizer.checked_texts(texts)), self.context_length)

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenIds:
        """Rows of different lengths as one int64 array (B, longest row), padded with 0."""
        return tokenizer.pad(rows, max(map(len, rows), default=0))


def text_length(asked: int, trained: int | None, model: object) -> int:
    """The longest text in tokens: `asked`, but when nobody asked (zoo.CONTEXT_LENGTH) what the model was trained with.

    trained: what its checkpoint says, None for one that says nothing. Warns when another length is asked for.
    """
    if trained is None or trained == asked:
        return int(asked)
    if isinstance(asked, zoo.UsualLength):
        logger.info("texts are cut at %d tokens, as %s was trained", trained, model)
        return trained
    logger.warning("context length %d: %s was trained with texts of at most %d tokens", asked, model, trained)
    return asked


@dataclass(frozen=True)
class Parts:
    """All that an `Encoder` needs: towers, and how their inputs are made."""

    backend: Backend
    pictures: PictureTransform
    texts: TextTransform
