"""From datasets to feature files: what the extraction commands of every backend share."""

# N inputs, D embedding

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from cn_clip.clip.backends.base import Backend, Pixels, Rows
from cn_clip.clip.encoder import SORTING_WINDOW, Encoder
from cn_clip.data.records import RecordId
from cn_clip.data.texts import preprocess_text
from cn_clip.eval.feature_files import write_features


def default_text_path(text_data: str) -> str:
    """Where text features go when nothing is said: `X_texts.jsonl` to `X_texts.txt_feat.jsonl`."""
    return f"{text_data.removesuffix('.jsonl')}.txt_feat.jsonl"


def default_image_path(text_data: str) -> str:
    """Where picture features go when nothing is said: beside the texts, `X_texts.jsonl` to `X_imgs.img_feat.jsonl`."""
    return f"{text_data.replace('_texts.jsonl', '_imgs')}.img_feat.jsonl"


def extract_texts(encoder: Encoder, texts: Sequence[tuple[RecordId, str]], path: str | Path, *, batch_size: int) -> int:
    """Writes the unit feature of each text, in order; returns how many."""

    def batches(bar: "tqdm[None]") -> Iterator[tuple[list[RecordId], Rows]]:
        for start in range(0, len(texts), SORTING_WINDOW):
            window = texts[start : start + SORTING_WINDOW]
            prepared = [preprocess_text(text) for _, text in window]
            # Computed once, equal texts have equal vectors; in batches of other shapes the last digits would differ.
            rows_of = {text: row for row, text in enumerate(dict.fromkeys(prepared))}
            (rows,) = encoder.encode_text_windows(list(rows_of), batch_size=batch_size, advance=bar.update)
            bar.update(len(prepared) - len(rows_of))
            yield [text_id for text_id, _ in window], rows[[rows_of[text] for text in prepared]]

    with tqdm(total=len(texts), unit="text") as bar:
        return write_features(path, "text_id", batches(bar))


def extract_images(
    backend: Backend, batches: Iterable[tuple[list[RecordId], Pixels]], num_images: int, path: str | Path
) -> int:
    """Writes the unit feature of each picture, in the order of `batches` (ids, pixels); returns how many."""

    def encoded() -> Iterator[tuple[list[RecordId], Rows]]:
        with tqdm(total=num_images, unit="picture") as bar:
            for ids, pixels in batches:
                yield ids, backend.encode_pixels(pixels)
                bar.update(len(ids))

    return write_features(path, "image_id", encoded())
