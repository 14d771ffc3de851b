"""Requests as the clients of other services write them: each is answered with the vectors of `Encoder`."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import data_url, served

from cn_clip.clip.encoder import Encoder
from cn_clip.emoji_pack import load
from cn_clip.errors import DataError
from cn_clip.serve import forms
from cn_clip.serve.limits import Limits
from cn_clip.serve.token_table import TokenTable, read_token_table

# Rows of a batch are rounded a little differently from those of another size.
TOLERANCE = {"rtol": 0, "atol": 2e-6}
PICTURE, OTHER = (one.picture for one in load()[:2])
URL, BARE = data_url(PICTURE, "webp"), base64.b64encode(PICTURE).decode()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def rows(encoder: Encoder) -> dict[str, np.ndarray]:
    texts, pictures = encoder.encode_texts(["一只猫", "狗"]), encoder.encode_images([PICTURE, OTHER])
    return {"猫": texts[0], "狗": texts[1], "picture": pictures[0], "other": pictures[1]}


@pytest.fixture(scope="module")
def client(encoder: Encoder) -> Iterator[httpx.Client]:
    limits = Limits(max_wait_ms=1)
    with served(encoder, limits) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def asked(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def embedded(client: httpx.Client, **fields: Any) -> np.ndarray:
    answer = asked(client, "/v1/embeddings", model="tiny", **fields)
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return np.array([one["embedding"] for one in answer["data"]])


def mixed(*rows: np.ndarray) -> np.ndarray:
    return sum(rows) / np.linalg.norm(sum(rows))


# --- /v1/embeddings

INPUTS: dict[str, tuple[Any, str]] = {
    "a string": ("一只猫", "猫"),
    "a text in an object": ({"text": "一只猫"}, "猫"),
    "a text part": ({"type": "text", "text": "一只猫"}, "猫"),
    "a text part of /responses": ({"type": "input_text", "text": "一只猫"}, "猫"),
    "a data URL": (URL, "picture"),
    "base64 alone": (BARE, "picture"),
    "an object with base64 alone": ({"image": BARE}, "picture"),
    "an object with a data URL": ({"image": URL}, "picture"),
    "a picture part": ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "picture"),
    "a picture part of /responses": ({"type": "input_image", "image_url": URL}, "picture"),
    "a picture part of Voyage": ({"content": [{"type": "image_base64", "image_base64": URL}]}, "picture"),
    "a list of one part": ({"content": [{"type": "text", "text": "一只猫"}]}, "猫"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_each_form_of_an_input_is_its_text_or_picture(
    client: httpx.Client, rows: dict[str, np.ndarray], case: str
) -> None:
    given, name = INPUTS[case]
    np.testing.assert_allclose(embedded(client, input=given), [rows[name]], **TOLERANCE)
    np.testing.assert_allclose(embedded(client, input=["狗", given]), [rows["狗"], rows[name]], **TOLERANCE)


def test_several_parts_of_an_input_are_mixed_evenly(client: httpx.Client, rows: dict[str, np.ndarray]) -> None:
    inputs = [{"text": "一只猫", "image": URL}, "狗", {"content": [{"text": "狗"}, {"text": "一只猫"}]}]
    expected = [mixed(rows["猫"], rows["picture"]), rows["狗"], mixed(rows["狗"], rows["猫"])]
    np.testing.assert_allclose(embedded(client, input=inputs), expected, **TOLERANCE)


def test_the_messages_of_vllm_are_one_vector_of_what_the_user_shows(
    client: httpx.Client, rows: dict[str, np.ndarray]
) -> None:
    show = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": ""}]}
    system = {"role": "system", "content": "Represent the input."}
    np.testing.assert_allclose(embedded(client, messages=[system, show]), [rows["picture"]], **TOLERANCE)
    say = {"role": "user", "content": "狗"}
    np.testing.assert_allclose(
        embedded(client, messages=[show, say]), [mixed(rows["picture"], rows["狗"])], **TOLERANCE
    )


def test_with_the_modality_image_strings_are_pictures(client: httpx.Client, rows: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(
        embedded(client, input=[BARE, URL], modality="image"), [rows["picture"]] * 2, **TOLERANCE
    )
    refused = client.post("/v1/embeddings", json={"model": "tiny", "input": "一只猫", "modality": "image"})
    assert refused.status_code == 400
    assert "no URL or path is read" in refused.json()["error"]["message"]


def test_unknown_fields_are_passed_over_and_named(client: httpx.Client, rows: dict[str, np.ndarray]) -> None:
    fields = {"drop_params": True, "truncate": "END", "a\nb,猫": 1, "task": "retrieval.query", "normalized": False}
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "狗", "user": "me", **fields})
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], rows["狗"], **TOLERANCE)
    assert answer.headers[forms.IGNORED_HEADER] == "drop_params, truncate, a%0Ab%2C%E7%8C%AB, task, normalized"
    plain = client.post("/v1/embeddings", json={"model": "tiny", "input": "狗", "normalized": True, "dimensions": 0})
    assert forms.IGNORED_HEADER not in plain.headers
    many = client.post(
        "/v1/embeddings", json={"model": "tiny", "input": "狗", **{f"{n}" + "x" * 200: n for n in range(99)}}
    )
    assert len(many.headers[forms.IGNORED_HEADER]) == 32 * 82 - 2


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("float", [0.6, -0.8, 0.0]),
        ("base64", base64.b64encode(np.array([0.6, -0.8, 0.0], dtype="<f4").tobytes()).decode()),
        ("int8", [95, -127, 0]),
        ("uint8", [223, 1, 128]),
        ("ubinary", [0b10000000]),
        ("binary", [0]),
    ],
)
def test_the_forms_of_a_vector(form: Any, written: Any) -> None:
    (found,) = json.loads(forms.as_json(forms.written(np.array([[0.6, -0.8, 0.0]], dtype=np.float32), form)))
    assert found == pytest.approx(written) if form == "float" else found == written


def test_the_embedding_type_of_jina_is_the_form_of_the_answer(
    client: httpx.Client, rows: dict[str, np.ndarray]
) -> None:
    (bits,) = embedded(client, input="狗", embedding_type="ubinary")
    np.testing.assert_array_equal(np.unpackbits(bits.astype(np.uint8)), rows["狗"] > 0)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"input": {"image": "https://example.com/a.png"}}, "no URL or path is read", "input.image"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            "no URL or path is read",
            "input[0].image_url",
        ),
        ({"input": {"content": [{"image": "/etc/passwd"}]}}, "no URL or path", "input.content[0].image"),
        ({"input": {"type": "text"}}, "expected a text or a picture", "input"),
        ({"input": ["狗", {"text": ""}]}, "expected a text or a picture", "input[1]"),
        ({"input": "狗", "messages": [{"content": "狗"}]}, "one of input and messages", "input"),
        ({"messages": [{"role": "system", "content": "狗"}]}, "expected a text or a picture", "messages"),
        ({}, "expected a string", "input"),
        ({"input": [[1, 2], [3]]}, "token ids", "input[0]"),
        ({"input": "狗", "modality": "audio"}, "'text' or 'image'", "modality"),
        ({"input": {"image": BARE[:-8]}}, "does not decode", "input.image"),
    ],
)
def test_what_is_no_input_is_refused(client: httpx.Client, fields: Any, message: str, param: str) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


# --- token ids

# The ids of a table are its own: 猫 takes two of them, as some characters do in that of OpenAI.
TABLE = TokenTable({7: "一只".encode(), 8: "猫".encode()[:2], 9: "猫".encode()[2:], 0: "狗".encode()})


def test_with_a_table_token_ids_are_the_text_they_stand_for(encoder: Encoder, rows: dict[str, np.ndarray]) -> None:
    with served(encoder, token_table=TABLE) as address, httpx.Client(base_url=address) as client:
        np.testing.assert_allclose(embedded(client, input=[[7, 8, 9], [0]]), [rows["猫"], rows["狗"]], **TOLERANCE)
        np.testing.assert_allclose(embedded(client, input=[7, 8, 9]), [rows["猫"]], **TOLERANCE)
        np.testing.assert_allclose(embedded(client, input=["狗", [7, 8, 9]]), [rows["狗"], rows["猫"]], **TOLERANCE)
        for given, message, param in (
            ([[0], [100257]], "the token id 100257 is not in the table", "input[1]"),
            ([7] * 3000, "at most 4096 characters, got 6000", "input"),
            ([[0, True]], "valid integer", "input[0][1]"),
            ([0, -1], "greater than or equal to 0", "input[1]"),
        ):
            error = client.post("/v1/embeddings", json={"model": "tiny", "input": given}).json()["error"]
            assert message in error["message"]
            assert error["param"] == param


def test_a_table_is_read_as_tiktoken_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(b"IQ== 0\n5L2g 1\n")
    assert read_token_table(path).text([1, 0]) == "你!"
    assert read_token_table(path).text([]) == ""
    for content, message in ((b"IQ== 0\nno\n", ":2: expected a token in base64"), (b"", "an empty table")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_token_table(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_token_table(tmp_path)


# --- many inputs


def test_as_many_inputs_as_openai_takes_are_answered_and_one_more_is_not(
    client: httpx.Client, rows: dict[str, np.ndarray]
) -> None:
    found = embedded(client, input=["狗"] * 2000 + [{"image": BARE}] * 48)
    np.testing.assert_allclose(found[[0, 1999]], [rows["狗"]] * 2, **TOLERANCE)
    np.testing.assert_allclose(found[2000:], [rows["picture"]] * 48, **TOLERANCE)
    many = client.post("/v1/embeddings", json={"model": "tiny", "input": ["狗"] * 2049})
    assert "at most 2048 items" in many.json()["error"]["message"]
    parts = client.post("/v1/embeddings", json={"model": "tiny", "input": [{"content": [{"text": "狗"}] * 16}] * 129})
    assert "at most 2048 items, got 2064" in parts.json()["error"]["message"]


# --- infinity


def test_the_paths_of_infinity(client: httpx.Client, rows: dict[str, np.ndarray]) -> None:
    answer = asked(client, "/embeddings", input=[URL, "狗"], model="default/not-specified", dimensions=0)
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], [rows["picture"], rows["狗"]], **TOLERANCE)
    assert asked(client, "/embeddings", input="狗")["model"] == "tiny"
    assert client.post("/embeddings", json={"input": "狗", "model": "other"}).status_code == 404
    (model,) = client.get("/models").json()["data"]
    assert (model["id"], model["stats"]["queue_absolute"], model["stats"]["batch_size"]) == ("tiny", 0, 32)
    assert client.get("/health").json()["unix"] > 1.7e9


# --- Cohere


def test_cohere_gets_its_forms_of_texts_pictures_and_mixed_inputs(
    client: httpx.Client, rows: dict[str, np.ndarray]
) -> None:
    texts = asked(
        client,
        "/v2/embed",
        model="tiny",
        texts=["狗", "一只猫"],
        input_type="search_document",
        embedding_types=["float", "ubinary", "int8"],
    )
    assert (texts["texts"], texts["response_type"]) == (["狗", "一只猫"], "embeddings_by_type")
    assert texts["meta"]["billed_units"] == {"input_tokens": 8, "images": 0}
    expected = np.array([rows["狗"], rows["猫"]])
    np.testing.assert_allclose(texts["embeddings"]["float"], expected, **TOLERANCE)
    np.testing.assert_array_equal(texts["embeddings"]["ubinary"], np.packbits(expected > 0, axis=1))
    whole = np.array(texts["embeddings"]["int8"])
    assert np.abs(whole).max(axis=1).tolist() == [127, 127]
    cosines = (whole * expected).sum(axis=1) / np.linalg.norm(whole, axis=1)
    assert cosines.min() > 0.9999
    pictures = asked(client, "/v2/embed", model="tiny", images=[URL, BARE], input_type="image")
    np.testing.assert_allclose(pictures["embeddings"]["float"], [rows["picture"]] * 2, **TOLERANCE)
    content = [{"type": "text", "text": "狗"}, {"type": "image_url", "image_url": {"url": URL}}]
    both = asked(client, "/v2/embed", model="tiny", inputs=[{"content": content}])
    np.testing.assert_allclose(both["embeddings"]["float"], [mixed(rows["狗"], rows["picture"])], **TOLERANCE)
    bare = asked(client, "/v1/embed", model="tiny", texts=["狗"])
    assert bare["response_type"] == "embeddings_floats"
    np.testing.assert_allclose(bare["embeddings"], [rows["狗"]], **TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({}, "one of texts, images and inputs", "texts"),
        ({"texts": ["狗"], "images": [URL]}, "one of texts, images and inputs", "texts"),
        ({"images": ["http://example.com/a.png"]}, "no URL or path is read", "images[0]"),
        ({"texts": [URL]}, "expected words", "texts[0]"),
        ({"texts": ["狗"], "output_dimension": 7}, "cannot give 7", "dimensions"),
        ({"texts": ["狗"], "embedding_types": ["float16"]}, "'float'", "embedding_types[0]"),
    ],
)
def test_what_cohere_may_not_ask(client: httpx.Client, fields: Any, message: str, param: str) -> None:
    answer = client.post("/v2/embed", json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_a_truncation_that_is_not_done_is_named(client: httpx.Client) -> None:
    headers = [
        client.post("/v2/embed", json={"model": "tiny", "texts": ["狗"], "truncate": truncate, "max_tokens": 9}).headers
        for truncate in ("END", "NONE")
    ]
    assert [one[forms.IGNORED_HEADER] for one in headers] == ["max_tokens", "max_tokens, truncate"]


# --- rerank


def test_documents_come_by_their_cosine_with_a_text_or_a_picture(
    client: httpx.Client, rows: dict[str, np.ndarray]
) -> None:
    documents = ["狗", {"text": "一只猫"}, {"image": BARE}, data_url(OTHER, "webp")]
    matrix = np.array([rows["狗"], rows["猫"], rows["picture"], rows["other"]])
    for query, name in (("一只猫", "猫"), ({"image": URL}, "picture")):
        scores = matrix @ rows[name]
        answer = asked(client, "/v1/rerank", model="tiny", query=query, documents=documents, return_documents=True)
        order = [one["index"] for one in answer["results"]]
        assert order == np.argsort(-scores).tolist()
        np.testing.assert_allclose([one["relevance_score"] for one in answer["results"]], scores[order], **TOLERANCE)
        texts = {one["index"]: one.get("document") for one in answer["results"]}
        assert texts == {0: {"text": "狗"}, 1: {"text": "一只猫"}, 2: None, 3: None}
    best = asked(client, "/v2/rerank", model="tiny", query="一只猫", documents=["狗", "一只猫"], top_n=1)
    assert [set(one) for one in best["results"]] == [{"index", "relevance_score"}]
    assert best["results"][0]["index"] == 1
    plain = asked(
        client, "/rerank", query="一只猫", documents=["狗", "一只猫"], return_documents=True, raw_scores=False
    )
    assert [one["document"] for one in plain["results"]] == ["一只猫", "狗"]
    assert plain["usage"] == {"prompt_tokens": 13, "total_tokens": 13}


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"query": "猫", "documents": []}, "at least 1 item", "documents"),
        ({"query": "猫", "documents": ["猫"] * 2048}, "at most 2048 items, got 2049", "documents"),
        ({"query": {"image": "/etc/passwd"}, "documents": ["猫"]}, "no URL or path", "query.image"),
        ({"query": "猫", "documents": ["猫"], "top_n": 0}, "greater than or equal to 1", "top_n"),
    ],
)
def test_what_cannot_be_ranked(client: httpx.Client, fields: Any, message: str, param: str) -> None:
    answer = client.post("/v1/rerank", json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_fields_without_a_name_are_told_too(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "猫", "猫": 1, "": 2})
    assert answer.headers["x-ignored-fields"] == '%E7%8C%AB, ""'
