"""Retrieval with computed features: what each query finds, for the top-k commands and for benchmarks."""

import time
from collections.abc import Iterator, Mapping

import torch
from tqdm import tqdm

from cn_clip.command import Speaker
from cn_clip.data.records import RecordId
from cn_clip.errors import DataError
from cn_clip.evaluation.annotations import FIELDS, Direction, line_of
from cn_clip.features.files import read_features
from cn_clip.features.rows import Features
from cn_clip.files import atomic_write
from cn_clip.retrieval.flat import GALLERY_BLOCK, top_k

OTHER: dict[Direction, Direction] = {"text": "image", "image": "text"}
_QUERIES_A_STEP = 1024


def search(
    queries: Features, gallery: Features, k: int, *, device: torch.device, block: int = GALLERY_BLOCK
) -> Iterator[tuple[RecordId, list[RecordId]]]:
    """Yields (query id, ids of the k vectors of the gallery with the largest products), in the order of the queries.

    Best first; equal ones in the order of the gallery. block: vectors of the gallery that are compared at a time.
    """
    with tqdm(total=len(queries.ids), desc="search", unit="query") as bar:
        for start in range(0, len(queries.ids), _QUERIES_A_STEP):
            step = slice(start, start + _QUERIES_A_STEP)
            found = top_k(queries.vectors[step], gallery.vectors, k, gallery_block=block, device=device)
            for query_id, row in zip(queries.ids[step], found.indices.tolist(), strict=True):
                yield query_id, [gallery.ids[position] for position in row]
            bar.update(len(found.indices))


def write_predictions(
    output: str,
    features: Mapping[Direction, str],
    query: Direction,
    k: int,
    *,
    block: int,
    device: torch.device,
    say: Speaker,
) -> dict[str, int | float]:
    """Searches with the feature files of both sides and writes a line for each query; returns counts and seconds.

    Raises DataError for faulty or unlike feature files; the output appears whole or not at all.
    """
    searched = OTHER[query]
    with atomic_write(output) as stream:
        started = time.perf_counter()
        say(f"Begin to load {searched} features...")
        gallery = read_features(features[searched], FIELDS[searched].query_id, progress=True)
        say(f"Finished loading {searched} features.")
        say(f"Begin to compute top-{k} predictions for {query}s...")
        queries = read_features(features[query], FIELDS[query].query_id, progress=True)
        wide, other = queries.vectors.shape[1], gallery.vectors.shape[1]
        if wide != other:
            raise DataError(
                f"the {query} features have {wide} numbers, the others {other}; extract both with the same model",
                at=f"{features['image']} and {features['text']}",
            )
        loaded = time.perf_counter()
        for query_id, found in search(queries, gallery, k, block=block, device=device):
            stream.write(line_of(query, query_id, found))
    counts = {"num_queries": len(queries.ids), "num_searched": len(gallery.ids), "top_k": k}
    return counts | {"load_seconds": loaded - started, "search_seconds": time.perf_counter() - loaded}
