"""CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark) with any model of `Encoder`, as its model type `cn_clip`.

    python -m cn_clip.evaluation.clip_benchmark eval --model_type cn_clip --model ViT-B-16 --pretrained fp32 \\
        --dataset cifar100 --language cn --task zeroshot_classification

does as the command `clip_benchmark` would if it knew these models. `--pretrained` takes the precision. A program calls
`register()`, or `load` by itself. `retrieval_pairs` gives the splits that `cn-clip evaluate` reads as its datasets.
"""

# B batch, R resolution, L tokens, D embedding

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cn_clip.clip.encoder import Encoder
from cn_clip.clip.pictures import open_picture
from cn_clip.data.lmdb_store import IMAGES
from cn_clip.data.pictures import LmdbPictures
from cn_clip.data.records import RecordId, read_texts
from cn_clip.evaluation import annotations
from cn_clip.evaluation.retrieval import check_split
from cn_clip.extras import require

MODEL_TYPE = "cn_clip"


class Towers(nn.Module):
    """The towers of an `Encoder`, of any backend, as CLIP_benchmark calls them."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def encode_image(self, pixels_B3RR: Tensor) -> Tensor:
        """Unit rows (B, D) float32 of pixels that `encoder.transform` made."""
        return torch.from_numpy(self.encoder.encode_pixels(pixels_B3RR.float().cpu().numpy())).to(pixels_B3RR.device)

    def encode_text(self, token_ids_BL: Tensor) -> Tensor:
        """Unit rows (B, D) float32 of token ids (B, L)."""
        return torch.from_numpy(self.encoder.encode_tokens(token_ids_BL.cpu().numpy())).to(token_ids_BL.device)


class Tokens:
    """The tokenizer of an `Encoder`: texts to token ids, int64 (B, L)."""

    def __init__(self, encoder: Encoder) -> None:
        self._texts = encoder.texts

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        given = [texts] if isinstance(texts, str) else list(texts)
        return torch.from_numpy(self._texts.pad(self._texts.rows(given)))


def load(
    model_name: str = "ViT-B-16",
    pretrained: str = "fp32",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any, Tokens]:
    """Model, transform and tokenizer, as CLIP_benchmark's loaders return them.

    model_name: any name, file or folder that `Encoder` takes. pretrained: the precision. cache_dir: where downloads are
    kept. Raises as `Encoder`.
    """
    encoder = Encoder(model_name, precision=pretrained, device=str(device), download_root=cache_dir)
    return Towers(encoder), encoder.transform, Tokens(encoder)


def register() -> None:
    """Makes `cn_clip` one of CLIP_benchmark's model types; raises MissingExtraError without the package."""
    models = require("clip_benchmark.models", extra="clip-benchmark", purpose="CLIP_benchmark")
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


class RetrievalPairs:
    """The pictures of a split that `cn-clip evaluate` reads, each with the texts that belong to it: (pixels, texts).

    `collate` makes batches of them, for `clip_benchmark.metrics.zeroshot_retrieval.evaluate`. A picture without texts
    has none, and takes part as one that is found.
    """

    def __init__(self, data: str | Path, split: str, transform: Any) -> None:
        """Raises DataError saying which part of the split is missing."""
        folder = Path(data)
        check_split(folder, split)
        file = folder / f"{split}_texts.jsonl"
        self._pictures, self._transform = LmdbPictures(folder / "lmdb" / split / IMAGES), transform
        self._texts: dict[RecordId, list[str]] = {}
        texts = dict(read_texts(file))
        for text_id, image_ids in annotations.read_relevant(str(file)):
            for image_id in image_ids:
                self._texts.setdefault(image_id, []).append(texts[text_id])

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        stored = self._pictures[index]
        return self._transform(open_picture(stored.data, name=str(stored.where))), self._texts.get(stored.key, [])

    @staticmethod
    def collate(batch: Sequence[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[list[str]]]:
        """Pixels (B, 3, R, R), and the texts of each picture."""
        return torch.stack([pixels for pixels, _ in batch]), [texts for _, texts in batch]


def main() -> None:
    """CLIP_benchmark's own command line, which knows the model type `cn_clip`."""
    register()
    require("clip_benchmark.cli", extra="clip-benchmark", purpose="CLIP_benchmark").main()


if __name__ == "__main__":
    main()
