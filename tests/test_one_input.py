"""One text, or one picture, gives one vector, by whichever way it comes in."""

import contextlib
import importlib.util
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from dataset_files import jsonl_line, tsv_line, write_split
from PIL import Image
from serving import data_url, served

import cn_clip.clip as clip
from cn_clip import cli
from cn_clip.clip import scoring
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.thumbnails import thumbnail
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.clip.transforms import ImageTransform, in_8_bits
from cn_clip.data.augment import Augmentation
from cn_clip.data.bulk_pictures import open_collection
from cn_clip.data.datasets import LmdbPairs, PairDataset
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, read_split
from cn_clip.data.pictures import ClassFolders, LmdbPictures, batches, check_picture
from cn_clip.demo import emoji
from cn_clip.errors import DataError
from cn_clip.features import ray_extraction
from cn_clip.features.files import read_features
from cn_clip.report.page import flattened
from cn_clip.retrieval.store import Index, open_index

MODEL = ("--device", "cpu", "--num-threads", "1")
TOLERANCE = {"rtol": 0, "atol": 2e-6}
# As users write them, and the rows of ids that Chinese-CLIP's scripts make of them.
TEXTS = [
    "“生日”蛋糕",
    "A “Red” HEART",
    "İstanbul“",
    "全角ＡＢＣ，１２３",
    "零\u200b宽",
    "行\u2028内",
    "   ",
    "猫" * 300,
]
PREPARED = [text.lower().replace("“", '"').replace("”", '"') for text in TEXTS]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def expected(encoder: Encoder) -> np.ndarray:
    """Unit rows of the texts, computed from what Chinese-CLIP's scripts make of them."""
    model, _ = clip.load_from_name("Emoji-Tiny", device="cpu")
    with torch.no_grad():
        rows = model.encode_text(clip.tokenize(PREPARED))
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split with a picture for each text, and the LMDB of it."""
    folder = tmp_path_factory.mktemp("data")
    pictures = [emoji.png(one) for one in emoji.load()[: len(TEXTS)]]
    write_split(
        folder,
        [tsv_line(number, data) for number, data in enumerate(pictures)],
        [jsonl_line(number, text, [number]) for number, text in enumerate(TEXTS)],
        split="valid",
    )
    quietly("dataset", "build", "--data_dir", folder, "--splits", "valid")
    return folder


def quietly(*args: object) -> dict[str, Any]:
    """Runs a command in this process and returns the JSON that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main([*map(str, args), "--json"])
    return dict(json.loads(out.getvalue()))


@pytest.fixture(scope="module")
def index(data: Path) -> Index:
    folder = data / "one.index"
    quietly("index", "build", data / "lmdb" / "valid", "--output", folder, "--model", "Emoji-Tiny")
    return open_index(folder)


@pytest.fixture(scope="module")
def client(encoder: Encoder, index: Index) -> Iterator[httpx.Client]:
    with served(encoder, index=index) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def post(client: httpx.Client, route: str, **fields: Any) -> Any:
    answer = client.post(f"/v1/{route}", json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def vectors(data: Any) -> np.ndarray:
    return np.array([one["embedding"] for one in data], dtype=np.float32)


# --- texts


def test_the_text_transform_prepares_and_tokenize_stays_bare() -> None:
    assert ChineseTexts(52).rows(TEXTS) == ChineseTexts(52).rows(PREPARED)
    assert ChineseTexts(52).rows(["“猫”"]) == ChineseTexts(52).rows(['"猫"'])
    assert clip.tokenize(["“猫”"]).tolist() != clip.tokenize(['"猫"']).tolist()


def test_the_encoder_gives_the_vectors_of_the_scripts(encoder: Encoder, expected: np.ndarray) -> None:
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected, **TOLERANCE)


@pytest.mark.parametrize("suffix", ["jsonl", "npz", "parquet"])
def test_features_gives_them(data: Path, expected: np.ndarray, suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    output = tmp_path / f"texts.{suffix}"
    texts = ("--text-data", data / "valid_texts.jsonl", "--text-feat-output-path", output)
    quietly("features", "--extract-text-feats", *texts, "--resume", "Emoji-Tiny", *MODEL)
    np.testing.assert_allclose(read_features(output, "text_id").vectors, expected, **TOLERANCE)


def test_workers_of_ray_give_them(data: Path, encoder: Encoder, expected: np.ndarray) -> None:
    part = ray_extraction.TextPart(list(enumerate(TEXTS)))
    np.testing.assert_allclose(ray_extraction.text_rows(encoder, part, batch_size=3), expected, **TOLERANCE)


def test_the_service_gives_them(client: httpx.Client, expected: np.ndarray) -> None:
    np.testing.assert_allclose(vectors(post(client, "embeddings", input=TEXTS)), expected, **TOLERANCE)
    for text, row in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(vectors(post(client, "embeddings", input=text))[0], row, **TOLERANCE)


def test_search_scores_with_them_on_the_command_line_and_over_http(
    client: httpx.Client, index: Index, expected: np.ndarray
) -> None:
    for text, row in zip(TEXTS, expected, strict=True):
        wanted = {hit.id: hit.score for hit in index.search(row[None], len(TEXTS))[0]}
        over_http = {hit["id"]: hit["score"] for hit in post(client, "search", query=text, k=len(TEXTS))}
        assert over_http == pytest.approx(wanted, abs=2e-6)
        if text.strip():  # an empty query is a slip of the hand
            found = quietly("search", index.address, text, "--k", len(TEXTS), *MODEL)
            assert {hit["id"]: hit["score"] for hit in found["hits"]} == pytest.approx(wanted, abs=2e-6)


def test_classifiers_are_made_of_them(client: httpx.Client, encoder: Encoder, expected: np.ndarray) -> None:
    labels = TEXTS[:4]
    np.testing.assert_allclose(scoring.classifier(encoder, labels, ["{}"]), expected[:4], **TOLERANCE)
    picture = emoji.png(emoji.load()[0])
    wanted = expected[:4] @ encoder.encode_images([picture])[0]
    found = post(client, "classify", image=data_url(picture), labels=labels, templates=["{}"])
    assert {one["index"]: one["cosine"] for one in found} == pytest.approx(dict(enumerate(wanted.tolist())), abs=2e-6)


def test_training_and_validation_read_the_ids_of_them(data: Path) -> None:
    texts, split = ChineseTexts(52), data / "lmdb" / "valid"
    pairs = PairDataset(LmdbPairs(split), lambda image: torch.zeros(1), texts)
    assert [pairs[number].tokens.tolist() for number in range(len(pairs))] == clip.tokenize(PREPARED).tolist()
    whole = read_split(PairStore(split / PAIRS), LmdbPictures(split / IMAGES).ids)
    assert texts.rows(whole.texts) == texts.rows(PREPARED)


# --- pictures


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def gradient(dtype: str, highest: float) -> Image.Image:
    """16 x 16 values from 0 to `highest`, falling from left to right and rising downwards."""
    steps = np.linspace(0, 1, 256).reshape(16, 16)[:, ::-1] * highest
    return Image.fromarray(steps.astype(dtype))


RGB = Image.open(io.BytesIO(emoji.png(emoji.load()[3]))).convert("RGB").resize((40, 30))
PICTURES = {
    "png": encoded(RGB),
    "jpeg": encoded(RGB, "JPEG"),
    "tiff": encoded(RGB, "TIFF"),
    "palette": encoded(RGB.quantize(16), "GIF"),
    "grey and alpha": encoded(RGB.convert("LA")),
    "alpha": encoded(RGB.convert("RGBA")),
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "1 bit": encoded(RGB.convert("1")),
    "16 bit": encoded(gradient("uint16", 65535)),
    "16 bit, dark": encoded(gradient("uint16", 255)),
    "32 bit": encoded(gradient("int32", 40000), "TIFF"),
    "floats": encoded(gradient("float32", 1), "TIFF"),
}


def test_a_picture_gives_one_vector_by_every_way_in(encoder: Encoder, tmp_path: Path) -> None:
    images = tmp_path / "all" / "pictures"
    images.mkdir(parents=True)
    paths = [images / f"{number:02d}{name}" for number, name in enumerate(PICTURES)]
    for path, data in zip(paths, PICTURES.values(), strict=True):
        path.write_bytes(data)  # without a suffix
    expected = encoder.encode_images(paths)
    urls = [data_url(data, "whatever") for data in PICTURES.values()]
    opened = [Image.open(io.BytesIO(data)) for data in PICTURES.values()]
    for given in (list(PICTURES.values()), list(map(str, paths)), urls, opened):
        np.testing.assert_allclose(encoder.encode_images(given), expected, **TOLERANCE)
    lines = [tsv_line(number, data) for number, data in enumerate(PICTURES.values())]
    write_split(tmp_path, lines, [jsonl_line(1)], split="test")
    quietly("dataset", "build", "--data_dir", tmp_path, "--splits", "test")
    sources = [tmp_path / "lmdb" / "test", images]
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for number, path in enumerate(paths):
            tar.add(path, f"{number:02d}.png")
    for source in sources:
        folder = tmp_path / f"{source.name}.index"
        quietly("index", "build", source, "--output", folder, "--model", "Emoji-Tiny")
        index = open_index(folder)
        order = sorted(index.ids, key=lambda one: (isinstance(one, str), one))
        np.testing.assert_allclose([index.vector(one) for one in order], expected, **TOLERANCE)
    parts = [tmp_path / "p.tar", *sources]
    if importlib.util.find_spec("pyarrow"):
        for place in parts:
            collection = open_collection(str(place))
            part = collection.part(0, len(collection.ids))
            rows = [encoder.encode_images([part[number].data])[0] for number in range(len(part))]
            order = np.argsort([int(str(one).rpartition("/")[2][:2]) for one in collection.ids])
            np.testing.assert_allclose(np.array(rows)[order], expected, **TOLERANCE)
    classes = ClassFolders(tmp_path / "all")
    rows = [encoder.backend.encode_pixels(pixels) for _, pixels in batches(classes, encoder.transform, 5)]
    np.testing.assert_allclose(np.concatenate(rows), expected, **TOLERANCE)


def test_data_urls_and_page_pictures_give_the_vectors_of_the_file(client: httpx.Client, encoder: Encoder) -> None:
    served_kinds = ["png", "jpeg", "palette", "grey and alpha", "alpha", "cmyk", "1 bit", "16 bit", "16 bit, dark"]
    for data in (PICTURES[name] for name in served_kinds):
        expected = encoder.encode_images([data])[0]
        for given in (data_url(data), {"image": data_url(data)}, [data_url(data)]):
            found = vectors(post(client, "embeddings", input=given))[0]
            np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_a_data_url_is_a_picture_wherever_a_plain_string_may_be_one(client: httpx.Client, encoder: Encoder) -> None:
    url = data_url(PICTURES["png"], "PNG")
    mixed = vectors(post(client, "embeddings", input=["“生日”蛋糕", url]))
    np.testing.assert_allclose(mixed[1], encoder.encode_images([PICTURES["png"]])[0], **TOLERANCE)
    assert post(client, "search", query=url, k=3) == post(client, "search", query={"image": url}, k=3)
    body = {"model": "tiny", "input": "data:image/png;base64,a$b="}
    answer = client.post("/v1/embeddings", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "not valid base64" in answer.json()["error"]["message"]


def test_where_words_are_expected_a_data_url_is_refused_with_what_to_send(
    client: httpx.Client, encoder: Encoder
) -> None:
    url = data_url(PICTURES["png"] * 9)
    for route, fields, param in (
        ("search", {"query": {"text": url}}, "query.text"),
        ("classify", {"image": url, "labels": ["猫", url]}, "labels[1]"),
    ):
        answer = client.post(f"/v1/{route}", json=fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert 'send it as {"image": …}' in error["message"]
    with pytest.raises(DataError, match=r"texts\[1\]: is a picture as a data URL, no text; give it to encode_images"):
        encoder.encode_texts(["猫", url])
    with pytest.raises(DataError, match=r"picture 0: not decoded: the data URL is not in base64"):
        encoder.encode_images("data:image/png,abc")


# --- grey of more than 8 bits


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (gradient("uint16", 65535), gradient("uint16", 65535 / 256)),
        (gradient("uint16", 4095), gradient("uint16", 4095 / 256)),
        (gradient("int32", 65535), gradient("uint16", 65535 / 256)),
        (gradient("float32", 1), np.round(np.asarray(gradient("float32", 1)) * 255)),
    ],
)
def test_grey_of_more_bits_is_scaled_to_eight(image: Image.Image, expected: Any) -> None:
    eight = in_8_bits(image)
    assert eight.mode == "L"
    np.testing.assert_array_equal(np.asarray(eight), np.asarray(expected))
    transform = ImageTransform(16)
    np.testing.assert_array_equal(transform.array(image), transform.array(eight))


def test_values_that_fit_eight_bits_and_other_modes_are_left_as_they_are() -> None:
    for image in (gradient("uint16", 255), gradient("int32", 255), gradient("float32", 255), RGB, RGB.convert("LA")):
        assert in_8_bits(image) is image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.array([[-1024, 3071]], dtype=np.int32)), "values from -1024 to 3071; expected 0 to 65535"),
        (Image.fromarray(np.array([[0, 1e9]], dtype=np.float32)), r"values from 0 to 1e\+09"),
        (Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "values from nan to nan"),
    ],
)
def test_other_ranges_are_refused_by_the_name_of_the_picture(
    encoder: Encoder, tmp_path: Path, image: Image.Image, reason: str
) -> None:
    (tmp_path / "a.tif").write_bytes(encoded(image, "TIFF"))
    with pytest.raises(DataError, match=rf"a\.tif: a grey picture with {reason}"):
        encoder.encode_images([tmp_path / "a.tif"])
    with pytest.raises(DataError, match=reason):
        check_picture(encoded(image, "TIFF"), "decode")


def test_reference_clips_to_white_as_chinese_clip_does(encoder: Encoder) -> None:
    transform = ImageTransform(16, "reference")
    white, clipped = (transform.array(Image.new("RGB", (16, 16), "white")), transform.array(gradient("uint16", 65535)))
    assert (clipped == white).mean() > 0.9
    as_is = Encoder("Emoji-Tiny", device="cpu", decode="reference")
    picture = PICTURES["16 bit"]
    assert float(as_is.encode_images([picture])[0] @ encoder.encode_images([picture])[0]) < 0.95
    np.testing.assert_array_equal(as_is.encode_images([PICTURES["png"]]), encoder.encode_images([PICTURES["png"]]))


def test_the_check_tells_how_many_pictures_are_scaled_and_how_many_texts_are_blank(tmp_path: Path) -> None:
    images = [tsv_line(number, PICTURES[name]) for number, name in enumerate(["16 bit", "png", "32 bit"])]
    write_split(tmp_path, images, [jsonl_line(1, "", [0]), jsonl_line(2, " \u3000", [1]), jsonl_line(3, "猫", [2])])
    for built in (False, True):
        if built:
            quietly("dataset", "build", "--data_dir", tmp_path, "--splits", "train")
            (tmp_path / "train_imgs.tsv").unlink()
            (tmp_path / "train_texts.jsonl").unlink()
        summary = quietly("dataset", "check", "--data_dir", tmp_path)
        (split,) = summary["splits"]
        assert (summary["ok"], split["images"], split["texts"]) == (True, 3, 3)
        deep, blank = split["notes"]
        assert deep.startswith("2 pictures are grey of more than 8 bits: they are scaled to 8")
        assert blank.startswith("2 texts are empty or blank")


def test_augmentation_and_thumbnails_see_the_scaled_picture() -> None:
    deep, eight = gradient("uint16", 65535), in_8_bits(gradient("uint16", 65535))
    first, second = (Augmentation(16)(image, random.Random(7)) for image in (deep, eight))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert thumbnail(deep, 16) == thumbnail(eight, 16)
    np.testing.assert_array_equal(np.asarray(flattened(deep)), np.asarray(flattened(eight)))
