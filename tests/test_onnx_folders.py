"""`cn-clip convert --to immich` and `--to transformers-js`: folders of ONNX files that other programs open."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from deterministic import TEXT_TOWER, picture_bytes, weight
from documents import ROOT
from immich_loader import ImmichModel
from PIL import Image
from tiny_models import tiny_model

from cn_clip import Encoder, cli, emoji_pack, zoo
from cn_clip.clip.model import CLIP
from cn_clip.clip.pictures import open_picture

# Of names, and of texts that other tokenizers cut in other ways.
ODD_TEXTS = [
    "“生日”蛋糕",
    "[SEP] 与 [PAD]",
    "ÉLAN Naïve",
    "很长" * 60,
    "WiFi！（５Ｇ）",
    "a" * 120,
    "",
    "两个\u3000空格 \n 换行",
]
# Where `make test-clients` has npm install @huggingface/transformers.
TRANSFORMERS_JS = Path(os.environ.get("TRANSFORMERS_JS", ROOT / ".venv/transformers-js"))
Pictures = list[Image.Image]


def convert(*args: object) -> None:
    cli.main(["convert", *map(str, args)])


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the tests for what is exported; each model is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "DOWNLOAD_ROOT", str(tmp_path_factory.mktemp("cache")))
        yield


def hundred() -> tuple[Pictures, list[str]]:
    """100 pictures, some of them long or high, and 100 texts."""
    items = emoji_pack.load()[::18][:90]
    pictures = [open_picture(item.picture, name=item.emoji).convert("RGB") for item in items]
    pictures += [Image.fromarray(picture_bytes(n, height=60 + 17 * n, width=150)) for n in range(10)]
    texts = [item.name for item in items] + ODD_TEXTS
    return pictures, texts + ["一张照片，上面有" + text for text in texts[: 100 - len(texts)]]


def smallest_cosine(model: str | Path, folder: Path, pictures: Pictures, texts: list[str]) -> float:
    encoder, immich = Encoder(str(model), device="cpu"), ImmichModel(folder)
    ours = np.concatenate([encoder.encode_images(pictures), encoder.encode_texts(texts)])
    theirs = np.stack([*map(immich.picture, pictures), *map(immich.text, texts)])
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
    return float((ours * theirs).sum(axis=1).min())


def test_immich_opens_the_bundled_model_and_gets_the_vectors_of_the_encoder(tmp_path: Path) -> None:
    convert("Emoji-Tiny", tmp_path / "folder", "--to", "immich")
    names = {path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*.*")}
    assert names == {
        "config.json",
        "textual/model.onnx",
        "textual/tokenizer.json",
        "textual/tokenizer_config.json",
        "visual/model.onnx",
        "visual/preprocess_cfg.json",
    }
    pictures, texts = hundred()
    assert (len(pictures), len(texts)) == (100, 100)
    assert smallest_cosine("Emoji-Tiny", tmp_path / "folder", pictures, texts) > 0.9999


@pytest.mark.slow
def test_immich_gets_the_vectors_of_the_encoder_from_a_full_size_model(tmp_path: Path) -> None:
    config = zoo.model_config("ViT-B-16", TEXT_TOWER["ViT-B-16"])
    with torch.device("meta"):
        shapes = CLIP.from_config(config).state_dict()
    state = {name: torch.from_numpy(weight(name, tuple(value.shape))) for name, value in shapes.items()}
    torch.save({"state_dict": state}, tmp_path / "ViT-B-16.pt")
    convert(tmp_path / "ViT-B-16.pt", tmp_path / "folder", "--to", "immich")
    cosine = smallest_cosine(tmp_path / "ViT-B-16.pt", tmp_path / "folder", *hundred())
    print(f"ViT-B-16, 100 pictures and 100 texts: smallest cosine {cosine:.6f}")
    assert cosine > 0.9999


def test_what_cannot_be_a_folder_of_onnx_files_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": tiny_model("vit").state_dict()}, tmp_path / "words.pt")
    (tmp_path / "full" / "onnx").mkdir(parents=True)
    (tmp_path / "full" / "onnx" / "mine.onnx").write_bytes(b"mine")
    for kind in ("immich", "transformers-js"):
        for source, target, reason in (
            ("words.pt", "out", "words.pt: the text tower knows 40 words, but this package's vocabulary has 21128"),
            ("words.pt", "full", "full: holds other things (onnx/mine.onnx); choose a new folder"),
        ):
            with pytest.raises(SystemExit):
                convert(tmp_path / source, tmp_path / target, "--to", kind, "--overwrite")
            error = capsys.readouterr().err
            assert reason in error
            assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_precision_chooses_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("Emoji-Tiny", tmp_path / "js", "--to", "transformers-js", "--precision", "fp16", "--json")
    told = json.loads(capsys.readouterr().out)
    files = [path for path in (tmp_path / "js").rglob("*") if path.is_file()]
    assert told["bytes"] == sum(path.stat().st_size for path in files)
    onnx_files = {path.name for path in files if path.suffix == ".onnx"}
    assert onnx_files == {"model_fp16.onnx", "text_model_fp16.onnx", "vision_model_fp16.onnx"}
    convert("Emoji-Tiny", tmp_path / "immich", "--to", "immich", "--precision", "fp16")
    pictures, texts = hundred()
    assert smallest_cosine("Emoji-Tiny", tmp_path / "immich", pictures[:10], texts[:10]) > 0.999


@pytest.mark.parametrize("form", ["", "_quantized"])
def test_the_files_for_transformers_js_give_the_vectors_of_the_encoder(tmp_path: Path, form: str) -> None:
    convert("Emoji-Tiny", tmp_path / "folder", "--to", "transformers-js")
    encoder = Encoder("Emoji-Tiny", device="cpu")
    pictures, texts = hundred()
    inputs = {
        "pixel_values": np.stack([encoder.transform.array(picture) for picture in pictures]),
        "input_ids": encoder.texts.pad(encoder.texts.rows(texts)),
    }
    expected = {"image_embeds": encoder.encode_images(pictures), "text_embeds": encoder.encode_texts(texts)}
    found = {}
    for name in ("vision_model", "text_model", "model"):
        session = onnxruntime.InferenceSession(tmp_path / "folder" / "onnx" / f"{name}{form}.onnx")
        given = {one.name: inputs[one.name] for one in session.get_inputs()}
        found[name] = dict(zip([one.name for one in session.get_outputs()], session.run(None, given), strict=True))
    least = 0.999 if form else 0.999999
    for name, rows in [*found["vision_model"].items(), *found["text_model"].items()]:
        assert (rows * expected[name]).sum(axis=1).min() > least
        np.testing.assert_allclose(found["model"][name], rows, atol=1e-6)
    whole = found["model"]
    cosines = whole["image_embeds"] @ whole["text_embeds"].T
    np.testing.assert_allclose(whole["logits_per_image"], cosines * encoder.facts.logit_scale, rtol=1e-4)
    np.testing.assert_array_equal(whole["logits_per_text"], whole["logits_per_image"].T)


@pytest.mark.clients
@pytest.mark.parametrize(("dtype", "least"), [("fp32", 0.9999), ("q8", 0.999)])
def test_transformers_js_opens_the_folder_in_node(tmp_path: Path, dtype: str, least: float) -> None:
    convert("Emoji-Tiny", tmp_path / "folder", "--to", "transformers-js")
    pictures, texts = hundred()
    paths = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    request = {"library": str(TRANSFORMERS_JS), "folder": str(tmp_path / "folder"), "dtype": dtype}
    request |= {"texts": texts, "pictures": list(map(str, paths))}
    (tmp_path / "request").write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name("transformers_js.mjs")
    subprocess.run(["node", script, tmp_path / "request", tmp_path / "answer"], check=True)
    answer = json.loads((tmp_path / "answer").read_text(encoding="utf-8"))
    encoder = Encoder("Emoji-Tiny", device="cpu")
    ids, expected = np.array(answer["token_ids"]), encoder.texts.pad(encoder.texts.rows(texts))
    # transformers.js cuts a long text behind [SEP], and so leaves it out.
    cut = ids[:, -1] != 0
    assert [text for text, is_cut in zip(texts, cut, strict=True) if is_cut] == ["很长" * 60, "a" * 120]
    np.testing.assert_array_equal(ids[~cut], expected[~cut])
    np.testing.assert_array_equal(ids[cut, :-1], expected[cut, :-1])
    images, words = encoder.encode_images(pictures), encoder.encode_texts(texts)
    cosines = {
        name: (np.array(answer[name]) * rows).sum(axis=1)
        for name, rows in (("image_embeds", images), ("text_embeds", words))
    }
    for name, found in cosines.items():
        print(
            f"transformers.js, {dtype}, {name}: {np.sort(found)[:3].round(6).tolist()} …, median {np.median(found):.6f}"
        )
    assert cosines["text_embeds"][~cut].min() > least
    assert cosines["text_embeds"].min() > 0.99
    # Lanczos of sharp in place of Pillow's bicubic, on noise made smaller by half.
    assert cosines["image_embeds"].min() > 0.99
    assert np.median(cosines["image_embeds"]) > least
    np.testing.assert_allclose(answer["whole_text"], answer["text_embeds"], atol=1e-5)
    np.testing.assert_allclose(answer["whole_image"], answer["image_embeds"], atol=1e-5)
    scale = encoder.facts.logit_scale
    assert scale is not None
    logits = np.array(answer["image_embeds"]) @ np.array(answer["text_embeds"]).T * scale
    np.testing.assert_allclose(answer["logits"], logits, rtol=1e-3, atol=1e-3)
    assert {one["label"] for one in answer["labels"]} == set(texts[:3])
