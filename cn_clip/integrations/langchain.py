"""`Encoder` as LangChain's `Embeddings`: `CnClipEmbeddings("ViT-B-16")` for any vector store of LangChain."""

from typing import Any

from cn_clip.clip.encoder import Encoder
from cn_clip.clip.pictures import Pictures
from cn_clip.extras import require

_PURPOSE = "cn_clip.integrations.langchain"
_Embeddings: Any = require("langchain_core.embeddings", extra="langchain", purpose=_PURPOSE).Embeddings


class CnClipEmbeddings(_Embeddings):  # type: ignore[misc]
    """Unit rows of texts and pictures as lists of floats; cosine, inner product and distance rank them alike.

    model: what `Encoder` opens, with its settings, or an Encoder. The async methods of LangChain run these in threads.
    """

    def __init__(self, model: "str | Encoder" = "ViT-B-16", **settings: Any) -> None:
        self.encoder = model if isinstance(model, Encoder) else Encoder(model, **settings)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """(N, D) floats of texts; raises as `Encoder.encode_texts`."""
        rows: list[list[float]] = self.encoder.encode_texts(texts).tolist()
        return rows

    def embed_query(self, text: str) -> list[float]:
        """D floats of a text; raises as `Encoder.encode_texts`."""
        return self.embed_documents([text])[0]

    def embed_image(self, uris: Pictures) -> list[list[float]]:
        """(N, D) floats of pictures, as `Chroma.add_images` asks for them; raises as `Encoder.encode_images`."""
        rows: list[list[float]] = self.encoder.encode_images(uris).tolist()
        return rows
