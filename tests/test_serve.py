"""The HTTP service with the bundled model: what clients get is what `Encoder`, the index and the softmax give."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import warm_python
from PIL import Image
from serving import data_url, served
from tiny_families import write_family

from cn_clip.clip import scoring
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.templates import DEFAULT, load_templates
from cn_clip.emoji_pack import load
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve.limits import MAX_JSON_MARKS, MAX_TEXT_CHARS, Limits

ROOT = Path(__file__).parents[1]
TEXTS = ["戴墨镜的笑脸", "一只猫", "A red HEART"]
PICTURES = [one.picture for one in load()[:40]]
BARE = 39  # the item without a thumbnail
LABELS = ["猫脸", "鸟", "水果"]
# Rows of a batch are rounded a little differently from those of another size.
TOLERANCE = {"rtol": 0, "atol": 2e-6}
LIMITS = Limits(max_items=64, max_body_mb=1, max_pixels=1_000_000, max_request_pixels=2_000_000, max_wait_ms=1)


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def picture_rows(encoder: Encoder) -> np.ndarray:
    return encoder.encode_images(PICTURES)


@pytest.fixture(scope="module")
def index(encoder: Encoder, picture_rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index") / "emoji.index"
    items = [
        NewItem(
            number if number else "a/b 一",
            row,
            {"even": number % 2 == 0, "number": number},
            b"" if number == BARE else b"\xff\xd8thumbnail",
        )
        for number, row in enumerate(picture_rows)
    ]
    with open_writer(folder, Manifest(ModelInfo("tiny", "fingerprint", encoder.embed_dim))) as writer:
        writer.commit(items)
    return open_index(folder)


@pytest.fixture(scope="module")
def address(encoder: Encoder, index: Index) -> Iterator[str]:
    with served(encoder, LIMITS, index=index, label_sets={"three": LABELS}) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def embeddings(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/embeddings", json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def vectors(answer: dict[str, Any]) -> np.ndarray:
    return np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)


# --- /v1/embeddings


def test_embeddings_of_texts_and_pictures_are_those_of_the_encoder(client: httpx.Client, encoder: Encoder) -> None:
    picture = data_url(PICTURES[3], "webp")
    answer = embeddings(client, input=[TEXTS[0], {"image": picture}, TEXTS[1], {"image": data_url(PICTURES[5])}])
    texts, pictures = encoder.encode_texts(TEXTS), encoder.encode_images(PICTURES)
    np.testing.assert_allclose(vectors(answer), [texts[0], pictures[3], texts[1], pictures[5]], **TOLERANCE)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    np.testing.assert_allclose(vectors(embeddings(client, input={"image": picture})), pictures[3:4], **TOLERANCE)


def test_usage_counts_the_tokens_of_the_texts(client: httpx.Client) -> None:
    # Each character is a token, and [CLS] and [SEP] stand around; a text of 200 is cut to the model's 52.
    assert embeddings(client, input=["一只猫", "猫"])["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert embeddings(client, input="猫" * 200)["usage"]["prompt_tokens"] == 52
    assert embeddings(client, input={"image": data_url(png(9, 9))})["usage"]["prompt_tokens"] == 0


def test_base64_holds_the_very_numbers_of_float(client: httpx.Client) -> None:
    plain, packed = (embeddings(client, input=TEXTS[:1], encoding_format=form) for form in ("float", "base64"))
    assert embeddings(client, input=TEXTS[:1], encoding_format=None)["data"] == plain["data"]
    unpacked = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(unpacked, vectors(plain)[0])
    assert np.linalg.norm(unpacked) == pytest.approx(1, abs=1e-6)


def test_the_openai_client_gets_the_vectors(address: str, encoder: Encoder) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        for form in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(model="tiny", input=TEXTS, **form)
            np.testing.assert_allclose([one.embedding for one in answer.data], encoder.encode_texts(TEXTS), **TOLERANCE)
        with pytest.raises(openai.NotFoundError, match="only 'tiny'") as caught:
            client.embeddings.create(model="other", input="猫")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_dimensions_may_only_be_those_of_the_model(client: httpx.Client, encoder: Encoder) -> None:
    assert vectors(embeddings(client, input="猫", dimensions=encoder.embed_dim)).shape == (1, encoder.embed_dim)
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "猫", "dimensions": 7})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"


# --- models of other families


@pytest.mark.long
def test_texts_and_labels_reach_another_family_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    # Its tokenizer keeps upper and lower case apart, unlike that of Chinese-CLIP.
    family = Encoder(f"hf:{write_family(tmp_path / 'family', 'metaclip_2')}", device="cpu")
    labels, templates = ["Cat", "Dog", "“Sun”"], ["A Photo of {}", "{}"]
    texts = np.array([template.format(label) for label in labels for template in templates])
    rows = np.concatenate([family.encode_texts([text]) for text in texts])
    classes = rows.reshape(3, 2, -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    stored = scoring.classifier(family, labels, load_templates(DEFAULT))
    image = family.encode_images(PICTURES[:1])
    with served(family, LIMITS, label_sets={"three": labels}) as address, httpx.Client(base_url=address) as client:
        found = vectors(embeddings(client, input=texts.tolist()))
        request = {"image": data_url(PICTURES[0], "webp")}
        given = client.post("/v1/classify", json={**request, "labels": labels, "templates": templates}).json()
        kept = client.post("/v1/classify", json={**request, "label_set": "three"}).json()
    np.testing.assert_allclose(found, rows, **TOLERANCE)
    for answer, expected in ((given, classes), (kept, stored)):
        cosines = [one["cosine"] for one in sorted(answer["data"], key=lambda one: one["index"])]
        np.testing.assert_allclose(cosines, (image @ expected.T)[0], **TOLERANCE)


# --- /v1/classify


def test_probabilities_are_the_softmax_over_the_labels(client: httpx.Client, encoder: Encoder) -> None:
    request = {"image": data_url(PICTURES[0], "webp"), "labels": LABELS, "templates": ["一张{}的图片", "{}"]}
    answer = client.post("/v1/classify", json=request).json()
    classes = scoring.classifier(encoder, LABELS, ["一张{}的图片", "{}"])
    (cosines,) = encoder.encode_images(PICTURES[:1]) @ classes.T
    scale = encoder.facts.logit_scale
    expected = np.exp(scale * cosines.astype(np.float64))
    expected /= expected.sum()
    assert answer["scale"] == pytest.approx(scale)
    found = sorted(answer["data"], key=lambda one: one["index"])
    assert [one["label"] for one in found] == LABELS
    np.testing.assert_allclose([one["cosine"] for one in found], cosines, **TOLERANCE)
    np.testing.assert_allclose([one["probability"] for one in found], expected, rtol=1e-3)
    shares = [one["probability"] for one in answer["data"]]
    assert shares == sorted(shares, reverse=True)


def test_a_stored_set_of_labels_gives_what_the_labels_give(client: httpx.Client) -> None:
    image = data_url(PICTURES[0], "webp")
    stored, given = (
        client.post("/v1/classify", json={"image": image, **labels}).json()
        for labels in ({"label_set": "three"}, {"labels": LABELS})
    )
    assert [one["label"] for one in stored["data"]] == [one["label"] for one in given["data"]]
    shares = [[one["probability"] for one in answer["data"]] for answer in (stored, given)]
    np.testing.assert_allclose(*shares, rtol=1e-4)
    assert len(stored["data"]) == 3


# --- /v1/search


def search(client: httpx.Client, query: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post("/v1/search", json={"query": query, **fields})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def test_search_by_picture_text_and_id_finds_the_nearest(
    client: httpx.Client, encoder: Encoder, picture_rows: np.ndarray
) -> None:
    by_picture = search(client, {"image": data_url(PICTURES[7], "webp")}, k=3)
    assert by_picture[0]["id"] == 7
    assert by_picture[0]["score"] == pytest.approx(1, abs=1e-5)
    assert by_picture[0]["metadata"] == {"even": False, "number": 7}
    assert search(client, base64.b64encode(PICTURES[7]).decode(), k=1)[0]["id"] == 7
    assert [hit["id"] for hit in search(client, {"id": 7}, k=3)] == [hit["id"] for hit in by_picture]
    scores = picture_rows @ encoder.encode_texts([TEXTS[1]])[0]
    by_text = search(client, TEXTS[1], k=5)
    np.testing.assert_allclose([hit["score"] for hit in by_text], np.sort(scores)[::-1][:5], **TOLERANCE)


def test_a_mixed_query_is_the_weighted_sum(client: httpx.Client, encoder: Encoder, picture_rows: np.ndarray) -> None:
    parts = [{"text": "黑色", "weight": 2}, {"image": data_url(PICTURES[4], "webp"), "weight": -0.5}, {"id": 9}]
    query = 2 * encoder.encode_texts(["黑色"])[0] - 0.5 * picture_rows[4] + picture_rows[9]
    scores = picture_rows @ (query / np.linalg.norm(query))
    hits = search(client, parts, k=4)
    np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(scores)[::-1][:4], **TOLERANCE)


def test_search_keeps_to_the_condition_the_least_score_and_k(client: httpx.Client) -> None:
    hits = search(client, {"id": 8}, k=1000, where="even=true number>=4")
    assert sorted(hit["id"] for hit in hits) == list(range(4, 40, 2))
    assert [hit["id"] for hit in search(client, {"id": 8}, k=1000, min_score=0.9999)] == [8]


def test_a_hit_leads_to_its_thumbnail(client: httpx.Client) -> None:
    (hit,) = search(client, {"id": "a/b 一"}, k=1)
    assert hit["thumbnail"] == "/v1/index/thumbnails/a%2Fb%20%E4%B8%80"
    answer = client.get(hit["thumbnail"])
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert answer.content == b"\xff\xd8thumbnail"
    assert client.get("/v1/index/thumbnails/7").content == answer.content
    assert client.get("/v1/index/thumbnails/1000").status_code == 404


def test_a_hit_without_a_thumbnail_says_null(client: httpx.Client) -> None:
    (hit,) = search(client, {"id": BARE}, k=1)
    assert hit["thumbnail"] is None
    assert client.get(f"/v1/index/thumbnails/{BARE}").status_code == 404


# --- what is refused

BOMB = png(20000, 20000, "1")
JPEG = io.BytesIO()
Image.effect_noise((200, 200), 50).save(JPEG, "JPEG")
TRUNCATED = JPEG.getvalue()[:1000]
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


def embed(given: Any, **fields: Any) -> tuple[str, Any]:
    return "/v1/embeddings", {"model": "tiny", "input": given, **fields}


def embed_picture(picture: bytes) -> tuple[str, Any]:
    return embed([{"image": data_url(picture)}])


def find(**fields: Any) -> tuple[str, Any]:
    return "/v1/search", {"query": "猫", **fields}


def label(**fields: Any) -> tuple[str, Any]:
    return "/v1/classify", {"image": data_url(png(9, 9)), **fields}


REFUSED: dict[str, tuple[tuple[str, Any], int, str, str | None]] = {
    "an address": (embed([{"image": "http://example.com/a.png"}]), 400, "no URL or path is read", "input[0].image"),
    "a path": (embed({"image": "/etc/passwd"}), 400, "no URL or path is read", "input.image"),
    "a file address": (embed({"image": "file:///etc/passwd"}), 400, "no URL or path", "input.image"),
    "no base64": (embed({"image": "data:image/png,abc"}), 400, "not in base64", "input.image"),
    "faulty base64": (embed({"image": "data:image/png;base64,a$b="}), 400, "not valid base64", "input.image"),
    "a bomb": (embed_picture(BOMB), 400, "at most 1000000 pixels", "input[0].image"),
    "too many pixels": (embed_picture(png(1001, 1000, "1")), 400, "this one has 1001 x 1000", "input[0].image"),
    "many pixels together": (
        embed([{"image": data_url(png(1000, 1000, "1"))}] * 3),
        400,
        "at most 2000000 pixels a request are read, and with this picture there are 3000000",
        "input[2].image",
    ),
    "half a JPEG": (embed_picture(TRUNCATED), 400, "does not decode", "input[0].image"),
    "SVG": (embed_picture(SVG), 400, "no known format; expected JPEG", "input[0].image"),
    "an empty picture": (embed_picture(b""), 400, "0 bytes of no known format", "input[0].image"),
    "half a surrogate": (embed([{"image": "\ud800"}]), 400, "input[0].image", "input[0].image"),
    "a long text": (embed("猫" * (MAX_TEXT_CHARS + 1)), 400, f"at most {MAX_TEXT_CHARS} characters", "input"),
    "a text of 900 KB": (embed("x" * 900_000), 400, f"at most {MAX_TEXT_CHARS} characters", "input"),
    "a body of 2 MB": (embed("x" * 2_000_000), 413, "larger than 1048576 bytes", None),
    "an empty text": (embed(["猫", ""]), 400, "at least 1 character", "input[1]"),
    "no inputs": (embed([]), 400, "at least 1 item", "input"),
    "many inputs": (embed(["猫"] * 65), 400, "at most 64 items, got 65", "input"),
    "thousands of inputs": (embed(["猫"] * 3000), 400, "at most 2048 items", "input"),
    "a body of brackets": (embed([[]] * 60_000), 413, f"more than {MAX_JSON_MARKS} commas", None),
    "token ids": (embed([1, 2, 3]), 400, "check_embedding_ctx_length=False", "input"),
    "a number": (embed(3), 400, "expected a string", "input"),
    "null": (embed(None), 400, "expected a string", "input"),
    "an unknown field": (find(truncate=True), 400, "Extra inputs are not permitted", "truncate"),
    "an unknown field of half a surrogate": (embed("猫", **{"\ud800": 1}), 400, "unicode string", None),
    "an unknown format": (embed("猫", encoding_format="hex"), 400, "'float' or 'base64'", "encoding_format"),
    "another model": (("/v1/embeddings", {"model": "x", "input": "猫"}), 404, "only 'tiny'", "model"),
    "a long model": (("/v1/embeddings", {"model": "x" * 600, "input": "猫"}), 400, "at most 512 characters", "model"),
    "a long user": (embed("猫", user="x" * 600), 400, "at most 512 characters", "user"),
    "a long set": (label(label_set="x" * 600), 400, "at most 512 characters", "label_set"),
    "a long id": (find(query={"id": "x" * 4096}), 404, "no item 'xxx", "id"),
    "much text": (
        label(labels=["x" * 4000] * 100, templates=["{}", "{}。", "{}！"]),
        400,
        "300 texts of 1200800 characters; expected at most 4096 texts of 1000000 characters",
        "templates",
    ),
    "no model": (("/v1/embeddings", {"input": "猫"}), 400, "required", "model"),
    "a list": (("/v1/embeddings", []), 400, "expected a JSON object", None),
    "k of a milliard": (find(k=10**9), 400, "less than or equal to 1000", "k"),
    "k of 0": (find(k=0), 400, "greater than or equal to 1", "k"),
    "k as text": (find(k="10"), 400, "valid integer", "k"),
    "k as truth": (find(k=True), 400, "valid integer", "k"),
    "NaN": (find(min_score=float("nan")), 400, "finite number", "min_score"),
    "an infinite weight": (find(query=[{"text": "猫", "weight": float("inf")}]), 400, "finite", "query[0].weight"),
    "a faulty condition": (find(where="a=="), 400, "where: character 3: expected a value after =", "where"),
    "an unknown id": (find(query={"id": "x"}), 404, "no item 'x'", "id"),
    "an id of 30 digits": (find(query={"id": 10**30}), 404, "no item", "id"),
    "two in one": (find(query={"id": 1, "text": "猫"}), 400, "one of text, image and id", "query"),
    "none in one": (find(query=[{"text": "猫"}, {}]), 400, "one of text, image and id", "query[1]"),
    "parts that cancel": (find(query=[{"id": 1}, {"id": 1, "weight": -1}]), 400, "cancel each other out", "query"),
    "many parts": (find(query=[{"text": "猫"}] * 17), 400, "at most 16 items", "query"),
    "labels twice": (label(labels=["猫"], label_set="three"), 400, "either labels or label_set", "labels"),
    "no labels": (label(), 400, "either labels or label_set", "labels"),
    "an unknown set": (label(label_set="x"), 404, "known are ['three']", "label_set"),
    "a template without a place": (label(labels=["猫"], templates=["猫"]), 400, "pattern", "templates[0]"),
    "many prompts": (label(labels=["猫"] * 1000), 400, "expected at most 4096 texts", "templates"),
    "many labels": (label(labels=["猫"] * 1001), 400, "at most 1000 items", "labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_reason(client: httpx.Client, case: str) -> None:
    (path, body), status, message, param = REFUSED[case]
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error"), answer.text
    assert message in error["message"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfd", "error parsing the body"),
        (b"[" * 40_000, "error parsing the body"),
        (b'{"model": "tiny", "input": "x", "dimensions": 1' + b"0" * 5000 + b"}", "error parsing the body"),
        (b"", "expected a JSON object"),
    ],
    ids=["half", "no UTF-8", "deep", "a long number", "empty"],
)
def test_what_is_no_json_is_refused(client: httpx.Client, body: bytes, message: str) -> None:
    answer = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "invalid_json"


def test_probes_answer_to_head(client: httpx.Client) -> None:
    assert [client.head(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


def test_a_body_that_grows_past_the_bound_is_refused_before_its_end(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b" " * 65536

    answer = client.post("/v1/embeddings", content=endless())
    assert answer.status_code == 413
    assert "larger than 1048576 bytes" in answer.json()["error"]["message"]


def test_a_content_length_below_the_truth_ends_the_body_there(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    body = b'{"model": "tiny", "input": "x"}'
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + b"\r\n" + body + b"more than was announced\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in answer


def test_errors_of_routing_have_the_same_form(client: httpx.Client) -> None:
    missing, wrong = client.get("/v1/nothing"), client.get("/v1/embeddings")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "Not Found")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_the_description_names_no_422_and_no_page_loads_scripts_from_elsewhere(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert not any("422" in operation["responses"] for operation in operations)
    assert "ValidationError" not in json.dumps(document)
    assert client.get("/docs").status_code == 404


def test_metrics_count_requests_by_route_and_status(client: httpx.Client) -> None:
    client.get("/made-up/1")
    lines = client.get("/metrics").text.splitlines()
    routes = {line.split('route="')[1].split('"')[0] for line in lines if line.startswith("cn_clip_requests_total")}
    assert {"/v1/embeddings", "/v1/index/thumbnails/{item_id:path}", "other"} <= routes
    assert not any("made-up" in line for line in lines)
    assert any(line.startswith('cn_clip_batch_size_count{inputs="pictures"}') for line in lines)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_examples_of_the_page_run(address: str) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    for language, code in blocks:
        code = code.replace("http://127.0.0.1:8000", address).replace("ViT-B-16", "tiny")
        start = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [warm_python.program(), "-c"]
        done = subprocess.run([*start, code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        if language == "python":
            assert len(json.loads(done.stdout)) == 4
        else:
            assert json.loads(done.stdout)["model"] == "tiny"


# --- other servers


def test_without_an_index_search_says_how_to_give_one(encoder: Encoder) -> None:
    with served(encoder) as address:
        for answer in (
            httpx.post(f"{address}/v1/search", json={"query": "猫"}),
            httpx.get(f"{address}/v1/index/thumbnails/1"),
        ):
            assert answer.status_code == 404
            assert "cn-clip serve INDEX" in answer.json()["error"]["message"]


def test_with_a_key_all_but_the_probes_need_it(encoder: Encoder) -> None:
    with served(encoder, api_key="钥匙-key") as address, httpx.Client(base_url=address) as client:
        statuses = {}
        for name, header in {
            "none": None,
            "wrong": "Bearer key",
            "longer": "Bearer 钥匙-key2",
            "bare": "钥匙-key",
            "right": "bearer 钥匙-key",
        }.items():
            headers = {"Authorization": header.encode()} if header else {}
            statuses[name] = [client.get(path, headers=headers).status_code for path in ("/v1/models", "/metrics")]
        assert statuses.pop("right") == [200, 200]
        assert set(map(tuple, statuses.values())) == {(401, 401)}
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        refused = client.get("/openapi.json")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
