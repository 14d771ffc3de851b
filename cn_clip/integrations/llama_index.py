"""`Encoder` as LlamaIndex's `MultiModalEmbedding`: `CnClipEmbedding("ViT-B-16")` for texts and pictures of an index."""

import asyncio
from typing import Any

from cn_clip.clip.encoder import Encoder
from cn_clip.extras import require

_PURPOSE = "cn_clip.integrations.llama_index"
_Base: Any = require(
    "llama_index.core.embeddings.multi_modal_base", extra="llama-index", purpose=_PURPOSE
).MultiModalEmbedding
_private: Any = require("llama_index.core.bridge.pydantic", extra="llama-index", purpose=_PURPOSE).PrivateAttr


class CnClipEmbedding(_Base):  # type: ignore[misc]
    """Unit rows of texts and pictures as lists of floats.

    model: what `Encoder` opens, with its settings, or an Encoder. Its other fields, such as `embed_batch_size`, are
    those of LlamaIndex, given by name. The async methods compute in a thread.
    """

    _encoder: Any = _private()

    def __init__(self, model: "str | Encoder" = "ViT-B-16", *, embed_batch_size: int = 64, **settings: Any) -> None:
        encoder = model if isinstance(model, Encoder) else Encoder(model, **settings)
        super().__init__(model_name=encoder.model_name or "cn_clip", embed_batch_size=embed_batch_size)
        self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex writes into its files."""
        return "CnClipEmbedding"

    def _texts(self, texts: list[str]) -> list[list[float]]:
        rows: list[list[float]] = self._encoder.encode_texts(texts).tolist()
        return rows

    def _pictures(self, pictures: list[Any]) -> list[list[float]]:
        rows: list[list[float]] = self._encoder.encode_images(pictures).tolist()
        return rows

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._texts(texts)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._texts([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._texts([query])[0]

    def _get_image_embeddings(self, img_file_paths: list[Any]) -> list[list[float]]:
        return self._pictures(img_file_paths)

    def _get_image_embedding(self, img_file_path: Any) -> list[float]:
        return self._pictures([img_file_path])[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._texts, texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await asyncio.to_thread(self._texts, [query]))[0]

    async def _aget_image_embeddings(self, img_file_paths: list[Any]) -> list[list[float]]:
        return await asyncio.to_thread(self._pictures, img_file_paths)

    async def _aget_image_embedding(self, img_file_path: Any) -> list[float]:
        return (await asyncio.to_thread(self._pictures, [img_file_path]))[0]
