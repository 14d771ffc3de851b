"""The towers of other families through every door and backend: the rows are those that the owner's package computes.

`make test-families` prints the table at its end.
"""

import asyncio
import html
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import pictures, spoiled, theirs
from tiny_families import (
    KINDS,
    OPEN_CLIP_KINDS,
    SENTENCE_KINDS,
    write_family,
    write_open_clip,
    write_sentence_transformers,
)

from cn_clip import cli
from cn_clip.clip import Encoder
from cn_clip.clip.backends import parity
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.blocks import trimmed, write_block
from cn_clip.clip.families import fg_clip_2, naflex, st_models
from cn_clip.clip.picture_files import Head
from cn_clip.errors import CheckpointError, ConfigError, DownloadError, NotFiniteError
from cn_clip.retrieval.store import open_index
from cn_clip.serve.limits import Limits
from cn_clip.serve.pictures import Decoders, EncodedPicture

transformers = pytest.importorskip("transformers", minversion="5")

TEXTS = ["小猫", "红色的苹果 a photo of the dog", "A Photo of “小狗”", "星星" * 60, "月亮"]
QUICK = ("clip", "siglip_2_naflex")
BACKENDS = ("torch", "onnx", "openvino")
TOLERANCE = 1e-5  # of float32 sums in another order
TABLE: dict[tuple[str, str], dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints what was compared, once all is done."""
    yield
    if TABLE:
        width = max(len(f"{kind} {door}") for kind, door in TABLE)
        lines = [" " * width + "".join(f"  {one:>9}" for one in BACKENDS)]
        for (kind, door), cells in TABLE.items():
            lines.append(f"{kind} {door}".ljust(width) + "".join(f"  {cells.get(one, '—'):>9}" for one in BACKENDS))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n\nlargest difference to the rows of the owner's package\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    @cache
    def of(kind: str) -> Path:
        if kind in KINDS:
            return write_family(root / kind, kind)
        if kind in OPEN_CLIP_KINDS:
            return write_open_clip(root / kind, kind)
        return write_sentence_transformers(root / kind, kind)

    return of


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def compare(name: str, door: str, kind: str, backend: Any, cache: Path, expected: tuple[Rows, Rows]) -> None:
    encoder = Encoder(name, backend=backend, device="cpu", download_root=cache)
    found = encoder.encode_images(pictures(), batch_size=3), encoder.encode_texts(TEXTS, batch_size=2)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    TABLE.setdefault((kind, door), {})[backend] = f"{difference:.1e}"
    for rows, owners in zip(found, expected, strict=True):
        np.testing.assert_allclose(rows, owners, atol=TOLERANCE)
    assert encoder.backend_name == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.families) for kind in KINDS]
)
def test_rows_of_hf_are_those_of_transformers_in_every_backend(
    kind: str, backend: str, folders: Any, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "siglip":
        pytest.importorskip("sentencepiece")
    expected = theirs(folders(kind), kind, pictures(), TEXTS)
    compare(f"hf:{folders(kind)}", "hf:", kind, backend, exported, expected)
    told = capsys.readouterr().err
    if backend == "onnx":
        assert "model.img.fp32.onnx: " in told, "the parity report"
        assert "model.txt.fp32.onnx: " in told
    if backend == "openvino":
        assert "fp32.onnx" not in told, "the files of onnx are there"


@pytest.mark.families
@pytest.mark.filterwarnings("default")  # of timm and torchvision
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", OPEN_CLIP_KINDS)
def test_rows_of_open_clip_are_its_own_in_every_backend(kind: str, backend: str, folders: Any, exported: Path) -> None:
    import open_clip

    folder = folders(kind)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    if kind == "open_clip_siglip_2":
        tokenizer.clean_fn = str.lower  # as the paper has it
    with torch.inference_mode():
        images = model.eval().encode_image(torch.stack([preprocess(one) for one in pictures()]), normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    compare(f"open_clip:local-dir:{folder}", "open_clip:", kind, backend, exported, (images.numpy(), texts.numpy()))


@pytest.mark.families
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", SENTENCE_KINDS)
def test_rows_of_st_are_those_of_sentence_transformers_with_its_prompts(
    kind: str, folders: Any, exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = folders(kind)
    model = SentenceTransformer(str(folder), device="cpu")
    plain = model.encode(TEXTS, normalize_embeddings=True)
    images = [one.convert("RGB") for one in pictures()]
    expected = (
        np.concatenate([model.encode_document([one], normalize_embeddings=True) for one in images]),
        np.concatenate([model.encode_query([one], normalize_embeddings=True) for one in TEXTS]),
    )
    assert not np.allclose(plain, expected[1], atol=1e-3), "the prompt changes the rows"
    caplog.clear()
    compare(f"st:{folder}", "st:", kind, "torch", exported, expected)
    told = [record.getMessage() for record in caplog.records if "prompts of its config" in record.getMessage()]
    assert told == [f"{folder}: prompts of its config: query 'query: '"]


# --- two doors


def hard_strings(count: int) -> list[str]:
    """Texts of every kind that cleaning may change: entities, punctuation, blanks, case, accents, emoji, long ones."""
    generator = random.Random(0)
    pieces = [
        "Cat",
        "DOG",
        "&amp;",
        "&lt;b&gt;",
        "  ",
        "\t",
        "“小狗”",
        "Ä",
        "e\u0301",
        "İ",
        "ﬁ",
        "_",
        "a.b,c!",
        "😀",
        "\u3000",
    ]
    pieces += ["<eos>", "ÃƒÂ©", "don't", "#1", "月亮", "\n", "…", "A", "ß", "Σ", "½", html.escape("<a href='x'>")]
    return ["".join(generator.choices(pieces, k=generator.randrange(0, 40))) for _ in range(count)]


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_both_doors_of_siglip_2_give_a_text_the_same_ids(folders: Any) -> None:
    there = Encoder(f"hf:{folders('siglip_2')}", device="cpu").texts
    here = Encoder(f"open_clip:local-dir:{folders('open_clip_siglip_2')}", device="cpu").texts
    texts = hard_strings(1000)
    assert len({text.lower() for text in texts}) > 950
    np.testing.assert_array_equal(here.pad(here.rows(texts)), there.pad(there.rows(texts)))
    assert here.rows(["Cat"]) == here.rows(["cat"])
    assert here.rows(["cat!"]) != here.rows(["cat"]), "punctuation stays"


# --- pictures in their own proportions


@pytest.mark.parametrize("size", [(1, 1), (1, 24), (4, 4), (3, 7), (8, 2), (16, 16), (31, 33)])
def test_positions_are_scaled_as_torch_scales_them(size: tuple[int, int]) -> None:
    grid = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
    length = size[0] * size[1] + 3
    (found,) = naflex.resized_positions(grid, torch.tensor([size]), length)
    picture = grid.permute(2, 0, 1)[None].contiguous()
    expected = torch.nn.functional.interpolate(picture, size=size, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(found[: length - 3], expected[0].flatten(1).T, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[length - 3 :], found[:1].expand(3, -1), atol=1e-6, rtol=0)


def test_positions_of_a_tall_picture_are_those_of_a_wide_one_turned() -> None:
    """PyTorch 2.13 scales to a width of 1 differently from a height of 1, so it is no oracle there."""
    grid = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
    tall, wide = (
        naflex.resized_positions(one, torch.tensor([size]), 24)
        for one, size in ((grid, (24, 1)), (grid.transpose(0, 1), (1, 24)))
    )
    torch.testing.assert_close(tall, wide, atol=1e-6, rtol=0)


def test_a_block_says_how_many_rows_follow_and_a_batch_is_cut_to_the_longest() -> None:
    blocks = np.full((2, 9, 4), 7, np.float32)
    write_block(np.arange(24, dtype=np.float32).reshape(6, 4), (2, 3), blocks[0])
    write_block(np.ones((1, 4), np.float32), (1, 1), blocks[1])
    assert blocks[0, 0].tolist() == [2, 3, 0, 0]
    assert blocks[0, 1:7].ravel().tolist() == list(range(24))
    assert not blocks[0, 7:].any()
    assert trimmed(blocks).shape == (2, 7, 4)
    assert trimmed(blocks[1:]).shape == (1, 2, 4)
    pixels = np.zeros((1, 3, 5, 5), np.float32)
    assert trimmed(pixels) is pixels


def test_rows_do_not_depend_on_the_pictures_beside_them(folders: Any) -> None:
    encoder = Encoder(f"hf:{folders('siglip_2_naflex')}", device="cpu")
    wide, small = Image.effect_noise((200, 20), 90).convert("RGB"), Image.effect_noise((8, 8), 90).convert("RGB")
    together = encoder.encode_images([wide, small])
    alone = np.concatenate([encoder.encode_images([one]) for one in (wide, small)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert encoder.room(2).shape == (2, 25, 3 * 8 * 8)


@pytest.mark.parametrize(
    ("size", "patches"),
    [((16, 16), 128), ((224, 224), 256), ((180, 180), 128), ((400, 300), 576), ((448, 448), 784), ((4000, 3000), 1024)],
)
def test_fg_clip_2_takes_as_many_patches_as_its_authors_advise(size: tuple[int, int], patches: int) -> None:
    assert fg_clip_2.num_patches(*size) == patches


def test_fg_clip_2_reads_long_texts_when_asked_for_their_length(folders: Any) -> None:
    folder = folders("fg_clip_2")
    texts = ["红色的苹果 a photo of the Dog. " * 8, "小猫"]
    long = Encoder(f"hf:{folder}", device="cpu", context_length=196)
    assert (long.context_length, Encoder(f"hf:{folder}", device="cpu").context_length) == (196, 64)
    np.testing.assert_allclose(long.encode_texts(texts), long_texts_by_hand(folder, texts), atol=1e-5)
    assert not np.allclose(
        long.encode_texts(texts), Encoder(f"hf:{folder}", device="cpu").encode_texts(texts), atol=0.1
    )
    with pytest.raises(ConfigError, match="cuts texts at 64 or 196 tokens of its own"):
        Encoder(f"hf:{folder}", device="cpu", context_length=100)


def long_texts_by_hand(folder: Path, texts: list[str]) -> Rows:
    """The 20 first positions of one table, the others of another, the layers of SigLIP 2, the last token, its head."""
    from safetensors.torch import load_file
    from test_families import published_as_siglip_2

    weights = load_file(folder / "model.safetensors")
    model = transformers.Siglip2Model.from_pretrained(folder, config=published_as_siglip_2(folder)).eval().text_model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    given = [text.lower() for text in texts]
    ids = tokenizer(given, padding="max_length", truncation=True, max_length=196, return_tensors="pt").input_ids
    before = "text_model.embeddings.position_embedding"
    with torch.inference_mode():
        hidden = weights["text_model.embeddings.token_embedding.weight"][ids]
        hidden[:, :20] += weights[f"{before}_ori.weight"][:20]
        hidden[:, 20:] += weights[f"{before}_res.weight"][20:]
        hidden = model.final_layer_norm(model.encoder(inputs_embeds=hidden).last_hidden_state)[:, -1]
        rows = hidden @ weights["longtext_head.weight"].T + weights["longtext_head.bias"]
    found: Rows = torch.nn.functional.normalize(rows, dim=-1).numpy()
    return found


def test_pictures_in_their_own_proportions_go_into_an_index(folders: Any, tmp_path: Path) -> None:
    images = {"wide": Image.effect_noise((90, 20), 90), "tall": Image.effect_noise((20, 70), 90)}
    (tmp_path / "pictures").mkdir()
    for name, image in images.items():
        image.convert("RGB").save(tmp_path / "pictures" / f"{name}.png")
    model, index = f"hf:{folders('siglip_2_naflex')}", tmp_path / "p.index"
    cli.main(
        ["index", "build", str(tmp_path / "pictures"), "--output", str(index), "--model", model, "--device", "cpu"]
    )
    rows = Encoder(model, device="cpu").encode_images([one.convert("RGB") for one in images.values()])
    opened = open_index(index)
    for name, row in zip(images, rows, strict=True):
        np.testing.assert_allclose(opened.vector(f"{name}.png"), row, atol=1e-3)  # kept as float16


def test_a_decoding_process_makes_the_blocks_of_this_process(folders: Any) -> None:
    transform = Encoder(f"hf:{folders('siglip_2_naflex')}", device="cpu").transform
    image, stream = Image.effect_noise((90, 20), 90).convert("RGB"), io.BytesIO()
    image.save(stream, "PNG")

    async def decoded() -> Any:
        decoders = Decoders(1, Limits())
        try:
            await decoders.open(transform)
            return await decoders.pixels(EncodedPicture(stream.getvalue(), Head("PNG", 90, 20), "image"))
        finally:
            decoders.close()

    np.testing.assert_array_equal(asyncio.run(decoded()), transform.array(image))


# --- exported files


def test_a_text_without_a_direction_is_named(folders: Any) -> None:
    """TIPSv2 has the mean of the tokens of a text, and the empty one has none."""
    encoder = Encoder(f"hf:{folders('tips_2')}", device="cpu")
    with pytest.raises(NotFiniteError, match=r"text 1 \(''\)"):
        encoder.encode_texts(["a", ""])


def test_an_exported_file_of_another_family_is_not_taken_for_chinese_clip(folders: Any, exported: Path) -> None:
    Encoder(f"hf:{folders('clip')}", backend="onnx", download_root=exported)
    (file,) = (exported / "exported").glob("clip-*/model.img.fp32.onnx")
    with pytest.raises(ConfigError, match="was exported from a model of the family hf; open that model by its name"):
        Encoder(file.parent / "model", backend="onnx")


def test_int8_is_measured_on_the_inputs_of_the_family(
    folders: Any, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Encoder(f"hf:{folders('clip')}", backend="onnx", download_root=exported)
    int8 = Encoder(f"hf:{folders('clip')}", backend="onnx", precision="int8", download_root=exported)
    assert "model.img.int8.onnx: " in capsys.readouterr().err
    rows = full.encode_texts(TEXTS)
    assert float((rows * int8.encode_texts(TEXTS)).sum(axis=1).min()) > parity.TOLERANCES["int8"]
    assert int8.facts.precision == "int8"


def test_auto_takes_a_backend_for_a_model_of_another_family(folders: Any, exported: Path) -> None:
    encoder = Encoder(f"hf:{folders('clip')}", backend="auto", download_root=exported, device="cpu")
    assert encoder.decision is not None
    assert "in the order that was measured on Chinese-CLIP" in encoder.decision.values()["why"] or (
        "按在 Chinese-CLIP 上测得的次序" in encoder.decision.values()["why"]
    )
    assert encoder.decision.values()["times_reference"] is None
    expected = Encoder(f"hf:{folders('clip')}", device="cpu").encode_texts(TEXTS)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected, atol=TOLERANCE)


# --- what is refused


class _Trace:
    """A folder's own module that leaves a trace when it is imported."""

    def __init__(self, tmp_path: Path) -> None:
        self.file = tmp_path / "was-run"

    def write(self, folder: Path) -> None:
        for name in ("evil.py", "modeling_evil.py"):
            (folder / name).write_text(f"import os; os.mkdir({str(self.file)!r})\n", encoding="utf-8")


AUTO = {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoProcessor": "evil.Processor"}}


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_st_runs_code_of_a_folder_only_if_it_is_trusted(folders: Any, tmp_path: Path) -> None:
    trace = _Trace(tmp_path)
    folder = spoiled(folders("st_clip"), tmp_path / "auto", "config.json", model_type="evil", **AUTO)
    trace.write(folder)
    with pytest.raises(CheckpointError, match=r"asks for code of its own, which is not run; .* --trust-remote-code"):
        Encoder(f"st:{folder}", device="cpu")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(CheckpointError, match="asks for code of its own, which is not run"):
        Encoder(f"st:{folder}", device="cpu")
    assert not trace.file.exists()
    with pytest.raises(CheckpointError, match="sentence-transformers cannot open it"):
        Encoder(f"st:{folder}", device="cpu", trust_remote_code=True)
    assert trace.file.exists(), "it is run when it is trusted"


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_st_opens_a_known_model_whose_folder_brings_code_without_running_it(folders: Any, tmp_path: Path) -> None:
    trace = _Trace(tmp_path)
    folder = spoiled(folders("st_clip"), tmp_path / "auto", "config.json", **AUTO)
    trace.write(folder)
    rows = Encoder(f"st:{folder}", device="cpu").encode_texts(["小猫"])
    np.testing.assert_array_equal(rows, Encoder(f"st:{folders('st_clip')}", device="cpu").encode_texts(["小猫"]))
    assert not trace.file.exists()


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_open_clip_runs_no_code_of_a_folder(folders: Any, tmp_path: Path) -> None:
    trace = _Trace(tmp_path)
    source = folders("open_clip_siglip_2")
    folder = spoiled(source, tmp_path / "auto", "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["trust_remote_code"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    trace.write(folder)
    Encoder(f"open_clip:local-dir:{folder}", device="cpu")
    assert not trace.file.exists()


@pytest.mark.families
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("what", ["modules.json", "nothing"])
def test_st_without_a_model_is_a_sentence(what: str, tmp_path: Path) -> None:
    if what == "modules.json":
        (tmp_path / what).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Encoder(f"st:{tmp_path}", device="cpu")


def test_st_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(Exception, match=r"pip install 'cn-clip-next\[st\]'"):
        Encoder(f"st:{tmp_path}", device="cpu")


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_a_folder_of_open_clip_comes_from_the_hub_and_from_its_cache(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the hub's client finds what it has kept under the id and the revision."""
    repo = tmp_path / "models--someone--siglip-2"
    shutil.copytree(folders("open_clip_siglip_2"), repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = Encoder("open_clip:hf-hub:someone/siglip-2", device="cpu", download_root=tmp_path)
    here = Encoder(f"open_clip:local-dir:{folders('open_clip_siglip_2')}", device="cpu")
    np.testing.assert_array_equal(there.encode_texts(TEXTS), here.encode_texts(TEXTS))
    with pytest.raises(DownloadError, match="open_clip:hf-hub:someone/nothing"):
        Encoder("open_clip:hf-hub:someone/nothing", device="cpu", download_root=tmp_path)


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_st_of_texts_alone_is_refused(folders: Any, tmp_path: Path) -> None:
    folder = spoiled(folders("st_clip"), tmp_path / "texts", "sentence_bert_config.json")
    config = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    del config["modality_config"]["image"]
    (folder / "sentence_bert_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="takes text, expected text and image"):
        Encoder(f"st:{folder}", device="cpu")


def test_pictures_and_texts_reach_sentence_transformers_whole() -> None:
    transform, texts = st_models.WholePictures("exact"), st_models.WholeTexts()
    image = Image.effect_noise((50, 37), 90).convert("RGB")
    (found,) = st_models.pictures_of(transform.array(image)[None])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    large = transform.array(Image.new("RGB", (3000, 1000)))
    (found,) = st_models.pictures_of(large[None])
    assert found.width * found.height <= st_models.MOST_PIXELS
    assert found.width / found.height == pytest.approx(3, rel=0.01)
    given = ["小猫 😀", "", "a"]
    assert st_models.texts_of(texts.pad(texts.rows(given))) == given


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("preprocessor_config.json", {"max_num_patches": 100000}, "max_num_patches: expected 1 to 4096, got 100000"),
        ("preprocessor_config.json", {"patch_size": 4}, "patch_size: expected 8, as the model has it, got 4"),
    ],
)
def test_a_processor_of_patches_that_does_not_fit_is_refused(
    file: str, values: Any, words: str, folders: Any, tmp_path: Path
) -> None:
    folder = spoiled(folders("siglip_2_naflex"), tmp_path / "spoiled", file, **values)
    with pytest.raises(CheckpointError, match=words):
        Encoder(f"hf:{folder}", device="cpu")


@pytest.mark.parametrize("name", ["open_clip:local-dir:", "open_clip:hf-hub:", "st:"])
def test_a_name_without_its_end_is_refused_with_all_forms(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected hf:FOLDER, .* or st:FOLDER"):
        Encoder(name)


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_a_folder_of_open_clip_without_its_config_or_weights_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        Encoder(f"open_clip:local-dir:{tmp_path}")
    with pytest.raises(CheckpointError, match="no such folder; expected a folder of open_clip"):
        Encoder(f"open_clip:local-dir:{tmp_path}/nowhere")
