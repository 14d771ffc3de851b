"""The benchmarks that `cn-clip evaluate` knows by name: splits, published figures and Chinese class names, as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cn_clip import zoo, zoo_results
from cn_clip.clip.families.names import is_foreign
from cn_clip.zoo_results import Query

Metric: TypeAlias = Literal["top1", "mean_per_class", "map_11_point"]
Split: TypeAlias = Literal["valid", "test"]

FOLDER = Path(__file__).parent / "benchmark_files"
# What `cn-clip evaluate` calls its result.
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class RetrievalSet:
    """A retrieval benchmark, as `zoo_results` calls it, and the directions in which it is searched."""

    title: str
    queries: tuple[Query, ...]

    @property
    def split(self) -> Split:
        """The split of the published figures, test where there are none."""
        return "valid" if zoo_results.SPLITS.get(self.title) == "valid" else "test"

    def published(self, model: str | None) -> list[zoo_results.Result]:
        """The published figures of a model in these directions; empty where there are none."""
        return self._of_this(zoo_results.results_of(model) if model else [])

    def others(self) -> list[tuple[str, zoo_results.Result]]:
        """(model, result) of the published figures of models that are not to be had by name."""
        return [(name, one) for name in zoo_results.OTHERS for one in self._of_this(zoo_results.results_of(name))]

    def _of_this(self, found: list[zoo_results.Result]) -> list[zoo_results.Result]:
        return [one for one in found if one.dataset == self.title and one.query in self.queries]


RETRIEVAL_SETS: Mapping[str, RetrievalSet] = {
    "muge": RetrievalSet("MUGE", ("text",)),
    "flickr30k-cn": RetrievalSet("Flickr30K-CN", ("text", "image")),
    "coco-cn": RetrievalSet("COCO-CN", ("text", "image")),
    # The Chinese part of benchmarks of many languages.
    "xtd-zh": RetrievalSet("XTD-zh", ("text", "image")),
    "xm3600-zh": RetrievalSet("XM3600-zh", ("text", "image")),
}


@dataclass(frozen=True)
class ClassificationSet:
    """A classification benchmark: how ELEVATER scores it, and the published zero-shot figures in percent by model.

    others: the figures of models that are not to be had by name. is_numbered: whether the folders' numbers in the
    published archive are known to be those of `class_names`. folder: where the class folders lie.
    """

    title: str
    elevater_metric: Metric
    published: Mapping[str, float]
    others: Mapping[str, float]
    is_numbered: bool = True
    folder: str = "test"


@dataclass(frozen=True)
class ClassName:
    """A class in English, by the name its dataset gives it where it gives one, and in Chinese."""

    original: str
    chinese: str


@cache
def classification_sets() -> Mapping[str, ClassificationSet]:
    """The classification benchmarks by name, which is that of their folder in the published archives."""
    return {name: ClassificationSet(**facts) for name, facts in _read("classification.json").items()}


@cache
def class_names(name: str) -> tuple[ClassName, ...]:
    """The classes of a classification benchmark in the order of its numbers, from 0."""
    return tuple(ClassName(*pair) for pair in _read(f"labels/{name}.json"))


def names() -> list[str]:
    """All benchmarks, those of retrieval first."""
    return [*RETRIEVAL_SETS, *classification_sets()]


def known_name(given: str) -> str | None:
    """The benchmark meant: case, `_` and `-` make no difference; None for one that is not known."""
    return {folded(name): name for name in names()}.get(folded(given))


def published_model(model: str | None, checkpoint: str | None) -> str | None:
    """The published model whose figures are shown beside those of a model; None if there is none.

    For a checkpoint it is the model that the user says it is of, else the one whose file or repository has its name.
    A folder or file that only has the name of a model is not that model.
    """
    published = zoo.downloadable()
    given = model or checkpoint or ""
    if given in published:
        return given
    file = Path(given).name
    for name, entry in published.items():
        # All of QA-CLIP's files are in one repository.
        is_repository = file == entry.repo and name in zoo.PUBLISHED
        if is_repository or (file == entry.filename and not is_foreign(given)):
            return name
    return None


def folded(name: str) -> str:
    """A name of a benchmark as names are compared: of small letters, with - for _."""
    return name.casefold().replace("_", "-")


def _read(file: str) -> Any:
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))
