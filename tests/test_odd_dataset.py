"""One odd dataset through every command: the same pictures, the same ids, the same texts, the same recall in each.

Ids in quotes and without, with leading zeros, beyond 2^53, negative, of words; byte-order marks, CRLF, U+2028 in texts;
empty, blank, equal, full-width and very long texts; numbers as texts; curly quotes.
"""

import base64
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import in_process_runs
import numpy as np
import pytest
from PIL import Image
from serving import served

from cn_clip import cli
from cn_clip.clip.encoder import Encoder
from cn_clip.data.datasets import LmdbPairs
from cn_clip.data.records import RecordId
from cn_clip.data.shards import ShardPairs
from cn_clip.demo import emoji
from cn_clip.eval import transform_ir_annotation_to_tr
from cn_clip.features.files import read_features
from cn_clip.retrieval.store import open_index

BOM = b"\xef\xbb\xbf"
FORMATS = ["jsonl", "npz", "parquet"]
LARGE = 2**53
# As the file has them, and what they are.
IMAGE_IDS: list[tuple[str, RecordId]] = [
    *(("7", 7), ("007", "007"), ("-3", -3), ("0", 0), (str(LARGE), LARGE), (str(LARGE + 1), LARGE + 1)),
    *(("图-甲", "图-甲"), ("a b", "a b"), ("8", 8), ("1.50", "1.50"), (str(10**21), 10**21), ("-0", "-0"), ("9", 9)),
]
# text id as the file has it, what it is, the text, ids of pictures as the file has them
TEXTS: list[tuple[object, RecordId, object, list[object]]] = [
    (1, 1, "“生日”蛋糕", ["7"]),
    ("2", 2, '"生日"蛋糕', [7]),
    ("003", "003", "行\u2028内的分隔符", ["007"]),
    (-4, -4, "ＡＢＣ全角，１２３", [-3, "0"]),
    (str(LARGE + 1), LARGE + 1, "很长" * 200, [str(LARGE)]),
    (LARGE, LARGE, "一只猫", [LARGE + 1]),
    ("句-乙", "句-乙", "一只猫", ["图-甲"]),
    (10**21, 10**21, "", ["a b", 8]),
    ("9", 9, " \u3000 ", ["1.50"]),
    (10, 10, 2024, [10**21]),
    ("-0", "-0", "A “Red” HEART", ["-0"]),
    (12, 12, "没有图片的句子", [9]),
]
KINDS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    images, pictures = BOM, emoji.load()
    for number, (written, _) in enumerate(IMAGE_IDS):
        stream = io.BytesIO()
        Image.open(io.BytesIO(pictures[number].picture)).convert("RGB").save(stream, KINDS[number % len(KINDS)])
        images += written.encode() + b"\t" + base64.b64encode(stream.getvalue()) + b"\r\n"
    lines = [
        json.dumps({"text_id": written, "text": text, "image_ids": ids}, ensure_ascii=False).encode()
        for written, _, text, ids in TEXTS
    ]
    (folder / "valid_imgs.tsv").write_bytes(images)
    (folder / "valid_texts.jsonl").write_bytes(BOM + b"\r\n".join(lines))
    return folder


def run(*args: object) -> dict[str, Any]:
    """Runs a command in this process and returns the JSON that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main([*map(str, args), "--json"])
    return dict(json.loads(out.getvalue()))


@pytest.fixture(scope="module")
def split(data: Path) -> Path:
    """The LMDB of the dataset."""
    run("dataset", "build", "--data_dir", data, "--splits", "valid")
    return data / "lmdb" / "valid"


@pytest.fixture(scope="module")
def trained(split: Path) -> tuple[Path, dict[str, float]]:
    """A checkpoint after one step, and the recall that its validation measured."""
    in_process_runs.run(split, split.parent / "logs", max_steps=1, valid_epoch_interval=1)
    folder = split.parent / "logs" / "x"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder / "checkpoints" / "epoch_latest.pt", [line for line in lines if "text_to_image_r1" in line][-1]


@pytest.fixture(scope="module")
def features(data: Path, split: Path, trained: tuple[Path, dict[str, float]]) -> Path:
    """Folder with the features of the checkpoint in every format."""
    folder = data / "features"
    folder.mkdir()
    for suffix in FORMATS:
        kinds = ("--extract-image-feats", "--extract-text-feats")
        inputs = ("--image-data", split / "imgs", "--text-data", data / "valid_texts.jsonl")
        outputs = (
            "--image-feat-output-path",
            folder / f"i.{suffix}",
            "--text-feat-output-path",
            folder / f"t.{suffix}",
        )
        run("features", *kinds, *inputs, *outputs, "--resume", trained[0], "--device", "cpu", "--num-threads", 1)
    return folder


@pytest.fixture(scope="module")
def recalls(data: Path, features: Path) -> dict[str, list[float]]:
    """r1, r5 and r10 of texts and of pictures, in percent, from the features of each format."""
    run("dataset", "check", "--data_dir", data)
    transform_ir_annotation_to_tr.main(["--input", str(data / "valid_texts.jsonl")])
    standards = {"text": data / "valid_texts.jsonl", "image": data / "valid_texts.tr.jsonl"}
    found: dict[str, list[float]] = {}
    for suffix in FORMATS:
        for query, standard in standards.items():
            predictions, result = features / f"{query}.{suffix}.jsonl", features / f"{query}.{suffix}.json"
            inputs = ("--image-feats", features / f"i.{suffix}", "--text-feats", features / f"t.{suffix}")
            run("topk", *inputs, "--output", predictions, "--query", query, "--device", "cpu")
            scores = run("recall", standard, predictions, result, "--query", query)
            assert scores["success"] is True
            found.setdefault(suffix, []).extend(scores["scoreJson"][name] for name in ("r1", "r5", "r10"))
    return found


def test_the_check_passes_and_tells_of_the_blank_texts(data: Path, split: Path) -> None:
    summary = run("dataset", "check", "--data_dir", data)
    (found,) = summary["splits"]
    num_pairs = sum(len(ids) for *_, ids in TEXTS)
    assert (summary["ok"], found["images"], found["texts"], found["pairs"]) == (
        True, len(IMAGE_IDS), len(TEXTS), num_pairs
    )  # fmt: skip
    assert found["notes"] == ["2 texts are empty or blank: they are trained on and searched for as they are"]


def expected_pairs() -> list[tuple[RecordId, RecordId, str]]:
    known = dict(IMAGE_IDS)
    return [(known[str(one)], text_id, str(text)) for _, text_id, text, ids in TEXTS for one in ids]


def test_lmdb_and_shards_hold_the_same_pairs(split: Path, tmp_path: Path) -> None:
    stored = LmdbPairs(split)
    pairs = [stored[number] for number in range(len(stored))]
    assert [(one.image_id, one.text_id, one.text) for one in pairs] == expected_pairs()
    written = run("dataset", "shards", "--lmdb", split, "--output", tmp_path / "s", "--pairs-per-shard", 4)
    shards = ShardPairs(written["train_data"])
    assert len(shards) == written["pairs"] == len(pairs)
    in_shards = {
        (one.image_id, one.text_id, one.text, one.picture) for one in map(shards.__getitem__, range(len(shards)))
    }
    # Blanks around a text are no part of it in a tar.
    assert in_shards == {(one.image_id, one.text_id, one.text.strip(), one.picture) for one in pairs}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_feature_file_has_the_same_ids_and_rows(features: Path, suffix: str) -> None:
    texts, images = (
        read_features(features / f"t.{suffix}", "text_id"),
        read_features(features / f"i.{suffix}", "image_id"),
    )
    assert texts.ids == [text_id for _, text_id, _, _ in TEXTS]
    assert sorted(images.ids, key=str) == sorted((one for _, one in IMAGE_IDS), key=str)
    for found, name, field in ((texts, "t", "text_id"), (images, "i", "image_id")):
        np.testing.assert_array_equal(found.vectors, read_features(features / f"{name}.jsonl", field).vectors)
    # Curly and straight quotes, and equal words, are one text.
    np.testing.assert_array_equal(texts.vectors[[0, 5, 7]], texts.vectors[[1, 6, 8]])


def test_recall_is_that_of_the_trainer_from_every_format(
    trained: tuple[Path, dict[str, float]], recalls: dict[str, list[float]]
) -> None:
    names = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    for suffix in FORMATS:
        assert recalls[suffix] == pytest.approx([100 * trained[1][name] for name in names]), suffix
    assert max(recalls["jsonl"]) > 0


def test_evaluate_wise_ft_and_report_measure_it_too(
    data: Path, split: Path, trained: tuple[Path, dict[str, float]], recalls: dict[str, list[float]], tmp_path: Path
) -> None:
    expected, checkpoint = recalls["jsonl"], trained[0]
    alone = ("--device", "cpu", "--num-workers", 0)
    where = ("--data", data, "--split", "valid", "--output", tmp_path / "e")
    flickr = run("evaluate", "flickr30k-cn", *where, "--checkpoint", checkpoint, *alone)
    for value in expected:
        assert pytest.approx(value) in _numbers(flickr), flickr
    mixed = run(
        "wise-ft", "--zeroshot", checkpoint, "--finetuned", checkpoint, "--val-data", split, "--alphas", "1", *alone
    )
    found = [100 * value for value in _numbers(mixed)]
    for value in expected:
        assert pytest.approx(value) in found, mixed
    page = tmp_path / "report.html"
    reported = run("report", "--checkpoint", checkpoint, "--data", split, "--output", page, *alone)
    found = [100 * value for value in _numbers(reported)]
    for value in expected:
        assert pytest.approx(value) in found, reported


def _numbers(value: object) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return _numbers(list(value.values()))
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_an_index_knows_every_picture_by_its_id(
    split: Path, features: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    model = ("--model", trained[0], "--device", "cpu")
    run("index", "build", split, "--output", tmp_path / "a", *model)
    run("index", "build", features / "i.jsonl", "--output", tmp_path / "b", *model)
    images = read_features(features / "i.npz", "image_id")
    for name in ("a", "b"):
        index = open_index(tmp_path / name)
        assert list(map(repr, sorted(index.ids, key=str))) == list(map(repr, sorted(images.ids, key=str)))
        assert run("index", "check", tmp_path / name)
        rows = [index.vector(one) for one in images.ids]
        np.testing.assert_allclose(rows, images.vectors, atol=2e-6)
    captions = {one: open_index(tmp_path / "a").metadata(one)["caption"] for one in images.ids}
    first: dict[RecordId, str] = {}
    for image_id, _, text in expected_pairs():
        first.setdefault(image_id, text)
    assert captions == first
    (tmp_path / "more.jsonl").write_bytes(
        BOM + b"".join(json.dumps({"image": one, "n": n}).encode() + b"\r\n" for n, (one, _) in enumerate(IMAGE_IDS))
    )
    added = run("index", "add", tmp_path / "a", split, "--metadata", tmp_path / "more.jsonl", *model)
    assert added["unmatched_rows"] == 0
    index = open_index(tmp_path / "a")
    assert [index.metadata(one)["n"] for _, one in IMAGE_IDS] == list(range(len(IMAGE_IDS)))
    _assert_found(tmp_path / "a", [one for _, one in IMAGE_IDS], Encoder(trained[0], device="cpu"))


def _assert_found(folder: Path, ids: Sequence[RecordId], encoder: Encoder) -> None:
    """An item is found by its id on the command line and over HTTP, as an integer and as its digits."""
    index = open_index(folder)
    with served(encoder, index=index) as address, httpx.Client(base_url=address, timeout=60) as client:
        for one in ids:
            nearest = index.search(index.vector(one)[None], 4)[0]
            expected = [hit.id for hit in nearest if hit.id != one][:3]
            assert [hit["id"] for hit in run("search", folder, f"--id={one}", "--k", 3)["hits"]] == expected
            for asked in (one, str(one)):
                answer = client.post("/v1/search", json={"query": {"id": asked}, "k": 4})
                assert [hit["id"] for hit in answer.json()["data"]] == [hit.id for hit in nearest], answer.text


@pytest.mark.parametrize("name", ["valid_imgs.tsv", "valid_texts.jsonl"])
def test_a_byte_that_is_no_utf8_is_named_with_its_line_by_every_command(
    data: Path, split: Path, tmp_path: Path, name: str
) -> None:
    for path in data.glob("valid_*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" + lines[2]
    (tmp_path / name).write_bytes(b"".join(lines))
    (fault,) = [one for one in _faults(tmp_path) if one["line"] == 3]
    assert "invalid UTF-8" in fault["message"]
    commands: list[list[object]] = [["dataset", "build", "--data_dir", tmp_path, "--splits", "valid"]]
    if name == "valid_texts.jsonl":
        text_data = tmp_path / name
        output = ["--text-feat-output-path", tmp_path / "t.npz", "--resume", "Emoji-Tiny", "--device", "cpu"]
        commands += [["features", "--extract-text-feats", "--text-data", text_data, *output]]
    for command in commands:
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
            cli.main([*map(str, command)])
        assert f"{name}:3: " in err.getvalue(), command
        assert "invalid UTF-8" in err.getvalue()
        assert "Traceback" not in err.getvalue()


def _faults(folder: Path) -> list[dict[str, Any]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        cli.main(["dataset", "check", "--data_dir", str(folder), "--json"])
    return list(json.loads(out.getvalue())["splits"][0]["faults"])


def test_labels_and_class_folders_may_be_as_odd(tmp_path: Path, trained: tuple[Path, dict[str, float]]) -> None:
    """Curly quotes, a byte-order mark and CRLF in the labels; pictures of every suffix and kind, with none too."""
    plain, labels, pictures = ['"生日"蛋糕', "行\u2028内", "A red HEART"], tmp_path / "labels.txt", emoji.load()
    kinds = {".jfif": "JPEG", ".JPE": "JPEG", ".webp": "WEBP", "": "PNG", ".TIF": "TIFF", ".gif": "GIF"}
    for number in range(18):
        path = tmp_path / "test" / str(number % 3) / f"{number:02d}图{list(kinds)[number % 6]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(pictures[number].picture)).convert("RGB")
        picture.save(path, kinds[list(kinds)[number % 6]])
    model = ("--model", trained[0], "--device", "cpu", "--num-workers", 0)

    def zeroshot(written: bytes, folder: str) -> tuple[dict[str, Any], list[list[float]]]:
        labels.write_bytes(written)
        where = ("--datapath", tmp_path / "test", "--label-file", labels, "--dataset", "odd", "--save-dir")
        result = run("zeroshot", *where, tmp_path / folder, *model)
        return result, json.loads((tmp_path / folder / "odd.json").read_text("utf-8"))["predictions"][0]

    result, shares = zeroshot("\n".join(plain).encode(), "plain")
    odd, odd_shares = zeroshot(BOM + "“生日”蛋糕\r\n行\u2028内\r\nA red HEART\r\n".encode(), "odd")
    assert np.shape(shares) == (18, 3)
    np.testing.assert_array_equal(odd_shares, shares)
    own = {"predictions", "per_class"}
    assert {name: odd[name] for name in odd.keys() - own} == {name: result[name] for name in result.keys() - own}
    # The same figure in the table, from a file that has a byte-order mark itself.
    (tmp_path / "z.json").write_bytes(BOM + json.dumps(odd).encode())
    top1 = _numbers(run("compare", f"ours={tmp_path / 'z.json'}"))[0]
    by_hand = np.mean(np.argmax(np.array(shares), axis=1) == np.repeat([0, 1, 2], 6))
    assert top1 == pytest.approx(100 * by_hand)
    # A probe of the same pictures, and of their features, ends alike.
    rows = Encoder(trained[0], device="cpu").encode_images(sorted((tmp_path / "test").glob("*/*")))
    np.savez(tmp_path / "rows.npz", features=rows, labels=np.repeat([0, 1, 2], 6))
    probes = [
        run("linear-probe", "--train", one, "--test", one, "--c", 1, *more)
        for one, more in (
            (tmp_path / "test", ("--checkpoint", *model[1:])),
            (tmp_path / "rows.npz", ("--device", "cpu")),
        )
    ]
    assert probes[0]["top1"] == pytest.approx(probes[1]["top1"])
    assert probes[0]["num_test"] == 18
