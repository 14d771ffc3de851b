"""The engines by their names: what each needs, and how it is opened. `store` and `writer` ask this table.

A new engine is a row of `ENGINES` and a name in `manifest.EngineName`. Files that it derives from single segments are
rows of `derived.KINDS`; a file of all rows, as the graph is, is written by `IndexWriter.finish`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip.retrieval import graph
from cn_clip.retrieval.engines import Engine, ExactEngine, Rows
from cn_clip.retrieval.manifest import EngineName, Manifest
from cn_clip.retrieval.quantized import QuantizedEngine, require_kernel


@dataclass(frozen=True)
class Kind:
    """An engine.

    require: raises MissingExtraError where a package that it needs is not installed. load: opens it for the rows of an
    index in a folder; raises DataError where its own file is damaged or missing, and MissingExtraError. has_graph:
    whether the writer keeps a graph for it.
    """

    require: Callable[[], Any]
    load: Callable[[Path, Manifest, Rows], Engine]
    has_graph: bool = False


def _open_exact(_folder: Path, _facts: Manifest, rows: Rows) -> Engine:
    return ExactEngine(rows)


def _open_quantized(_folder: Path, _facts: Manifest, rows: Rows) -> Engine:
    return QuantizedEngine(rows)


def _open_usearch(folder: Path, facts: Manifest, rows: Rows) -> Engine:
    if facts.graph is None:
        return ExactEngine(rows)
    kind = graph.Kind(facts.graph.scale, facts.graph.width)
    path = folder / facts.graph.name
    opened = graph.open_graph(path, facts.graph.file, facts.model.embed_dim, facts.next_key, kind)
    return graph.GraphEngine(rows, opened, facts.graph.next_key)


ENGINES: Mapping[EngineName, Kind] = {
    "exact": Kind(lambda: None, _open_exact),
    "quantized": Kind(require_kernel, _open_quantized),
    "usearch": Kind(graph.require_usearch, _open_usearch, has_graph=True),
}
