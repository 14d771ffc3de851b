"""The published clients of other services, as they are, against a server here: each form they send, and what they get.

`make test-clients` installs them, runs all and prints a table; the rows of `openai` run with the other tests.
"""

import asyncio
import gc
import io
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from documents import ROOT, Block, blocks
from PIL import Image
from serving import data_url, served

from cn_clip.clip.encoder import Encoder
from cn_clip.emoji_pack import load
from cn_clip.serve.token_table import TokenTable, read_token_table

PICTURE = load()[0].picture
URL = data_url(PICTURE, "webp")
TEXTS = ["一只猫", "狗"]
# What a row expects: the vectors of texts, of the picture, or the order of `TEXTS` by the query 狗.
MANY = ["狗"] * 2048
Found = Sequence[Sequence[float]]


def _vectors(answer: Any) -> Found:
    return [one.embedding for one in answer.data]


# --- openai


def _openai(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any")


def openai_texts(address: str) -> Found:
    return _vectors(_openai(address).embeddings.create(model="tiny", input=TEXTS))


def openai_floats(address: str) -> Found:
    return _vectors(_openai(address).embeddings.create(model="tiny", input=TEXTS, encoding_format="float"))


def openai_unknown_field(address: str) -> Found:
    answer = _openai(address).embeddings.with_raw_response.create(
        model="tiny", input=TEXTS, user="me", extra_body={"drop_params": True}
    )
    assert answer.headers["x-ignored-fields"] == "drop_params"
    return _vectors(answer.parse())


def openai_picture(address: str) -> Found:
    return _vectors(_openai(address).embeddings.create(model="tiny", input=URL))


def openai_part(address: str) -> Found:
    part: Any = {"type": "image_url", "image_url": {"url": URL}}
    return _vectors(_openai(address).embeddings.create(model="tiny", input=[part]))


def openai_messages(address: str) -> Found:
    """As vLLM's documents ask: an embedding of a chat, by the bare client."""
    part = {"type": "image_url", "image_url": {"url": URL}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}], "encoding_format": "float"}
    answer = _openai(address).post("/embeddings", body=body, cast_to=openai.types.CreateEmbeddingResponse)
    return _vectors(answer)


def openai_many(address: str) -> Found:
    return _vectors(_openai(address).embeddings.create(model="tiny", input=MANY))


def openai_async(address: str) -> Found:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
            return await client.embeddings.create(model="tiny", input=TEXTS)

    return _vectors(asyncio.run(ask()))


# --- langchain-openai


def _langchain(address: str, **fields: Any) -> Any:
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(model="tiny", base_url=f"{address}/v1", api_key="any", **fields)


def langchain_defaults(address: str) -> Found:
    embeddings = _langchain(address)
    return [*embeddings.embed_documents(TEXTS[:1]), embeddings.embed_query(TEXTS[1])]


def langchain_words(address: str) -> Found:
    return list(_langchain(address, check_embedding_ctx_length=False).embed_documents(TEXTS))


# --- infinity


def _infinity(address: str) -> Any:
    import infinity_client

    return infinity_client.Client(base_url=address)


def infinity_texts(address: str) -> Found:
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputText

    body = OpenAIEmbeddingInputText.from_dict({"input": TEXTS, "modality": "text"})
    return _vectors(embeddings.sync(client=_infinity(address), body=body))


def infinity_picture(address: str) -> Found:
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputImage

    body = OpenAIEmbeddingInputImage.from_dict({"input": [URL], "modality": "image"})
    return _vectors(embeddings.sync(client=_infinity(address), body=body))


def infinity_vision(address: str) -> Found:
    from infinity_client.vision_client import InfinityVisionAPI

    client = InfinityVisionAPI(address, model="tiny")
    assert client.health()
    picture = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    (rows, _usage) = client.image_embed(model="tiny", images=[picture]).result()
    return [np.ravel(row).tolist() for row in rows]


def infinity_rerank(address: str) -> Sequence[int]:
    from infinity_client.api.default import health, models, rerank
    from infinity_client.models import RerankInput

    client = _infinity(address)
    assert health.sync(client=client)["unix"] > 0
    assert [one.id for one in models.sync(client=client).data] == ["tiny"]
    answer = rerank.sync(client=client, body=RerankInput(query="狗", documents=TEXTS, return_documents=True))
    assert [one.document for one in answer.results] == TEXTS[::-1]
    return [one.index for one in answer.results]


# --- cohere


def _cohere(address: str) -> Any:
    import cohere

    return cohere.ClientV2(api_key="any", base_url=address)


def cohere_texts(address: str) -> Found:
    answer = _cohere(address).embed(
        model="tiny", texts=TEXTS, input_type="search_document", embedding_types=["float", "int8", "ubinary"]
    )
    assert len(answer.embeddings.ubinary) == len(answer.embeddings.int8) == 2
    return list(answer.embeddings.float_)


def cohere_picture(address: str) -> Found:
    answer = _cohere(address).embed(model="tiny", images=[URL], input_type="image", embedding_types=["float"])
    return list(answer.embeddings.float_)


def cohere_inputs(address: str) -> Found:
    part = {"type": "image_url", "image_url": {"url": URL}}
    answer = _cohere(address).embed(
        model="tiny", inputs=[{"content": [part]}], input_type="search_document", embedding_types=["float"]
    )
    return list(answer.embeddings.float_)


def cohere_old(address: str) -> Found:
    import cohere

    return list(cohere.Client(api_key="any", base_url=address).embed(model="tiny", texts=TEXTS).embeddings)


def cohere_rerank(address: str) -> Sequence[int]:
    answer = _cohere(address).rerank(model="tiny", query="狗", documents=TEXTS, top_n=2)
    return [one.index for one in answer.results]


def cohere_old_rerank(address: str) -> Sequence[int]:
    import cohere

    client = cohere.Client(api_key="any", base_url=address)
    answer = client.rerank(model="tiny", query="狗", documents=TEXTS, return_documents=True)
    assert answer.results[0].document.text == "狗"
    return [one.index for one in answer.results]


# --- llama-index


def llama_openai(address: str) -> Found:
    from llama_index.embeddings.openai import OpenAIEmbedding

    model = OpenAIEmbedding(model_name="tiny", api_base=f"{address}/v1", api_key="any")
    return [model.get_text_embedding(TEXTS[0]), model.get_query_embedding(TEXTS[1])]


def llama_like(address: str) -> Found:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    model = OpenAILikeEmbedding(model_name="tiny", api_base=f"{address}/v1", api_key="any")
    return list(model.get_text_embedding_batch(TEXTS))


ROWS: list[tuple[str, str, Callable[[str], Any], object]] = [
    ("openai", "a list of texts (base64)", openai_texts, TEXTS),
    ("openai", "float", openai_floats, TEXTS),
    ("openai", "drop_params, user", openai_unknown_field, TEXTS),
    ("openai", "a picture as a data URL", openai_picture, PICTURE),
    ("openai", "a content part", openai_part, PICTURE),
    ("openai", "messages of vLLM", openai_messages, PICTURE),
    ("openai", "2,048 texts", openai_many, MANY),
    ("openai", "AsyncOpenAI", openai_async, TEXTS),
    ("langchain-openai", "defaults: token ids", langchain_defaults, TEXTS),
    ("langchain-openai", "check_embedding_ctx_length=False", langchain_words, TEXTS),
    ("infinity_client", "/embeddings, texts", infinity_texts, TEXTS),
    ("infinity_client", "/embeddings, modality image", infinity_picture, PICTURE),
    ("infinity_client", "InfinityVisionAPI", infinity_vision, None),
    ("infinity_client", "/rerank, /models, /health", infinity_rerank, [1, 0]),
    ("cohere", "v2 embed, texts", cohere_texts, TEXTS),
    ("cohere", "v2 embed, images", cohere_picture, PICTURE),
    ("cohere", "v2 embed, inputs", cohere_inputs, PICTURE),
    ("cohere", "v1 embed", cohere_old, TEXTS),
    ("cohere", "v2 rerank", cohere_rerank, [1, 0]),
    ("cohere", "v1 rerank", cohere_old_rerank, [1, 0]),
    ("llama-index-embeddings-openai", "OpenAIEmbedding", llama_openai, TEXTS),
    ("llama-index-embeddings-openai-like", "OpenAILikeEmbedding", llama_like, TEXTS),
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def table() -> TokenTable | None:
    """That of OpenAI's embedding models, which llama-index brings; LangChain is told of it, and downloads none."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import llama_index.core as core
        except ImportError:
            return None
        folder = Path(core.__file__).parent / "_static" / "tiktoken_cache"
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        import tiktoken

        tiktoken.get_encoding("cl100k_base")
        return read_token_table(folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")


@pytest.fixture(scope="module")
def address(encoder: Encoder, table: TokenTable | None) -> Iterator[str]:
    with served(encoder, token_table=table) as address:
        yield address


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, str, str, str]]]:
    """The rows that were run; printed at the end."""
    rows: list[tuple[str, str, str, str]] = [("client", "version", "form", "status")]
    yield rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print()
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _marks(client: str) -> list[pytest.MarkDecorator]:
    return [] if client == "openai" else [pytest.mark.clients]


SNIPPETS = [block for block in blocks(ROOT / "docs" / "clients.md") if block.language == "python"]


@pytest.mark.clients
@pytest.mark.parametrize("snippet", SNIPPETS, ids=[one.headline.removeprefix("# 需要 ") for one in SNIPPETS])
@pytest.mark.filterwarnings("ignore")
def test_the_snippets_of_the_page_print_their_numbers(
    address: str, snippet: Block, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(snippet.code.replace("http://127.0.0.1:8000", address).replace("ViT-B-16", "tiny"), {})
    assert any(one.isdigit() for one in capsys.readouterr().out)
    gc.collect()  # connections that clients leave open, while warnings of them are let pass


@pytest.mark.parametrize(
    ("client", "form", "ask", "expected"),
    [
        pytest.param(*row, marks=[] if row[0] == "openai" else pytest.mark.clients, id=f"{row[0]}: {row[1]}")
        for row in ROWS
    ],
)
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
def test_a_published_client_gets_its_answer(
    address: str,
    encoder: Encoder,
    outcomes: list[tuple[str, str, str, str]],
    client: str,
    form: str,
    ask: Callable[[str], Any],
    expected: object,
) -> None:
    outcomes.append((client, version(client), form, "failed"))
    found = ask(address)
    if expected is None:  # the client made a JPEG of the picture
        assert np.dot(found[0], encoder.encode_images([PICTURE])[0]) > 0.95
    elif isinstance(expected, bytes):
        np.testing.assert_allclose(found, encoder.encode_images([expected]), rtol=0, atol=2e-6)
    elif expected in (TEXTS, MANY):
        rows = dict(zip(TEXTS, encoder.encode_texts(TEXTS), strict=True))
        np.testing.assert_allclose(found, [rows[text] for text in expected], rtol=0, atol=2e-6)  # type: ignore[attr-defined]
    else:
        assert found == expected
    gc.collect()
    outcomes[-1] = (client, version(client), form, "ok")
