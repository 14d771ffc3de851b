"""`cn-clip search`: by text, by picture, by both and by item; the same tests for a folder, its graph, and Milvus."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
import torch
from PIL import Image

from cn_clip import cli
from cn_clip.clip import Encoder
from cn_clip.clip.loading import create_model
from cn_clip.data.paths import spelled
from cn_clip.demo import emoji
from cn_clip.features.files import write_features
from cn_clip.retrieval import addresses, graph, remote, store, writer
from cn_clip.retrieval.addresses import IndexAddress
from cn_clip.retrieval.store import open_index

NUM_PICTURES = 200
EMOJI = emoji.load("twemoji")[:NUM_PICTURES]
STORES = ("exact", "usearch", *stores.REMOTE)


@pytest.fixture(scope="module", autouse=True)
def small_graphs() -> Iterator[None]:
    """Graphs of few rows, so that the tests stay small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "SMALLEST_GRAPH", 8)
        patch.setattr(writer, "SMALLEST_GRAPH", 8)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pictures of Twemoji, called 0, 1, ...; beside them t.csv with name and group."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "p").mkdir()
    rows = ["image,text,group"]
    for number, one in enumerate(EMOJI):
        (folder / "p" / f"{number}.webp").write_bytes(one.picture)
        rows.append(f"{number}.webp,{one.name},{one.group}")
    (folder / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "p"


def build(pictures: Path, *more: object) -> None:
    """Builds an index of pictures and the table beside them."""
    args = ["index", "build", pictures, "--metadata", pictures.parent / "t.csv", "--model", "Emoji-Tiny", *more]
    cli.main([*map(str, args), "--json"])


@contextlib.contextmanager
def settled(kind: str, folder: Path) -> Iterator[tuple[IndexAddress, list[str]]]:
    """Where an index of a store may be, and the settings that build it there."""
    if kind in stores.NAMES:
        with stores.kept_by(kind) as address:
            yield address, ["--output", str(address)]
    else:
        yield folder, ["--output", str(folder), "--engine", kind]


@pytest.fixture(scope="module", params=STORES)
def index(request: pytest.FixtureRequest, pictures: Path) -> Iterator[IndexAddress]:
    """The index of the pictures in each of the stores."""
    with settled(request.param, pictures.parent / request.param) as (place, settings):
        build(pictures, *settings)
        yield place


@pytest.fixture(scope="module")
def folder(pictures: Path) -> Path:
    """The index of the pictures, as a folder."""
    build(pictures, "--output", pictures.parent / "i")
    return pictures.parent / "i"


def search(index: IndexAddress, capsys: pytest.CaptureFixture[str], *args: object) -> list[dict[str, Any]]:
    """The hits that the command prints."""
    capsys.readouterr()
    cli.main(["search", str(index), *map(str, args), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["index"], result["model"]) == (str(index), "Emoji-Tiny")
    hits: list[dict[str, Any]] = result["hits"]
    return hits


@pytest.fixture(scope="module")
def vectors() -> tuple[Any, Encoder]:
    """Of all pictures, and what computed them."""
    encoder = Encoder("Emoji-Tiny")
    return encoder.encode_images([one.picture for one in EMOJI]), encoder


def expected(query_D: Any, vectors_ND: Any, k: int) -> list[tuple[str, float]]:
    """The k best pictures, and their scores to three digits."""
    scores = vectors_ND @ query_D
    return [(f"{place}.webp", round(float(scores[place]), 3)) for place in np.argsort(-scores)[:k].tolist()]


def _digest(*towers: Path) -> str:
    """What tells the files of a model apart that bear no fingerprint."""
    return f"file:{hashlib.blake2b(b''.join(path.read_bytes() for path in towers), digest_size=8).hexdigest()}"


def summary(hits: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(hit["id"], round(hit["score"], 3)) for hit in hits]


@pytest.mark.parametrize("text", ["哭", "ＯＫ OK", "“爱心”"])
def test_text_finds_the_nearest_pictures(
    index: IndexAddress, vectors: tuple[Any, Encoder], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, encoder = vectors
    lowered = text.lower().replace("“", '"').replace("”", '"')
    hits = search(index, capsys, text, "--k", 7)
    assert summary(hits) == expected(encoder.encode_texts([lowered])[0], rows, 7)
    assert hits[0]["metadata"]["caption"] == EMOJI[int(hits[0]["id"].removesuffix(".webp"))].name


def test_picture_text_and_both(
    index: IndexAddress, vectors: tuple[Any, Encoder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, encoder = vectors
    picture = emoji.load("noto")[30].picture
    (tmp_path / "q.webp").write_bytes(picture)
    image_D, text_D = encoder.encode_images([picture])[0], encoder.encode_texts(["哭"])[0]
    assert summary(search(index, capsys, "--image", tmp_path / "q.webp")) == expected(image_D, rows, 10)
    for weight in (0.7, 0.0, 1.0):
        mixed_D = weight * text_D + (1 - weight) * image_D
        hits = search(index, capsys, "哭", "--image", tmp_path / "q.webp", "--text-weight", weight)
        assert summary(hits) == expected(mixed_D / np.linalg.norm(mixed_D), rows, 10)


def test_item_finds_others_and_not_itself(
    index: IndexAddress, vectors: tuple[Any, Encoder], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, encoder = vectors
    assert summary(search(index, capsys, "--id", "3.webp", "--k", 4)) == expected(rows[3], rows, 5)[1:]
    mixed_D = rows[3] + encoder.encode_texts(["哭"])[0]
    everything = expected(mixed_D / np.linalg.norm(mixed_D), rows, 11)
    hits = summary(search(index, capsys, "哭", "--id", "3.webp"))
    assert hits == [hit for hit in everything if hit[0] != "3.webp"][:10]


def test_conditions_and_least_score_narrow_the_results(index: IndexAddress, capsys: pytest.CaptureFixture[str]) -> None:
    everything = search(index, capsys, "哭", "--k", NUM_PICTURES)
    assert len(everything) == NUM_PICTURES
    groups = {one.group for one in EMOJI}
    assert len(groups) > 1
    group = sorted(groups)[0]
    assert search(index, capsys, "哭", "--k", NUM_PICTURES, "--where", f"group={group}") == [
        hit for hit in everything if hit["metadata"]["group"] == group
    ]
    fifth = everything[4]["score"]
    assert search(index, capsys, "哭", "--min-score", fifth) == everything[:5]
    assert search(index, capsys, "哭", "--k", 10 * NUM_PICTURES) == everything
    assert search(index, capsys, "哭", "--k", 1) == everything[:1]
    assert search(index, capsys, "哭", "--where", "group=无") == []


def test_table_has_score_id_and_caption_in_columns(index: IndexAddress, capsys: pytest.CaptureFixture[str]) -> None:
    hits = search(index, capsys, "哭", "--k", 3)
    cli.main(["search", str(index), "哭", "--k", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["score", "id", "caption"]
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[1:]] == [
        [f"{hit['score']:.4f}", hit["id"], hit["metadata"]["caption"]] for hit in hits
    ]
    cli.main(["search", str(index), "哭", "--min-score", "1.1"])
    assert capsys.readouterr().out == "nothing found\n"


def test_grid_shows_what_was_found(
    index: IndexAddress, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for kind in (store.Index, remote.RemoteIndex):
            patch.setattr(kind, "thumbnail", None)  # one call for all hits
        best = search(index, capsys, "哭", "--k", 3, "--grid", tmp_path / "g.png")[0]
    with Image.open(tmp_path / "g.png") as drawn:
        assert drawn.size[0] == 2 * 32 + 340 + 3 * 172
        top, left = 32 + 12 + 6, 32 + 340 + (172 - 128) // 2
        cell = np.asarray(drawn.crop((left, top, left + 128, top + 128)), dtype=float)
    with Image.open(pictures / best["id"]) as picture:
        wanted = np.asarray(picture.convert("RGB").resize((128, 128)), dtype=float)
    assert np.abs(cell - wanted).mean() < 8  # JPEG and another filter


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a search says that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["search", *map(str, args)])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_grid_overwrites_no_picture_query_or_file_of_the_index(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.png").symlink_to(pictures / "5.webp")
    os.link(pictures / "6.webp", tmp_path / "hard.png")
    query = tmp_path / "query.webp"
    query.write_bytes(EMOJI[0].picture)
    before = {path: path.read_bytes() for path in [*pictures.iterdir(), *folder.rglob("*"), query] if path.is_file()}
    for grid, reason in (
        (pictures / "4.webp", f"would overwrite {pictures / '4.webp'}, a picture of the index"),
        (tmp_path / "link.png", f"would overwrite {pictures / '5.webp'}, a picture of the index"),
        (tmp_path / "hard.png", f"would overwrite {pictures / '6.webp'}, a picture of the index"),
        (query, f"would overwrite {query}, which it reads"),
        (folder / "manifest.json", f"lies in the index {folder}"),
        (folder / "new.png", f"lies in the index {folder}"),
    ):
        assert f"--grid {grid}: {reason}" in refused(capsys, folder, "--image", query, "--grid", grid)
    assert before == {path: path.read_bytes() for path in before}
    search(folder, capsys, "--id", "1.webp", "--grid", tmp_path / "own.png")
    search(folder, capsys, "--id", "1.webp", "--grid", tmp_path / "own.png")


def test_a_damaged_thumbnail_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "i")
    for path in (tmp_path / "i").glob("segment-*/thumbnails.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    error = refused(capsys, tmp_path / "i", "--id", "1.webp", "--grid", tmp_path / "g.png")
    assert "is damaged" in error
    assert "see `cn-clip index check`" in error
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("name", ["--5", "-", "²", "9" * 5000])
def test_a_name_that_is_almost_a_number_is_no_item(
    index: IndexAddress, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{index}: has no item {name!r}" in refused(capsys, index, f"--id={name}")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the exported model is kept."""
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_other_backends_search_what_torch_has_built(
    folder: Path, backend: str, exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hits = search(folder, capsys, "哭", "--backend", backend, "--download-root", exports)
    assert summary(hits) == summary(search(folder, capsys, "哭"))


def test_files_of_other_exporters_are_told_apart_by_their_bytes(
    folder: Path, pictures: Path, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    search(folder, capsys, "--image", pictures / "1.webp", "--backend", "onnx", "--download-root", exports)
    search(folder, capsys, "哭", "--backend", "onnx", "--download-root", exports)
    for path in exports.rglob("model.*.fp32.onnx"):
        proto = onnx.load(path)
        del proto.metadata_props[:]
        onnx.save(proto, tmp_path / path.name)
    args = ["--model", tmp_path / "model", "--backend", "onnx"]
    cli.main(["index", "build", str(pictures), "--output", str(tmp_path / "i"), *map(str, args)])
    capsys.readouterr()
    cli.main(["search", str(tmp_path / "i"), "哭", "--backend", "onnx", "--json"])
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert summary(hits) == summary(search(folder, capsys, "哭"))
    assert open_index(tmp_path / "i").model.fingerprint == _digest(
        tmp_path / "model.img.fp32.onnx", tmp_path / "model.txt.fp32.onnx"
    )
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["search", str(folder), "哭", *map(str, args)])
    assert "its vectors are of the model Emoji-Tiny (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--id", "absent"), "{index}: has no item 'absent'"),
        (("--image", "{tmp}/absent.png"), "{tmp}/absent.png: no such file"),
        (("哭", "--where", "group"), "where: character 1: expected a condition such as"),
        (
            ("哭", "--where", "gruppe!=1"),
            "where: no item has the field 'gruppe'; did you mean 'group'? there are: caption",
        ),
        (("哭", "--model", "{tmp}/absent.pt"), "absent.pt not found; available models"),
        (("哭", "--min-score", "1.1", "--grid", "{tmp}/g.png"), "--grid {tmp}/g.png: nothing was found to draw"),
        (("哭", "--grid", "{tmp}/absent/g.png"), "the folder {tmp}/absent does not exist"),
    ],
)
def test_faulty_queries_are_refused_in_one_sentence(
    index: IndexAddress, tmp_path: Path, args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["search", str(index), *(one.format(tmp=tmp_path) for one in args)])
    err = capsys.readouterr().err
    assert sentence.format(tmp=tmp_path, index=index) in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "give a text, --image or --id"),
        (("  ",), "the text is empty"),
        (("--image", "a", "--id", "b"), "--image, --id: give one of them"),
        (("a", "--text-weight", "1.5"), "--text-weight: expected 0 to 1, got 1.5"),
        (("a", "--text-weight", "nan"), "--text-weight: expected 0 to 1, got nan"),
        (("a", "--text-weight", "inf"), "--text-weight: expected 0 to 1, got inf"),
        (("a", "--min-score", "nan"), "--min-score: expected a number, got nan"),
        (("a", "--k", "0"), "--k: expected at least 1, got 0"),
    ],
)
def test_faulty_settings_are_refused_with_status_2(
    args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["search", "i", *args])
    assert sentence in " ".join(re.sub("[│|]", " ", capsys.readouterr().err).split())


def test_no_picture_of_the_index_is_needed_to_search(
    index: IndexAddress, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.rename(pictures, pictures.parent / "away")
    try:
        assert len(search(index, capsys, "哭")) == 10
        assert addresses.open_index(index).thumbnail("0.webp") is not None
    finally:
        os.rename(pictures.parent / "away", pictures)


def test_a_text_and_a_picture_that_cancel_each_other_out_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opposite = -Encoder("Emoji-Tiny", device="cpu").encode_texts(["哭"])
    write_features(tmp_path / "z.jsonl", "image_id", [(["空"], opposite)])
    args = ["index", "build", tmp_path / "z.jsonl", "--output", tmp_path / "i", "--model", "Emoji-Tiny"]
    cli.main(list(map(str, args)))
    message = refused(capsys, tmp_path / "i", "哭", "--id", "空")
    assert "--text-weight 0.5: the weighted parts cancel each other out" in message


# --- changes


WILD = "表\udce6情 '\"%.webp"


@pytest.fixture(params=STORES)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[IndexAddress, Callable[..., None]]]:
    """An index of twelve pictures in tmp_path / "p", and what builds it again; one of them is called `WILD`."""
    (tmp_path / "p").mkdir()
    for number, one in enumerate(EMOJI[:11]):
        (tmp_path / "p" / f"{number:02d}.webp").write_bytes(one.picture)
    (tmp_path / "p" / WILD).write_bytes(EMOJI[11].picture)
    rows = ["image,year", *(f"{number:02d}.webp,{2015 + number}" for number in range(11))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with settled(request.param, tmp_path / "i") as (place, settings):

        def update() -> None:
            build(tmp_path / "p", *settings)

        update()
        yield place, update


def nearest(index: IndexAddress, capsys: pytest.CaptureFixture[str], picture: Path, *args: object) -> tuple[str, float]:
    """The best hit for a picture."""
    return summary(search(index, capsys, "--image", picture, "--k", 1, *args))[0]


def test_what_is_changed_added_and_removed_is_found_as_it_is_now(
    small: tuple[IndexAddress, Callable[..., None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, update = small
    old, new = tmp_path / "old.webp", tmp_path / "new.webp"
    old.write_bytes(EMOJI[3].picture)
    new.write_bytes(EMOJI[50].picture)
    assert nearest(index, capsys, old) == ("03.webp", 1.0)
    thumbnail = addresses.open_index(index).thumbnail("03.webp")
    (tmp_path / "p" / "03.webp").write_bytes(new.read_bytes())
    (tmp_path / "p" / "12.webp").write_bytes(EMOJI[51].picture)
    update()
    assert nearest(index, capsys, new) == ("03.webp", 1.0)
    assert nearest(index, capsys, old)[1] < 1.0
    assert nearest(index, capsys, tmp_path / "p" / "12.webp") == ("12.webp", 1.0)
    opened = addresses.open_index(index)
    assert (len(opened), len(set(opened.ids))) == (13, 13)
    assert opened.metadata("03.webp")["year"] == "2018"
    assert opened.thumbnail("03.webp") not in (None, thumbnail)

    (tmp_path / "p" / "12.webp").unlink()
    update()
    cli.main(["index", "remove", str(index), "--where", "year>=2018 year<2020"])
    assert {spelled(WILD), *(f"{number:02d}.webp" for number in (0, 1, 2, 5, 6, 7, 8, 9, 10))} == {
        hit["id"] for hit in search(index, capsys, "哭", "--k", 100)
    }
    assert f"{index}: has no item '03.webp'" in refused(capsys, index, "--id", "03.webp")


def test_names_that_are_no_text_are_found_and_removed(
    small: tuple[IndexAddress, Callable[..., None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, _ = small
    assert nearest(index, capsys, tmp_path / "p" / WILD) == (spelled(WILD), 1.0)
    assert spelled(WILD) not in [hit["id"] for hit in search(index, capsys, "--id", WILD, "--k", 12)]
    cli.main(["index", "remove", str(index), WILD])
    assert spelled(WILD) not in addresses.open_index(index)


def test_another_model_is_refused_by_search_and_by_build(
    small: tuple[IndexAddress, Callable[..., None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, _ = small
    other = tmp_path / "other.pt"
    torch.save({"state_dict": create_model("ViT-Tiny-64@BERT-Tiny-chinese").state_dict()}, other)
    sentence = f"{index}: its vectors are of the model Emoji-Tiny ("
    assert sentence in refused(capsys, index, "哭", "--model", other)
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["index", "add", str(index), str(tmp_path / "p" / "00.webp"), "--model", str(other)])
    assert sentence in capsys.readouterr().err
