"""Every reader of files that come from elsewhere: how to make valid ones, how to read them, how to damage them."""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataset_files import jsonl_line, tsv_line, write_split
from faults.counts import outcome_of
from faults.mutations import (
    Mutation,
    either,
    odd_bytes,
    odd_json,
    odd_lines,
    odd_safetensors,
    odd_tar,
    odd_tree,
    odd_zip,
    small_tar,
)
from faults.small_towers import shrink
from in_process_runs import emoji_split, run
from onnx_towers import write_tower
from picture_bombs import gif_comment, jpeg_scans, png_chunks
from PIL import Image
from tiny_families import KINDS, write_family
from tiny_models import tiny_model

from cn_clip import emoji_pack, zoo
from cn_clip.clip import loading, templates
from cn_clip.clip.backends.onnx_files import metadata
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.families.opening import open_parts
from cn_clip.clip.model import CLIP
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.tokenizer import VOCAB_FILE, Tokenizer
from cn_clip.clip.weights import checkpoint
from cn_clip.clip.weights.forms import write_transformers
from cn_clip.data.bulk_pictures import open_collection
from cn_clip.data.captions import pictures_from_table
from cn_clip.data.checks import check_split
from cn_clip.data.lmdb_store import ImageStore, PairStore
from cn_clip.data.records import read_texts
from cn_clip.data.shards import ShardPairs
from cn_clip.errors import DataError
from cn_clip.eval import compare, evaluation
from cn_clip.evaluation import classification
from cn_clip.evaluation.zeroshot import read_index
from cn_clip.features import files as feature_files
from cn_clip.features import store as feature_store
from cn_clip.report.run_folder import read_run
from cn_clip.retrieval.inspection import inspect
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer

WORDS = ("一只小猫", "红苹果", "a photo", "大海")


@dataclass(frozen=True)
class Reader:
    """make: puts valid files into a folder. read: what they hold, as something with a `repr`.

    mutations: by patterns of names, how files are damaged; others stay as they are. is_checked: the format has
    checksums or digests, so damage must not give other values in silence. weight: the share of the time. imports:
    modules that take seconds to import, which the children find there.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    mutations: Mapping[str, Mutation] = field(default_factory=lambda: {"*": odd_bytes})
    is_checked: bool = False
    weight: float = 1.0
    imports: tuple[str, ...] = ()


class Inputs:
    """Numbered inputs of a reader: the valid files in `folder`, one of them damaged. Called in a forked child."""

    def __init__(self, reader: Reader, folder: Path, seed: int) -> None:
        self.reader, self.folder, self.seed = reader, folder, seed
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found = {path: self._mutation(path) for path in files}
        self.files = {path: (path.read_bytes(), one) for path, one in found.items() if one is not None}
        assert self.files, f"{reader.name}: no file to damage in {folder}"

    def _mutation(self, path: Path) -> Mutation | None:
        return next((one for name, one in self.reader.mutations.items() if fnmatch(path.name, name)), None)

    def damaged(self, number: int) -> tuple[Path, bytes]:
        """The file of an input, and its bytes."""
        rng = random.Random(f"{self.seed}/{self.reader.name}/{number}")
        path = rng.choice(list(self.files))
        data, mutation = self.files[path]
        return path, mutation(rng, data)

    def restore(self) -> None:
        """Puts a valid file back that a child could not, for it died or was ended."""
        for path, (data, _) in self.files.items():
            if not path.is_file() or path.read_bytes() != data:
                _replace(path, data)

    def value(self) -> str:
        """A digest of what the files hold now."""
        return hashlib.sha256(repr(self.reader.read(self.folder)).encode(errors="replace")).hexdigest()

    def take(self, number: int, sound: str) -> str:
        """OUTCOME and what to say of it, with a tab between. sound: the value of the valid files."""
        path, data = self.damaged(number)
        _replace(path, data)
        try:
            with quiet():
                value = self.value()
        except BaseException as error:
            outcome, what = outcome_of(error)
            return f"{outcome}\t{what}"
        finally:
            _replace(path, self.files[path][0])
        is_other = self.reader.is_checked and value != sound
        return f"{'difference' if is_other else 'fine'}\t{path.name}"


def _replace(path: Path, data: bytes) -> None:
    """A new file, so that nothing that has the old one open or mapped sees it change."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@contextlib.contextmanager
def quiet() -> Any:
    """Without what readers print and warn of."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# --- pictures and datasets


def _make_pictures(folder: Path) -> None:
    picture = Image.open(io.BytesIO(emoji_pack.load()[0].picture)).convert("RGB").resize((40, 30))
    about = Image.Exif()
    about[0x0112], about[0x010E] = 6, "description"
    for kind, settings in {
        "png": {"exif": about},
        "jpg": {"exif": about, "format": "JPEG"},
        "gif": {"save_all": True, "append_images": [picture.rotate(90)], "comment": b"c" * 300},
        "webp": {"exif": about},
        "bmp": {},
        "tiff": {"compression": "tiff_lzw"},
        "ppm": {},
    }.items():
        picture.save(folder / f"a.{kind}", **settings)
    picture.save(folder / "b.jpg", "JPEG", progressive=True)
    picture.quantize(16).save(folder / "b.png", interlace=1)
    (folder / "c.gif").write_bytes(gif_comment(2000))
    (folder / "c.jpg").write_bytes(jpeg_scans(3, side=32))
    (folder / "c.png").write_bytes(png_chunks(20))


def _read_pictures(folder: Path) -> object:
    faults, sizes = [], []
    for path in sorted(folder.iterdir()):
        try:
            sizes.append(open_picture(path, name=path.name).convert("RGB").size)
        except DataError as error:
            faults.append(error)
    if faults:
        raise faults[0]
    return sizes


def _make_dataset(folder: Path) -> None:
    pictures = [one.picture for one in emoji_pack.load()[:5]]
    images = [tsv_line(number, data) for number, data in enumerate(pictures)]
    texts = [jsonl_line(number, WORDS[number % 4], [number, (number + 1) % 5]) for number in range(5)]
    write_split(folder, images, texts)


def _read_dataset(folder: Path) -> object:
    found = check_split(folder, "train", folder / "lmdb" / "train")
    read_texts(folder / "train_texts.jsonl")
    if found.faults:
        raise DataError(str(found.faults[0]))
    return found.as_dict()


def _read_lmdb(folder: Path) -> object:
    images, pairs = ImageStore(folder / "imgs"), PairStore(folder / "pairs")
    return [images.picture(one) for one in images.ids], [pairs[number] for number in range(len(pairs))]


def _make_shards(folder: Path) -> None:
    members = {}
    for number, one in enumerate(emoji_pack.load()[:4]):
        members |= {f"{number:04}.png": one.picture, f"{number:04}.txt": one.name.encode()}
        members[f"{number:04}.json"] = json.dumps({"image_id": number, "text_id": f"t{number}"}).encode()
    (folder / "a.tar").write_bytes(small_tar(members))
    (folder / "b.tar").write_bytes(small_tar({f"{'深' * 50}/{'x' * 70}{n}": data for n, data in members.items()}))


def _read_shards(folder: Path) -> object:
    pairs = ShardPairs(f"{folder}/a.tar::{folder}/b.tar")
    return [pairs[number] for number in range(len(pairs))]


def _make_bulk(folder: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    pictures = [one.picture for one in emoji_pack.load()[:4]]
    table = arrow.table({"image_id": ["甲", "乙", "c", "d"], "image": pictures})
    parquet.write_table(table, folder / "a.parquet", row_group_size=2)


def _read_bulk(folder: Path) -> object:
    found = open_collection(str(folder))
    part = found.part(0, len(found.ids))
    return found.ids, [part[number] for number in range(len(part))]


def _make_tables(folder: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    for name in "abcd":
        (folder / f"{name}.png").write_bytes(emoji_pack.load()[0].picture)
    names = [f"{name}.png" for name in "abcd"]
    (folder / "t.csv").write_text("image,text\n" + "".join(f"{one},猫\n" for one in names), encoding="utf-8")
    (folder / "t.tsv").write_text("image\ttext\n" + "".join(f"{one}\t“猫”\n" for one in names), encoding="utf-8")
    parquet.write_table(arrow.table({"image": names, "text": ["猫"] * 4}), folder / "t.parquet")


def _read_tables(folder: Path) -> object:
    found: list[object] = []
    columns: Any = {"image_column": "image", "text_column": "text", "id_column": None}
    for kind in ("csv", "tsv", "parquet"):
        found += list(pictures_from_table(folder / f"t.{kind}", folder, **columns))
    return found


# --- features and results


def _rows(count: int = 40, width: int = 8) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _make_features(kind: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = _rows()
        for name, ids in (("numbers", list(range(40))), ("names", [f"图{number}" for number in range(40)])):
            path = folder / f"{name}.{kind}"
            feature_files.write_rows(path, "image_id", ids, iter([rows]), embed_dim=8, output_format=kind)

    return make


def _read_features(folder: Path) -> object:
    found = [feature_files.read_features(path, "image_id") for path in sorted(folder.iterdir())]
    return [(one.ids, one.vectors.tobytes()) for one in found]


def _make_feature_shards(folder: Path) -> None:
    from cn_clip.data.storage import open_storage

    made = feature_store.Manifest("image_id", {"digest": "m"}, {"digest": "d"}, 40, 20)
    place = open_storage(str(folder))
    feature_store.begin_shards(place, made, overwrite=False)
    for shard in made.shards():
        ids = list(range(shard.start, shard.stop))
        feature_store.write_shard(place, made, shard, ids, _rows()[shard.start : shard.stop])


def _read_feature_shards(folder: Path) -> object:
    from cn_clip.data.storage import open_storage

    place = open_storage(str(folder))
    made = feature_store.read_manifest(place.child(feature_store.MANIFEST).read(), str(folder))
    feature_store.begin_shards(place, made, overwrite=False)
    found = feature_files.read_features(folder, "image_id")
    return found.ids, found.vectors.tobytes()


def _make_class_features(folder: Path) -> None:
    np.savez(folder / "x.npz", features=_rows(), labels=np.arange(40) % 4, classes=np.array(WORDS))


def _read_class_features(folder: Path) -> object:
    found = classification.read(folder / "x.npz")
    return found.rows_ND.tobytes(), found.labels_N.tobytes(), found.classes


def _make_results(folder: Path) -> None:
    standard = [{"text_id": n, "text": "猫", "image_ids": [n]} for n in range(3)]
    found = [{"text_id": n, "image_ids": list(range(10))} for n in range(3)]
    for name, records in (("standard.jsonl", standard), ("found.jsonl", found)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    (folder / "result.json").write_text('{"success": true, "score": 90, "scoreJson": {"r1": 1.0, "mean_recall": 2}}')
    (folder / "zeroshot.json").write_text('{"model_name": "x", "dataset_name": "y", "top1": 12.5, "num": [1, 2]}')
    (folder / "templates.json").write_text('["一张{}的图片", "{}的照片"]', encoding="utf-8")
    (folder / "index.json").write_text("[2, 0, 1]")


def _read_results(folder: Path) -> object:
    written = folder / "out.json"
    with contextlib.suppress(SystemExit):  # it says what is wrong in the file that it writes
        evaluation.main([str(folder / "standard.jsonl"), str(folder / "found.jsonl"), str(written)])
    said = json.loads(written.read_text(encoding="utf-8"))
    values: list[object] = [said]
    faults = []
    for read in (
        lambda: compare.read_result(folder / "result.json"),
        lambda: compare.read_result(folder / "zeroshot.json"),
        lambda: templates.load_templates("x", folder / "templates.json"),
        lambda: read_index(folder / "index.json", 3),
    ):
        try:
            values.append(read())
        except DataError as error:
            faults.append(error)
    return values, [str(one) for one in faults]


# --- weights and models


class _Scripted(torch.nn.Module):
    """What `torch.jit.save` makes of a small module: the form in which OpenAI publishes weights."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x) * self.scale


def _training_checkpoint() -> dict[str, Any]:
    tensors = {f"module.{name}": value for name, value in tiny_model().state_dict().items()}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}
    optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    lora = {"rank": 4, "alpha": 8.0}
    return {"epoch": 1, "step": 7, "name": "x", "state_dict": tensors, "optimizer": optimizer, "lora": lora}


def _make_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    torch.save(_training_checkpoint(), folder / "whole.pt")
    torch.save(tiny_model("resnet").state_dict(), folder / "bare.pt")
    torch.save(tiny_model().state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(dict(tiny_model().state_dict()), folder / "a.safetensors")
    torch.jit.save(torch.jit.script(_Scripted()), folder / "b.pt")


def _read_weights(folder: Path) -> object:
    found = []
    for path in sorted(folder.iterdir()):
        read = checkpoint.read_checkpoint(path, mapped=path.suffix == ".safetensors")
        if path.name != "b.pt":
            model = loading.build(checkpoint.infer_config(read), read)
            found.append(sorted((name, tuple(value.shape)) for name, value in model.state_dict().items()))
    return found


def odd_checkpoint(rng: random.Random, data: bytes) -> bytes:
    """A training checkpoint of which an entry, at any depth, is another value or a tensor of another shape."""
    odd = [torch.zeros(3), torch.zeros(()), torch.tensor([float("nan")]), torch.zeros(2, 2, dtype=torch.int64)]
    odd += [torch.zeros(1).expand(1 << 40), torch.eye(2).to_sparse(), torch.zeros(2, device="meta")]
    content = torch.load(io.BytesIO(data), weights_only=True)

    def value(one: random.Random) -> Any:
        from faults.mutations import odd_value

        return one.choice(odd) if one.random() < 0.3 else odd_value(one)

    stream = io.BytesIO()
    try:
        torch.save(odd_tree(rng, dict(content), value), stream)
    except (UnicodeEncodeError, RuntimeError, pickle.PicklingError):  # a lone surrogate
        return odd_bytes(rng, data)
    return stream.getvalue()


def _make_chinese_folder(folder: Path) -> None:
    torch.manual_seed(0)
    model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese")).eval()
    write_transformers(folder, model.state_dict(), model.config)


def _read_chinese_folder(folder: Path) -> object:
    model, _ = loading.open_model(folder)
    return sorted(model.state_dict())


def _make_families(folder: Path) -> None:
    for kind in KINDS:
        write_family(folder / kind, kind)


def _shared(make: Callable[[Path], object], part: str = "") -> Callable[[Path], object]:
    """Valid files that several readers have in common: made beside their folders by the first; part: a folder there."""

    def link(folder: Path) -> None:
        common = folder.parent / make.__name__
        with open(folder.parent / f"{make.__name__}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not common.is_dir():
                common.mkdir()
                make(common)
        shutil.copytree(common / part, folder, copy_function=os.link, dirs_exist_ok=True)

    return link


def _read_family(folder: Path) -> object:
    parts = open_parts(f"hf:{folder}", device="cpu")
    ids = parts.texts.pad(parts.texts.rows(list(WORDS)))
    pixels = parts.pictures.array(Image.new("RGB", (40, 30), (200, 10, 10)))
    return parts.backend.encode_tokens(ids).shape, parts.backend.encode_pixels(pixels[None]).shape


def _make_onnx(folder: Path) -> None:
    from cn_clip.clip.backends.base import TowerFacts

    facts = TowerFacts(kind="text", embed_dim=4, length=52, precision="fp32", logit_scale=100.0)
    write_tower(folder / "t.onnx", "text", metadata=metadata(facts))


def _read_onnx(folder: Path) -> object:
    tower = OnnxTower(folder / "t.onnx", "text", device="cpu", num_threads=1)
    return tower.facts, tower.run(np.ones((1, 52), dtype=np.int64)).shape


def odd_metadata(rng: random.Random, data: bytes) -> bytes:
    """An ONNX file with other metadata, also such as are no UTF-8."""
    begin = data.index(b'{"writer"')
    end = data.index(b"}", begin) + 1
    length = end - begin
    text = either(odd_json, odd_bytes)(rng, data[begin:end])[:length].ljust(length)
    return data[:begin] + text + data[end:]


def _read_vocab(folder: Path) -> object:
    tokenizer = Tokenizer(folder / "vocab.txt")
    return [(tokenizer.fast_ids(text), tokenizer.exact_ids(text)) for text in WORDS]


def _make_vocab(folder: Path) -> None:
    lines = VOCAB_FILE.read_text(encoding="utf-8").split("\n")
    (folder / "vocab.txt").write_text("\n".join([*lines[:1000], "猫", "苹", "果"]), encoding="utf-8")


# --- an index, and the folder of a run


def _make_index(engine: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = _rows(1200 if engine == "usearch" else 60)
        with open_writer(folder, Manifest(ModelInfo("tiny", "f" * 16, 8), engine=engine)) as writer:
            items = [
                NewItem(f"图{n}" if n % 2 else n, row, {"path": f"/p/{n}", "n": n}, b"\xff\xd8" + bytes([n % 251]))
                for n, row in enumerate(rows)
            ]
            writer.commit(items[:50])
            writer.commit(items[50:])
            writer.commit(remove=[0, 2])
            writer.finish()

    return make


def _read_open_index(folder: Path) -> object:
    index = open_index(folder)
    hits = index.search(_rows(1)[:1], 5)
    where = index.search(_rows(1)[:1], 5, where="n>3")
    return (
        hits,
        where,
        index.ids,
        [index.thumbnail(one) for one in index.ids[:10]],
        index.vector(index.ids[-1]).tobytes(),
    )


def _read_inspected_index(folder: Path) -> object:
    _, damages = inspect(folder)
    if damages:
        raise DataError(str(damages[0]))
    return None


def _make_run(folder: Path) -> None:
    split = emoji_split(folder / "split")
    with quiet():
        run(split, folder / "logs", max_steps=2, valid_step_interval=1, **shrink())
    for path in (folder / "logs" / "x" / "checkpoints").iterdir():
        if path.name != "epoch_latest.pt":
            path.unlink()


def _read_run_checkpoint(folder: Path) -> object:
    checkpoints = folder / "logs" / "x" / "checkpoints"
    from in_process_runs import options

    from cn_clip.training import building

    trainer = building.build_trainer(
        options(folder / "split", folder / "logs", **shrink()), torch.device("cpu"), checkpoints
    )
    return trainer.position


def _read_run_folder(folder: Path) -> object:
    found = read_run(folder / "logs" / "x")
    return found.best(), found.last_step, found.max_steps, found.points("train", "loss"), found.validations()


_JSON = either(odd_json, odd_bytes)
_TORCH = either(odd_bytes, odd_zip, odd_checkpoint)
_MODEL_FOLDER = {
    "*.json": _JSON,
    "*.safetensors": either(odd_bytes, odd_safetensors),
    "*.txt": odd_bytes,
    "*.model": odd_bytes,
}

_FAMILIES = ("transformers.models.auto.modeling_auto", "transformers.modeling_utils", "torch._dynamo")
_TRAINING = ("torch._dynamo", "matplotlib.backends.backend_agg", "cn_clip.training.building")
READERS: Sequence[Reader] = (
    Reader("pictures", _make_pictures, _read_pictures, weight=8),
    Reader("datasets", _make_dataset, _read_dataset, {"*.tsv": odd_bytes, "*.jsonl": odd_lines}, weight=4),
    Reader("LMDB", lambda folder: emoji_split(folder), _read_lmdb, {"data.mdb": odd_bytes}, weight=6),
    Reader("tar shards", _make_shards, _read_shards, {"*.tar": either(odd_bytes, odd_tar)}, weight=4),
    Reader("Parquet pictures", _make_bulk, _read_bulk, weight=3),
    Reader("picture tables", _make_tables, _read_tables, {"t.*": odd_bytes}, weight=2),
    Reader("feature jsonl", _make_features("jsonl"), _read_features, {"*": odd_lines}, weight=4),
    Reader(
        "feature npz", _make_features("npz"), _read_features, {"*": either(odd_bytes, odd_bytes, odd_zip)}, weight=4
    ),
    Reader("feature Parquet", _make_features("parquet"), _read_features, weight=6),
    Reader("feature shards", _make_feature_shards, _read_feature_shards, {"*.json": _JSON, "*": odd_bytes}, weight=2),
    Reader("class features", _make_class_features, _read_class_features, {"*": either(odd_bytes, odd_zip)}, weight=2),
    Reader("results", _make_results, _read_results, {"*.jsonl": odd_lines, "*.json": _JSON}, weight=2),
    Reader(
        "weights",
        _make_weights,
        _read_weights,
        {
            "whole.pt": _TORCH,
            "bare.pt": _TORCH,
            "b.pt": either(odd_bytes, odd_zip),
            "old.pt": odd_bytes,
            "*.safetensors": either(odd_bytes, odd_safetensors),
        },
        weight=6,
    ),
    Reader("transformers folder", _make_chinese_folder, _read_chinese_folder, _MODEL_FOLDER, weight=2),
    *(
        Reader(f"hf: {kind}", _shared(_make_families, kind), _read_family, _MODEL_FOLDER, weight=0.5, imports=_FAMILIES)
        for kind in KINDS
    ),
    Reader("ONNX", _make_onnx, _read_onnx, {"*": either(odd_bytes, odd_metadata)}, weight=4),
    Reader("vocabulary", _make_vocab, _read_vocab, {"*": either(odd_bytes, odd_lines)}, weight=2),
    Reader("index", _make_index("exact"), _read_open_index, {"manifest.json": _JSON, "*": odd_bytes}, weight=6),
    Reader("index graph", _make_index("usearch"), _read_open_index, {"graph-*": odd_bytes}, is_checked=True, weight=2),
    Reader(
        "index check",
        _make_index("exact"),
        _read_inspected_index,
        {"segment-*": odd_bytes, "*.npy": odd_bytes},
        weight=1,
    ),
    Reader("run checkpoint", _shared(_make_run), _read_run_checkpoint, {"*.pt": _TORCH}, imports=_TRAINING),
    Reader(
        "run folder",
        _shared(_make_run),
        _read_run_folder,
        {"*.jsonl": odd_lines, "*.log": odd_lines, "*.txt": odd_bytes},
        imports=_TRAINING,
    ),
)
