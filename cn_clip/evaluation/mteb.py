"""MTEB (https://github.com/embeddings-benchmark/mteb) with any model of `Encoder`, and Chinese benchmarks as its tasks.

    import mteb
    from cn_clip.evaluation.mteb import MtebEncoder, tasks

    mteb.evaluate(MtebEncoder("ViT-B-16"), tasks("flickr30k-cn", "datasets/Flickr30k-CN"))

Needs the package `mteb` with its extra `image`.
"""

# Q queries, N pictures, D embedding

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cn_clip import zoo
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.templates import load_templates
from cn_clip.data.lmdb_store import IMAGES
from cn_clip.data.pictures import LmdbPictures
from cn_clip.data.records import read_texts
from cn_clip.errors import ConfigError, DataError
from cn_clip.evaluation import annotations, benchmark_sets, classification
from cn_clip.evaluation.retrieval import check_split
from cn_clip.extras import require
from cn_clip.zoo_results import Query

LANGUAGE = "zho-Hans"
_CITATION = """@article{chinese-clip,
  title={Chinese CLIP: Contrastive Vision-Language Pretraining in Chinese},
  author={Yang, An and Pan, Junshu and Lin, Junyang and Men, Rui and Zhang, Yichang and Zhou, Jingren and Zhou, Chang},
  journal={arXiv preprint arXiv:2211.01335},
  year={2022}
}"""
# The days on which the five were published.
_RELEASED = {
    **dict.fromkeys(("ViT-B-16",), "2022-07-08"),
    **dict.fromkeys(("ViT-L-14", "ViT-L-14-336"), "2022-09-22"),
    **dict.fromkeys(("RN50", "ViT-H-14"), "2022-11-03"),
}


class MtebEncoder:
    """A model of `Encoder` in MTEB's protocol of encoders, for pictures, texts, and pictures with texts.

    settings: those of `Encoder`. Of a picture with a text the row is the sum of both, as MTEB's own CLIP has it.
    """

    def __init__(
        self, model_name: str, revision: str | None = None, *, device: str | None = None, **settings: Any
    ) -> None:
        """revision: of a model of the Hugging Face hub. Raises as `Encoder`."""
        opened = f"{model_name}@{revision}" if revision and "/" in model_name and "@" not in model_name else model_name
        self.name, self.encoder = model_name, Encoder(opened, device=device, **settings)

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, batch_size: int | None = None, **_: Any) -> Rows:
        """Rows (N, D) float32 of batches with `image` (PIL), `text`, or both; all else that MTEB says is not used.

        Raises DataError for a batch that has neither.
        """
        found = [self._rows(batch, batch_size) for batch in inputs]
        return np.concatenate(found) if found else np.zeros((0, self.encoder.embed_dim), np.float32)

    def _rows(self, batch: Mapping[str, Any], batch_size: int | None) -> Rows:
        parts: list[Rows] = []
        if batch.get("image") is not None:
            parts.append(self.encoder.encode_images(list(batch["image"]), batch_size=batch_size))
        if batch.get("text") is not None:
            parts.append(self.encoder.encode_texts(list(batch["text"]), batch_size=batch_size))
        if not parts:
            raise DataError(f"MTEB gave a batch of {sorted(batch)}; expected image or text")
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def similarity(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> Tensor:
        """Cosines (Q, N) of rows (Q, D) and (N, D)."""
        return _units(embeddings1) @ _units(embeddings2).T

    def similarity_pairwise(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> Tensor:
        """Cosines (N,) of the rows of both, one by one."""
        return (_units(embeddings1) * _units(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What MTEB keeps with its results: a `ModelMeta`."""
        meta = require("mteb.models.model_meta", extra="mteb", purpose="a model in MTEB").ModelMeta
        known = zoo.downloadable().get(self.name)
        is_official = self.name in zoo.PUBLISHED
        name = known.huggingface if known else self.name
        return meta(
            loader=type(self),
            name=name if name.count("/") == 1 and not name.startswith((".", "/")) else f"cn_clip/{Path(name).name}",
            revision=None,
            release_date=_RELEASED.get(self.name),
            languages=[LANGUAGE] if known else None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=self.encoder.context_length,
            embed_dim=self.encoder.embed_dim,
            license=None,
            open_weights=True if known else None,
            public_training_code="https://github.com/OFA-Sys/Chinese-CLIP" if is_official else None,
            public_training_data=None,
            framework=["PyTorch"],
            reference=f"https://huggingface.co/{known.huggingface}" if known else None,
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"],
            citation=_CITATION if is_official else None,
        )


def _units(rows: ArrayLike | Tensor) -> Tensor:
    tensor = rows if isinstance(rows, Tensor) else torch.from_numpy(np.asarray(rows))
    return torch.nn.functional.normalize(tensor.reshape(-1, tensor.shape[-1]), dim=-1)


# --- tasks ------------------------------------------------------------------------------------------------------------


def tasks(benchmark: str, data: str | Path, *, split: str | None = None) -> list[Any]:
    """The tasks of a benchmark of `cn-clip evaluate` whose files lie in the folder `data`, in MTEB's form.

    Of retrieval one for each direction, whose `hit_rate_at_K` is the recall at K that papers on such models give (a
    query counts once, however many answers it has); of classification one, with one prompt a class, the first of the
    templates: MTEB has no ensembles of prompts. split: default that of the published figures.
    Raises ConfigError for a benchmark that is not known, DataError saying which part of the files is missing.
    """
    require("mteb", extra="mteb", purpose="tasks of MTEB")
    name, folder = benchmark_sets.known_name(benchmark), Path(data)
    if name is None:
        raise ConfigError(f"no benchmark {benchmark!r}; expected one of: {', '.join(benchmark_sets.names())}")
    known = benchmark_sets.RETRIEVAL_SETS.get(name)
    if known is None:
        if split not in (None, "test"):
            raise ConfigError(f"split {split!r}: {name} is measured on its test pictures; leave split out")
        return [_classification_task(name, folder)]
    used = split or known.split
    check_split(folder, used)
    return [_retrieval_task(known.title, folder, used, query) for query in known.queries]


def _retrieval_task(title: str, folder: Path, split: str, query: Query) -> Any:
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class LocalRetrieval(AbsTaskRetrieval):  # type: ignore[misc, unused-ignore]
        """A split of a folder, searched in one direction."""

        metadata = _metadata(
            f"{_identifier(title)}{'T2I' if query == 'text' else 'I2T'}Retrieval",
            f"Finds the {'pictures of Chinese texts' if query == 'text' else 'Chinese texts of pictures'} in {title}.",
            split,
            type="Any2AnyRetrieval",
            category="t2i" if query == "text" else "i2t",
            main_score="hit_rate_at_1",
        )
        k_values: Sequence[int] = (1, 5, 10)
        data_loaded: bool

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            if self.data_loaded:
                return
            sides = {"image": self._pictures(), "text": self._texts()}
            other: Query = "image" if query == "text" else "text"
            self.dataset = {
                "default": {
                    split: {
                        "queries": sides[query],
                        "corpus": sides[other],
                        "relevant_docs": _relevant(folder / f"{split}_texts.jsonl", query),
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

        def _pictures(self) -> Any:
            pictures = LmdbPictures(folder / "lmdb" / split / IMAGES)

            def rows() -> Iterator[dict[str, Any]]:
                for index, image_id in enumerate(pictures.ids):
                    yield {"id": str(image_id), "image": {"bytes": pictures[index].data, "path": None}}

            return self._kept(rows, image=True)

        def _texts(self) -> Any:
            def rows() -> Iterator[dict[str, Any]]:
                for text_id, text in read_texts(folder / f"{split}_texts.jsonl"):
                    yield {"id": str(text_id), "text": text}

            return self._kept(rows, image=False)

        def _kept(self, rows: Callable[[], Iterator[dict[str, Any]]], *, image: bool) -> Any:
            """The rows in a file of Arrow's, mapped, so that a split of any size fits into memory."""
            if not hasattr(self, "_folder"):
                self._folder = Path(tempfile.mkdtemp(prefix="cn-clip-mteb-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            return _arrow(rows, self._folder, image=image)

    return LocalRetrieval()


def _arrow(rows: Callable[[], Iterator[dict[str, Any]]], folder: Path, *, image: bool) -> Any:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    what: Any = {"image": datasets.Image()} if image else {"text": datasets.Value("string")}
    features = datasets.Features({"id": datasets.Value("string"), **what})
    path = str(folder / ("pictures.arrow" if image else "texts.arrow"))
    with ArrowWriter(path=path, features=features) as writer:
        for row in rows():
            writer.write(row)
        writer.finalize()
    return datasets.Dataset.from_file(path)


def _relevant(file: Path, query: Query) -> dict[str, dict[str, int]]:
    """By the id of each query that has answers, these; as texts, which MTEB wants."""
    found: dict[str, dict[str, int]] = {}
    for text_id, image_ids in annotations.read_relevant(str(file)):
        for image_id in image_ids:
            asked, answer = (text_id, image_id) if query == "text" else (image_id, text_id)
            found.setdefault(str(asked), {})[str(answer)] = 1
    return found


def _classification_task(name: str, folder: Path) -> Any:
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    opened, template = classification.read_dataset(folder, name), load_templates(name)[0]
    title = benchmark_sets.classification_sets()[name].title

    class LocalClassification(AbsTaskZeroShotClassification):  # type: ignore[misc, unused-ignore]
        """The test pictures of a folder, by class."""

        metadata = _metadata(
            f"{_identifier(title).removesuffix('CN')}CNZeroShot",
            f"Names the class of the pictures of {title} in Chinese.",
            "test",
            type="ZeroShotClassification",
            category="i2t",
            main_score="accuracy",
        )
        data_loaded: bool
        input_column_name = "image"
        label_column_name = "label"

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            if self.data_loaded:
                return
            import datasets

            paths = [path for path, _ in opened.pictures.samples]
            labels = [opened.numbers[label] for _, label in opened.pictures.samples]
            columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            self.dataset = datasets.DatasetDict(
                {"test": datasets.Dataset.from_dict({"image": paths, "label": labels}, features=columns)}
            )
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return [template.replace("{}", label) for label in opened.labels]

    return LocalClassification()


def _metadata(name: str, description: str, split: str, **facts: Any) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        description=description,
        dataset={"path": "local", "revision": "local"},
        modalities=["text", "image"] if facts["category"] == "t2i" else ["image", "text"],
        eval_splits=[split],
        eval_langs=[LANGUAGE],
        **facts,
    )


def _identifier(title: str) -> str:
    return "".join(one for one in title if one.isalnum())


def recalls_of(result: Any) -> dict[str, float]:
    """`r1`, `r5` and `r10` in percent, of what `mteb.evaluate` returned of one of the retrieval tasks."""
    (scores,) = (scores for by_split in result.scores.values() for scores in by_split)
    return {f"r{k}": 100 * float(scores[f"hit_rate_at_{k}"]) for k in (1, 5, 10)}
