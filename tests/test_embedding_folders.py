"""Folders of clip-retrieval: an index and feature files as its `img_emb`, `text_emb` and `metadata`, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_files import tree

from cn_clip import cli
from cn_clip.errors import DataError
from cn_clip.features import embedding_folders
from cn_clip.features.files import feature_blocks, read_features, write_features
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer

parquet = pytest.importorskip("pyarrow.parquet")
arrow = pytest.importorskip("pyarrow")
ROWS = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)


def convert(*args: object) -> None:
    cli.main(["convert", *map(str, args), "--to", "clip-retrieval"])


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten items, every third with a caption, one of them removed; four rows a file."""
    monkeypatch.setattr(embedding_folders, "ROWS_A_FILE", 4)
    items = [
        NewItem(
            f"图/{number}.jpg",
            row,
            {"path": f"/p/{number}.jpg", "source": "/p", "digest": "d", "width": number}
            | ({"caption": f"第{number}张", "tags": ["a", number]} if number % 3 == 0 else {}),
        )
        for number, row in enumerate(ROWS)
    ]
    with open_writer(tmp_path / "photos", Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        writer.commit(items[:6])
        writer.commit(items[6:], remove=["图/2.jpg"])
    return tmp_path / "photos"


def test_an_index_has_the_layout_of_clip_retrieval(index: Path, tmp_path: Path) -> None:
    convert(index, tmp_path / "out")
    numbers = [f"{number:05}" for number in range(3)]
    names = [f"img_emb/img_emb_{one}.npy" for one in numbers] + [f"metadata/metadata_{one}.parquet" for one in numbers]
    assert sorted(tree(tmp_path / "out")) == sorted(names)
    # As its readers go about it: the files of both folders by name, their rows one after the other.
    vectors = np.concatenate([np.load(file) for file in sorted((tmp_path / "out" / "img_emb").iterdir())])
    tables = [parquet.read_table(file) for file in sorted((tmp_path / "out" / "metadata").iterdir())]
    assert [len(one) for one in tables] == [4, 4, 1]
    assert len({tuple(one.column_names) for one in tables}) == 1
    rows = [row for one in tables for row in one.to_pylist()]
    kept = [number for number in range(10) if number != 2]
    np.testing.assert_array_equal(vectors, ROWS[kept])
    assert [row["image_path"] for row in rows] == [f"/p/{number}.jpg" for number in kept]
    assert [row["caption"] for row in rows] == [f"第{n}张" if n % 3 == 0 else "" for n in kept]
    assert [row["width"] for row in rows] == kept
    assert json.loads(rows[0]["tags"]) == ["a", 0]
    assert "digest" not in rows[0]


def test_an_index_of_such_a_folder_holds_the_same(index: Path, tmp_path: Path) -> None:
    convert(index, tmp_path / "out")
    cli.main(["index", "build", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    before, after = open_index(index), open_index(tmp_path / "again")
    assert after.ids == before.ids
    for item_id, metadata in before.items():
        np.testing.assert_array_equal(after.vector(item_id), before.vector(item_id))
        known = {name: value for name, value in metadata.items() if name in ("path", "width", "caption")}
        found = after.metadata(item_id)
        assert {name: found[name] for name in known} == known
        assert found["source"] == str(tmp_path / "out")
    cli.main(["index", "build", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert open_index(tmp_path / "again").ids == before.ids


def test_feature_files_of_pictures_and_texts_become_folders_and_are_read_again(tmp_path: Path) -> None:
    for field, name in (("image_id", "img_emb"), ("text_id", "text_emb")):
        ids = list(range(10))
        write_features(tmp_path / "features.jsonl", field, [(ids, ROWS)])  # type: ignore[arg-type]
        convert(tmp_path / "features.jsonl", tmp_path / name, "--precision", "fp16")
        assert np.load(tmp_path / name / name / f"{name}_00000.npy").dtype == np.float16
        found = read_features(tmp_path / name, field)  # type: ignore[arg-type]
        assert found.ids == ids
        np.testing.assert_allclose(found.vectors, ROWS, atol=1e-3)


def written(folder: Path, vectors: list[np.ndarray], tables: list[dict[str, list[object]]]) -> Path:
    """A folder as clip-retrieval writes it, with numbers of one digit."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, rows in enumerate(vectors):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows)
    for number, columns in enumerate(tables):
        parquet.write_table(arrow.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def test_a_folder_of_clip_retrieval_itself_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    vectors = [np.full((2, 3), number + 1, dtype=np.float16) for number in range(11)]
    tables = [{"image_path": [f"/p/{number}/{row}.jpg" for row in (0, 1)], "url": [None, "u"]} for number in range(11)]
    folder = written(tmp_path / "out", vectors, tables)
    blocks = list(feature_blocks(folder, "image_id"))
    assert [block.vectors[0, 0] for block in blocks] == list(range(1, 12))
    assert blocks[10].ids == ["/p/10/0.jpg", "/p/10/1.jpg"]
    assert blocks[10].columns["url"] == [None, "u"]
    (folder / "metadata").rename(tmp_path / "elsewhere")
    assert read_features(folder, "image_id").ids == list(range(22))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("fewer rows", "metadata_1.parquet: has 1 rows, its vectors are 2"),
        ("fewer files", "has 2 files in img_emb and 1 in metadata"),
        ("width", "img_emb_1.npy: has vectors of 4 numbers, the files before have 3"),
        ("nan", "img_emb_1.npy: row 2: holds NaN or infinity"),
        ("damaged", "img_emb_1.npy: cannot be read as npy"),
        ("object", "img_emb_1.npy: cannot be read as npy"),
        ("integers", "img_emb_1.npy: expected floats of the shape (N, D), got int64 (2, 3)"),
        ("parquet", "metadata_1.parquet: cannot be read as Parquet"),
    ],
)
def test_a_faulty_folder_is_refused_by_its_file(tmp_path: Path, fault: str, reason: str) -> None:
    vectors = [np.ones((2, 3), dtype=np.float16) for _ in range(2)]
    tables: list[dict[str, list[object]]] = [{"image_path": [f"{number}a", f"{number}b"]} for number in range(2)]
    if fault == "fewer rows":
        tables[1] = {"image_path": ["1a"]}
    if fault == "fewer files":
        tables.pop()
    if fault == "width":
        vectors[1] = np.ones((2, 4), dtype=np.float16)
    if fault == "nan":
        vectors[1][1, 1] = np.nan
    if fault == "integers":
        vectors[1] = np.ones((2, 3), dtype=np.int64)
    folder = written(tmp_path / "out", vectors, tables)
    if fault == "damaged":
        (folder / "img_emb" / "img_emb_1.npy").write_bytes(b"\x93NUMPY\x01\x00")
    if fault == "object":
        np.save(folder / "img_emb" / "img_emb_1.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    if fault == "parquet":
        (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError) as caught:
        read_features(folder, "image_id")
    assert reason in str(caught.value)


def test_what_cannot_be_converted_is_refused_in_one_line(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"mine")
    convert(index, tmp_path / "out")
    for source, target, reason in (
        (tmp_path / "none", "new", "none: cannot be opened"),
        (index, "full", "full: holds other things (photo.png)"),
        (index, "photos/new", "is inside"),
        (tmp_path / "out", "new", "out: is a folder of clip-retrieval already"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            convert(source, tmp_path / target, "--overwrite")
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    convert(index, tmp_path / "out", "--overwrite")


@pytest.mark.milvus
def test_an_index_on_a_server_becomes_the_same_folder(index: Path, tmp_path: Path) -> None:
    import milvus_server

    from cn_clip.retrieval import addresses

    convert(index, tmp_path / "local")
    with milvus_server.lite() as address:
        with addresses.open_writer(address, Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
            here = open_index(index)
            for ids, known, vectors in here.vector_blocks(3):
                writer.commit([NewItem(*one) for one in zip(ids, vectors, known, strict=True)])
        milvus_server.release(address)
        convert(address, tmp_path / "remote")
    before, after = (list(feature_blocks(tmp_path / one, "image_id")) for one in ("local", "remote"))
    assert [one.ids for one in after] == [one.ids for one in before]
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_allclose(theirs.vectors, ours.vectors, atol=1e-6)
        assert theirs.columns["width"] == ours.columns["width"]
