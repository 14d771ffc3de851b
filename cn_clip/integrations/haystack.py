"""`Encoder` as components of Haystack: one for queries, one for documents of texts, one for documents of pictures."""

import dataclasses
from typing import Any

from cn_clip.clip.encoder import Encoder
from cn_clip.errors import DataError
from cn_clip.extras import require

_PURPOSE = "cn_clip.integrations.haystack"
_core: Any = require("haystack", extra="haystack", purpose=_PURPOSE)
_serialization: Any = require("haystack.core.serialization", extra="haystack", purpose=_PURPOSE)
component: Any = _core.component
default_from_dict, default_to_dict = _serialization.default_from_dict, _serialization.default_to_dict


class _Component:
    """Opens its model at `warm_up`, or when it first runs.

    A pipeline of it can be written to YAML; Haystack reads it with `allowed_modules=["cn_clip.integrations.haystack"]`.
    """

    def __init__(self, model: str = "ViT-B-16", settings: dict[str, Any] | None = None) -> None:
        """model: what `Encoder` opens; settings: the rest of what it takes, as YAML can hold it."""
        self.model, self.settings = model, settings or {}
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """The open model; raises as `Encoder`."""
        self._encoder = self._encoder or Encoder(self.model, **self.settings)
        return self._encoder

    def warm_up(self) -> None:
        """Opens the model before the pipeline runs."""
        _ = self.encoder

    def to_dict(self) -> dict[str, Any]:
        """What is written to YAML."""
        content: dict[str, Any] = default_to_dict(self, model=self.model, settings=self.settings)
        return content

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The component that `to_dict` described."""
        return default_from_dict(cls, data)


@component
class CnClipTextEmbedder(_Component):
    """The row of a query: `run(text)` gives `embedding`, D floats."""

    @component.output_types(embedding=list[float])  # type: ignore[untyped-decorator]
    def run(self, text: str) -> dict[str, Any]:
        """Raises as `Encoder.encode_texts`."""
        return {"embedding": self.encoder.encode_texts([text])[0].tolist()}


@component
class CnClipDocumentEmbedder(_Component):
    """Documents with the rows of their `content`: `run(documents)` gives new documents with `embedding`."""

    @component.output_types(documents=list[_core.Document])  # type: ignore[untyped-decorator]
    def run(self, documents: list[Any]) -> dict[str, Any]:
        """Raises DataError for a document without a text, else as `Encoder.encode_texts`."""
        for number, one in enumerate(documents):
            if not isinstance(one.content, str):
                raise DataError(f"documents[{number}]: has no text in `content`; pictures go to CnClipImageEmbedder")
        return {"documents": _with_rows(documents, self.encoder.encode_texts([one.content for one in documents]))}


@component
class CnClipImageEmbedder(_Component):
    """Documents with the rows of the pictures that `meta["file_path"]` names, or whose bytes are in `blob`."""

    @component.output_types(documents=list[_core.Document])  # type: ignore[untyped-decorator]
    def run(self, documents: list[Any]) -> dict[str, Any]:
        """Raises DataError for a document without a picture, else as `Encoder.encode_images`."""
        pictures = [one.blob.data if one.blob is not None else one.meta.get("file_path") for one in documents]
        if None in pictures:
            number = pictures.index(None)
            raise DataError(f"documents[{number}]: has no picture, neither meta['file_path'] nor bytes in `blob`")
        return {"documents": _with_rows(documents, self.encoder.encode_images(pictures))}


def _with_rows(documents: list[Any], rows_ND: Any) -> list[Any]:
    """New documents: those given may belong to a store."""
    return [dataclasses.replace(one, embedding=row) for one, row in zip(documents, rows_ND.tolist(), strict=True)]
