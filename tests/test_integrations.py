"""The examples of docs/encoder.md, and `Encoder` as components of LangChain, LlamaIndex and Haystack.

`make test-clients` installs these libraries.
"""

import asyncio
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import ROOT, Block, blocks, is_run
from PIL import Image

from cn_clip import zoo
from cn_clip.clip import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.errors import DataError, MissingExtraError

LIBRARIES = ("pandas", "polars", "datasets", "langchain_core", "llama_index", "haystack")
COMPONENTS = {
    "langchain": "langchain_core.embeddings",
    "llama_index": "llama_index.core.embeddings.multi_modal_base",
    "haystack": "haystack",
}
TEXTS = ["一只猫", "下雨天"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pictures that the page names, and a tiny model, which takes the place of ViT-B-16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"))
    Encoder(model, device="cpu").save(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(("a.jpg", "b.jpg", "pictures/c.jpg")):
        colours = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page: list[Block], workplace: Path, *, libraries: tuple[str, ...]) -> list[str]:
    """Runs the blocks in order, in one namespace, those of other libraries only if they are asked for; what ran."""
    namespace: dict[str, Any] = {}
    ran = []
    for block in page:
        needed = {name for name in LIBRARIES if re.search(rf"^(import|from) {name}\b", block.code, re.MULTILINE)}
        if block.language == "python" and is_run(block) and needed <= set(libraries):
            code = block.code.replace('"ViT-B-16"', repr(str(workplace / "model")))
            exec(compile(code, block.where, "exec"), namespace)
            ran += sorted(needed) or [block.where]
    return ran


def test_the_blocks_of_the_page_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_page(blocks(ROOT / "docs" / "encoder.md"), workplace, libraries=())
    assert len(ran) >= 7
    assert (workplace / "my-model.safetensors").is_file()
    assert "backend='torch', precision='fp32'" in capsys.readouterr().out


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_the_page_run_with_other_libraries(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(workplace / "hf"))
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    ran = run_page(blocks(ROOT / "docs" / "encoder.md"), workplace, libraries=LIBRARIES)
    assert set(LIBRARIES) <= set(ran)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_library_that_is_missing_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, COMPONENTS[name], None)
    for loaded in list(sys.modules):
        if loaded == f"cn_clip.integrations.{name}":
            monkeypatch.delitem(sys.modules, loaded)
    extra = name.replace("_", "-")
    with pytest.raises(MissingExtraError, match=re.escape(f"cn_clip.integrations.{name} needs the package")) as caught:
        importlib.import_module(f"cn_clip.integrations.{name}")
    assert f"pip install 'cn-clip-next[{extra}]'" in str(caught.value)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
def test_langchain_gets_the_rows_as_lists(workplace: Path) -> None:
    from cn_clip.integrations.langchain import CnClipEmbeddings

    embeddings = CnClipEmbeddings(str(workplace / "model"), device="cpu")
    expected = embeddings.encoder.encode_texts(TEXTS)
    np.testing.assert_array_equal(np.float32(embeddings.embed_documents(TEXTS)), expected)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[0]), expected[0], atol=1e-6)
    np.testing.assert_allclose(asyncio.run(embeddings.aembed_query(TEXTS[0])), expected[0], atol=1e-6)
    assert embeddings.embed_documents([]) == []
    assert np.shape(embeddings.embed_image([workplace / "a.jpg"])) == (1, 64)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
def test_llama_index_gets_the_rows_in_every_way_it_asks(workplace: Path) -> None:
    from cn_clip.integrations.llama_index import CnClipEmbedding

    embedding = CnClipEmbedding(str(workplace / "model"), device="cpu", embed_batch_size=2)
    encoder = Encoder(str(workplace / "model"), device="cpu")
    expected, pictures = encoder.encode_texts(TEXTS), encoder.encode_images(["a.jpg", "b.jpg"])
    close = {"atol": 1e-6}
    assert (embedding.model_name, embedding.class_name()) == (str(workplace / "model"), "CnClipEmbedding")
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), expected, **close)
    np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[0]), expected[0], **close)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[1]), expected[1], **close)
    np.testing.assert_allclose(asyncio.run(embedding.aget_query_embedding(TEXTS[1])), expected[1], **close)
    np.testing.assert_allclose(asyncio.run(embedding.aget_text_embedding_batch(TEXTS)), expected, **close)
    np.testing.assert_allclose(embedding.get_image_embedding_batch(["a.jpg", "b.jpg"]), pictures, **close)
    np.testing.assert_allclose(asyncio.run(embedding.aget_image_embedding("a.jpg")), pictures[0], **close)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
def test_haystack_gets_documents_with_rows_and_its_pipeline_survives_yaml(workplace: Path) -> None:
    from haystack import Document, Pipeline
    from haystack.dataclasses import ByteStream

    from cn_clip.integrations.haystack import CnClipDocumentEmbedder, CnClipImageEmbedder, CnClipTextEmbedder

    model = str(workplace / "model")
    encoder = Encoder(model, device="cpu")
    given = [Document(content=text) for text in TEXTS]
    found = CnClipDocumentEmbedder(model).run(given)["documents"]
    np.testing.assert_allclose([one.embedding for one in found], encoder.encode_texts(TEXTS), atol=1e-6)
    assert [one.embedding for one in given] == [None, None]
    pictures = [Document(meta={"file_path": "a.jpg"}), Document(blob=ByteStream((workplace / "b.jpg").read_bytes()))]
    found = CnClipImageEmbedder(model).run(pictures)["documents"]
    np.testing.assert_allclose([one.embedding for one in found], encoder.encode_images(["a.jpg", "b.jpg"]), atol=1e-6)
    for embedder, wrong, words in (
        (CnClipDocumentEmbedder, pictures[0], r"documents\[0\]: has no text in `content`"),
        (CnClipImageEmbedder, given[0], r"documents\[0\]: has no picture, neither meta\['file_path'\] nor bytes"),
    ):
        with pytest.raises(DataError, match=words):
            embedder(model).run([wrong])
    pipeline = Pipeline()
    pipeline.add_component("query", CnClipTextEmbedder(model, {"device": "cpu", "context_length": 9}))
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["cn_clip.integrations.haystack"])
    assert again.get_component("query").encoder.context_length == 9
    row = again.run({"query": {"text": TEXTS[0]}})["query"]["embedding"]
    np.testing.assert_allclose(row, encoder.encode_texts(TEXTS[:1])[0], atol=1e-6)
