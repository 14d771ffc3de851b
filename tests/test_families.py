"""Models of other families give the vectors that their own packages compute, and go through the same evaluation."""

import io
import json
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from dataset_files import jsonl_line, tsv_line, write_split
from other_kinds import OTHER_KINDS
from PIL import Image
from tiny_families import EMBED_DIM, KINDS, PATCH_SIZE, PATCHED, RESOLUTION, write_family

from cn_clip import cli
from cn_clip.clip import Encoder
from cn_clip.clip.backends.base import Parts, Rows
from cn_clip.clip.choice import Choice
from cn_clip.clip.families import folders as folders_of
from cn_clip.clip.families import names
from cn_clip.clip.families.opening import open_parts
from cn_clip.clip.opening import identity, open_encoder, weights_digest
from cn_clip.clip.tokenizer import VOCAB_FILE, ChineseTexts
from cn_clip.clip.transforms import MEAN, STD, ImageTransform
from cn_clip.command import Speaker
from cn_clip.demo import emoji
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, DownloadError, MissingExtraError
from cn_clip.eval import extract_features, zeroshot_evaluation

transformers = pytest.importorskip("transformers", minversion="5")

# The longest text of each tiny model: of its tokenizer, or of its position embeddings (of RoBERTa's 40, 2 are spare).
LENGTHS = {
    "clip": 77,
    "siglip": 64,
    "siglip_2": 64,
    "siglip_2_naflex": 64,
    "fg_clip_2": 64,
    "tips_2": 64,
    "altclip": 38,
    "metaclip_2": 77,
    "chinese_clip": 52,
}
# Of SigLIP 2, whose tokenizer leaves upper case as it is.
LOWERED = ("siglip_2", "siglip_2_naflex", "fg_clip_2")
FULL = (*LOWERED, "siglip", "tips_2")
TEXTS = ["小猫", "", "红色的苹果 a photo of the dog", "A Photo of “小狗”", "星星" * 60, "月亮"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    @cache
    def of(kind: str, seed: int = 0) -> Path:
        if kind == "siglip":
            pytest.importorskip("sentencepiece")
        return write_family(root / f"{kind}-{seed}", kind, seed=seed)

    return of


def pictures() -> list[Image.Image]:
    """Pictures of several sizes and modes."""
    generator = np.random.default_rng(0)
    sizes = {"RGB": (50, 37), "RGBA": (40, 64), "L": (32, 32), "P": (33, 90)}
    noise = {mode: Image.fromarray(generator.integers(0, 255, (h, w, 3), np.uint8)) for mode, (w, h) in sizes.items()}
    return [image.resize(image.size).convert(mode) for mode, image in noise.items()]


def theirs(folder: Path, kind: str, images: list[Image.Image], texts: list[str]) -> tuple[Rows, Rows]:
    """Unit rows as a user of transformers computes them: processor, tokenizer and model of the folder, in one batch."""
    name = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    processor: Any = getattr(transformers, f"{name}Pil", None)
    if processor is None:  # TIPSv2 has one over torchvision only, which does what that of SigLIP does
        processor = transformers.SiglipImageProcessorPil
    processor = processor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [text.lower() for text in texts] if kind in LOWERED else texts
    padding = "max_length" if kind in FULL else True
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=LENGTHS[kind], return_tensors="pt")
    images = [image.convert("RGB") for image in images]
    if kind == "fg_clip_2":  # its authors choose the number of patches for each picture, and transformers has no class
        steps = [
            {"max_num_patches": 256 if w // 16 * (h // 16) > 128 else 128} for w, h in (one.size for one in images)
        ]
        model = transformers.Siglip2Model.from_pretrained(folder, config=published_as_siglip_2(folder)).eval()
    else:
        steps, model = [{}] * len(images), transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        pixels = [processor(images=[one], return_tensors="pt", **more) for one, more in zip(images, steps, strict=True)]
        image_rows = torch.cat([model.get_image_features(**one).pooler_output for one in pixels])
        text_rows = model.get_text_features(**tokens).pooler_output
    normalize = torch.nn.functional.normalize
    return normalize(image_rows, dim=-1).numpy(), normalize(text_rows, dim=-1).numpy()


def published_as_siglip_2(folder: Path) -> Any:
    """FG-CLIP 2 without its long texts is SigLIP 2 in its own proportions."""
    config = json.loads((folder / "config.json").read_text())
    values = {name: {**config[name]} for name in ("text_config", "vision_config")}
    for one in values.values():
        one.pop("model_type", None)
    return transformers.Siglip2Config(**values)


# --- the vectors


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_transformers_with_the_processor_of_the_folder(kind: str, folders: Any) -> None:
    encoder = Encoder(f"hf:{folders(kind)}", device="cpu")
    texts = [text for text in TEXTS if text or kind != "tips_2"]  # which has no direction there
    image_rows, text_rows = theirs(folders(kind), kind, pictures(), texts)
    np.testing.assert_allclose(encoder.encode_images(pictures(), batch_size=3), image_rows, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts, batch_size=2), text_rows, atol=1e-5)
    assert encoder.embed_dim == image_rows.shape[1] == (32 if kind in FULL else EMBED_DIM)
    assert encoder.context_length == LENGTHS[kind]
    sides = {"siglip_2_naflex": 4 * PATCH_SIZE[kind], "fg_clip_2": 32 * PATCH_SIZE[kind]} if kind in PATCHED else {}
    assert encoder.transform.resolution == sides.get(kind, RESOLUTION)
    assert np.ptp(text_rows @ text_rows.T) > 0.01, "the texts are told apart, or the test would see no difference"


def test_pictures_of_clip_are_scaled_by_their_short_side_and_cut_from_the_middle(folders: Any) -> None:
    image = pictures()[0]
    assert image.size == (50, 37)
    scaled = image.resize((43, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
    expected = (np.asarray(scaled, dtype=np.float64) / 255 - MEAN) / STD
    pixels = Encoder(f"hf:{folders('clip')}", device="cpu").transform.array(image)
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1e-6)


def test_upper_case_is_nothing_to_siglip_2_though_its_tokenizer_keeps_it(folders: Any) -> None:
    folder = folders("siglip_2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Cat")["input_ids"] != tokenizer("cat")["input_ids"], "or nothing would be left to do"
    encoder = Encoder(f"hf:{folder}", device="cpu")
    upper, lower, other = encoder.encode_texts(["A CAT, “Ä”", "a cat, “ä”", "a dog"])
    np.testing.assert_array_equal(upper, lower)
    assert not np.allclose(lower, other, atol=1e-3)


def test_texts_of_siglip_are_padded_to_its_length_and_others_to_the_longest(folders: Any) -> None:
    siglip, clip = (Encoder(f"hf:{folders(kind)}", device="cpu").texts for kind in ("siglip", "clip"))
    assert [siglip.pad(siglip.rows([text])).shape[1] for text in ("小猫", "小猫小狗")] == [64, 64]
    # Three bytes a character, and the two marks around them.
    assert [clip.pad(clip.rows([text])).shape[1] for text in ("小猫", "小猫小狗")] == [8, 14]
    assert siglip.rows([]) == clip.rows([]) == []


def test_chinese_clip_gives_the_same_here_and_in_transformers(folders: Any) -> None:
    folder, texts = folders("chinese_clip"), ["小猫", "红色的苹果和小狗", ""]
    here, there = Encoder(folder, device="cpu"), Encoder(f"hf:{folder}", device="cpu")
    images = [image for image in pictures() if image.mode != "P"]  # a palette is scaled after it is resolved there
    np.testing.assert_allclose(here.encode_texts(texts), there.encode_texts(texts), atol=1e-5)
    np.testing.assert_allclose(
        here.encode_images([image.convert("RGB") for image in images]), there.encode_images(images), atol=1e-5
    )


def test_half_precision_computes_in_it(folders: Any) -> None:
    full, half = (Encoder(f"hf:{folders('clip')}", device="cpu", precision=one) for one in ("fp32", "bf16"))
    rows, rough = full.encode_texts(["小猫", "小狗"]), half.encode_texts(["小猫", "小狗"])
    assert rough.dtype == np.float32
    assert 1e-5 < np.abs(rows - rough).max() < 0.05


def test_fast_decoding_keeps_the_side_that_the_processor_scales_to(folders: Any) -> None:
    stream = io.BytesIO()
    Image.effect_noise((640, 512), 90).convert("RGB").resize((640, 512)).save(stream, "JPEG")
    exact, fast = (Encoder(f"hf:{folders('clip')}", device="cpu", decode=one) for one in ("exact", "fast"))
    assert (exact.transform.draft_size, fast.transform.draft_size) == (None, RESOLUTION)
    whole, part = (one.encode_images([stream.getvalue()]) for one in (exact, fast))
    assert not np.array_equal(whole, part)
    assert float((whole * part).sum()) > 0.9


def test_an_encoder_can_be_made_of_parts_of_ones_own(folders: Any) -> None:
    clip = Encoder(f"hf:{folders('clip')}", device="cpu")
    squeezed = Encoder(Parts(clip.backend, ImageTransform(RESOLUTION), clip.texts))
    images = [image.convert("RGB") for image in pictures()]
    pixels = np.stack([ImageTransform(RESOLUTION).array(image) for image in images])
    np.testing.assert_array_equal(squeezed.encode_images(images), clip.backend.encode_pixels(pixels))
    with pytest.raises(ConfigError, match="opened with its own settings"):
        Encoder(Parts(clip.backend, clip.transform, clip.texts), precision="fp16")


def test_texts_of_other_families_reach_their_tokenizer_as_they_are(folders: Any) -> None:
    clip = Encoder(f"hf:{folders('clip')}", device="cpu")
    assert clip.texts.rows(["“Cat”"]) != clip.texts.rows(['"Cat"'])
    assert ChineseTexts(52).rows(["A “Cat”"]) == ChineseTexts(52).rows(['a "cat"'])


# --- folders of Chinese-CLIP opened without hf:


OTHER_WORDS = "\n".join(VOCAB_FILE.read_text(encoding="utf-8").split("\n")[::-1])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, r"image_mean is \[0\.5, 0\.5, 0\.5\], expected"),
        ("preprocessor_config.json", {"image_std": None}, "image_std is None"),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "size is .*48.*, expected .*32"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 36}, "do_center_crop": True}, "size is"),
        ("preprocessor_config.json", {"do_center_crop": True, "crop_size": {"height": 16, "width": 32}}, "crop_size"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2, expected 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, r"rescale_factor is 1\.0"),
        ("processor_config.json", {"image_processor": {"image_mean": [0.5] * 3}}, "image_mean is"),
        ("vocab.txt", OTHER_WORDS, "is another vocabulary than that of Chinese-CLIP"),
        ("vocab.txt", "[PAD]\n", "is another vocabulary"),
        ("vocab.txt", b"\xff", "not a vocabulary that can be read"),
        ("tokenizer.json", {"model": {"vocab": {"[PAD]": 0, "a": 1}}}, "is another vocabulary"),
        ("tokenizer.json", {"model": {"vocab": [["a", -1.0]]}}, "holds no vocabulary of words"),
    ],
)
def test_a_folder_that_prepares_its_inputs_differently_is_sent_to_hf(
    file: str, content: Any, words: str, folders: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders("chinese_clip"), tmp_path / "mine")
    if isinstance(content, dict):
        before = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).exists() else {}
        content = json.dumps(before | content)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for place in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{file}: .*{words}|{file}: {words}") as caught:
            Encoder(place, device="cpu")
    if content != b"\xff":
        assert f"use hf:{folder}" in str(caught.value)


def squeezed_to(resolution: int) -> dict[str, Any]:
    """As the published folders of Chinese-CLIP have it."""
    size = {"height": resolution, "width": resolution}
    return {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "do_convert_rgb": True,
        "feature_extractor_type": "ChineseCLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": size,
    }


@pytest.mark.parametrize(
    "fields",
    [
        squeezed_to(32),
        {**squeezed_to(32), "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {**squeezed_to(32), "do_center_crop": True, "crop_size": 32},
        {"image_mean": [0.48145466, 0.4578275, 0.40821073]},
        {},
    ],
)
def test_a_folder_that_says_what_is_done_here_is_opened(
    fields: dict[str, Any], folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(folders("chinese_clip"), tmp_path / "mine")
    (folder / "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "vocab.txt").write_bytes(VOCAB_FILE.read_bytes().replace(b"\n", b"\r\n"))
    expected = Encoder(folders("chinese_clip"), device="cpu").encode_texts(["小猫"])
    np.testing.assert_array_equal(Encoder(folder, device="cpu").encode_texts(["小猫"]), expected)
    assert caplog.records == []


@pytest.mark.parametrize("size", [32, {"shortest_edge": 32}])
def test_a_folder_that_keeps_proportions_is_opened_with_a_warning(
    size: Any, folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"size": size, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    folder = spoiled(folders("chinese_clip"), tmp_path / "mine", "preprocessor_config.json", **more)
    Encoder(folder, device="cpu")
    (record,) = caplog.records
    assert "keeps the proportions of pictures; here they are squeezed" in record.getMessage()


def test_what_transformers_saves_of_an_own_folder_is_opened_again(folders: Any, tmp_path: Path) -> None:
    folder = folders("chinese_clip")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pictures_of = transformers.ChineseCLIPImageProcessorPil.from_pretrained(folder)
    transformers.ChineseCLIPProcessor(image_processor=pictures_of, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert {"processor_config.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    here, there = Encoder(tmp_path, device="cpu"), Encoder(folder, device="cpu")
    np.testing.assert_array_equal(here.encode_texts(TEXTS), there.encode_texts(TEXTS))


# --- what is refused


@pytest.mark.parametrize("name", ["size", "crop_size"])
@pytest.mark.parametrize("size", [{"height": 14000, "width": 14000}, {"height": 129, "width": 32}])
def test_a_processor_that_makes_huge_pictures_is_refused_before_it_makes_one(
    name: str, size: Any, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spoiled(folders("clip"), tmp_path / "clip", "preprocessor_config.json", **{name: size})

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a picture was made")

    monkeypatch.setattr("cn_clip.clip.families.hf_models.ProcessedPictures", made)
    with pytest.raises(
        CheckpointError, match=rf"preprocessor_config\.json: {name}: expected 1 to 128 pixels a side, got"
    ):
        Encoder(f"hf:{folder}")


def spoiled(folder: Path, target: Path, file: str, **changes: object) -> Path:
    """A copy of a folder with some values of a JSON file exchanged."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text(encoding="utf-8"))
    (target / file).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return target


def test_a_family_that_is_not_known_is_refused_and_its_code_not_run(folders: Any, tmp_path: Path) -> None:
    auto = {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]}}
    folder = spoiled(folders("clip"), tmp_path / "jina", "config.json", model_type="jina_clip", **auto)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"family .jina_clip., expected one of altclip, .*tipsv2, and code that .*use st:"
    ):
        Encoder(f"hf:{folder}")
    known = spoiled(folders("clip"), tmp_path / "clip", "config.json", **auto)
    shutil.copy(folder / "evil.py", known)
    Encoder(f"hf:{known}", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_weights_that_lack_a_tensor_are_refused_and_not_filled_with_random_ones(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("clip"), tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "text_projection.weight"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit config.json: missing keys text_projection.weight"):
        Encoder(f"hf:{folder}")


def test_weights_of_another_size_are_refused(folders: Any, tmp_path: Path) -> None:
    folder = spoiled(folders("clip"), tmp_path / "clip", "config.json", projection_dim=EMBED_DIM + 8)
    with pytest.raises(CheckpointError, match="clip: "):
        Encoder(f"hf:{folder}")


class _Runs:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_pickled_weights_are_read_but_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "pickled", "clip", safe=False)
    rows = Encoder(f"hf:{folder}", device="cpu").encode_texts(["小猫"])
    np.testing.assert_allclose(rows, theirs(folder, "clip", pictures(), ["小猫"])[1], atol=1e-5)
    torch.save({"text_projection.weight": _Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled: "):
        Encoder(f"hf:{folder}", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_processor_of_another_size_is_refused(folders: Any, tmp_path: Path) -> None:
    size = {"height": 48, "width": 48}
    folder = spoiled(folders("clip"), tmp_path / "clip", "preprocessor_config.json", crop_size=size)
    with pytest.raises(CheckpointError, match=r"makes pixels \(3, 48, 48\), the model takes \(3, 32, 32\)"):
        Encoder(f"hf:{folder}")


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_a_sentence(missing: str, folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("clip"), tmp_path / "clip")
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=str(folder)):
        Encoder(f"hf:{folder}")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("hf:", {}, "expected hf:FOLDER, open_clip:ARCHITECTURE@FILE"),
        ("open_clip:ViT-B-32", {}, "expected hf:FOLDER, open_clip:ARCHITECTURE@FILE"),
        ("hf:./nowhere", {}, "no such folder"),
        ("hf:{folder}/config.json", {}, "is a file"),
        ("hf:./" + "x" * 300, {}, "no such folder"),
        ("x" * 300, {}, "not found; available models"),
        ("hf:{folder}", {"backend": "tensorrt"}, "runs in torch or onnx or openvino, got 'tensorrt'"),
        ("st:{folder}", {"backend": "onnx"}, "runs in torch, got 'onnx'"),
        ("hf:{folder}", {"trust_remote_code": True}, "is for st:FOLDER; nothing else runs code"),
        ("hf:{folder}", {"precision": "int8"}, "computes in fp32"),
        ("hf:{folder}", {"compile": True}, "compile"),
        ("hf:{folder}", {"num_threads": 0}, "num_threads"),
        ("hf:{folder}", {"context_length": 24}, "context_length 24: this model cuts texts at 77 tokens"),
    ],
)
def test_what_cannot_be_opened_is_refused(name: str, settings: Any, words: str, folders: Any) -> None:
    with pytest.raises(CnClipError, match=words):
        Encoder(name.format(folder=folders("clip")), **settings)


@pytest.mark.parametrize(("kind", "package"), [("clip", "transformers"), ("siglip", "sentencepiece")])
def test_a_missing_package_is_named_with_its_command(
    kind: str, package: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders(kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CnClipError, match=r"pip install 'cn-clip-next\[hf\]'"):
        Encoder(f"hf:{folder}")


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch, folders: Any) -> None:
    from types import ModuleType

    folder, old = folders("clip"), ModuleType("transformers")
    old.__version__ = "4.57.6"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(MissingExtraError, match=r"needs transformers 5, 4\.57\.6 is installed"):
        Encoder(f"hf:{folder}")


# --- names and the hub


def test_a_name_is_made_absolute_only_where_it_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    (tmp_path / "w.pt").touch()
    assert names.absolute("hf:clip") == f"hf:{tmp_path / 'clip'}"
    assert names.absolute("open_clip:ViT-B-32@w.pt") == f"open_clip:ViT-B-32@{tmp_path / 'w.pt'}"
    assert names.absolute("hf:google/siglip") == "hf:google/siglip"
    assert [names.is_foreign(one) for one in ("hf:clip", "ViT-B-16", "C:\\model.pt", tmp_path)] == [True] + [False] * 3


class Hub:
    """A hub of one repository."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files

    def __call__(self, repo: str, *, allow_patterns: list[str], ignore_patterns: str, **where: object) -> str:
        from fnmatch import fnmatch

        assert (repo, ignore_patterns) == ("someone/model", "*/*")
        assert where == {"endpoint": "https://hub.test", "cache_dir": self.folder, "revision": None}
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (self.folder / file).touch()
        return str(self.folder)


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "README.md"], {"config.json", "model.safetensors"}),
        (["config.json", "pytorch_model.bin", "spiece.model"], {"config.json", "pytorch_model.bin", "spiece.model"}),
    ],
)
def test_of_a_hub_id_safetensors_come_first_and_pickles_only_without_them(
    files: list[str], fetched: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test/")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path, files))
    assert folders_of.folder_of(names.parse("hf:someone/model"), download_root=tmp_path) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == fetched


def test_a_hub_id_that_does_not_come_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test/")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path, ["config.json", "flax_model.msgpack"]))
    with pytest.raises(DownloadError, match="neither safetensors nor"):
        folders_of.folder_of(names.parse("hf:someone/model"), download_root=tmp_path)

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route\nto host.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(DownloadError, match=r"hf:someone/model: .*no route to host; give a local folder"):
        folders_of.folder_of(names.parse("hf:someone/model"))


# --- the evaluation

NUM_PICTURES = 24


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first emoji pictures with their names, as a built split."""
    folder = tmp_path_factory.mktemp("emoji")
    chosen = emoji.load()[:NUM_PICTURES]
    images = [tsv_line(one.number, emoji.png(one)) for one in chosen]
    write_split(folder, images, [jsonl_line(one.number, one.name, [one.number]) for one in chosen], split="valid")
    cli.main(["dataset", "build", "--data_dir", str(folder), "--splits", "valid"])
    return folder


def extract(model: str, split: Path, output: Path, *more: str) -> dict[str, str]:
    output.mkdir(exist_ok=True)
    files = {"image": str(output / "images.npz"), "text": str(output / "texts.npz")}
    data = ["--image-data", str(split / "lmdb/valid/imgs"), "--text-data", str(split / "valid_texts.jsonl")]
    outputs = ["--image-feat-output-path", files["image"], "--text-feat-output-path", files["text"]]
    which = ["--extract-image-feats", "--extract-text-feats"]
    cli.main(["features", "--model", model, "--device", "cpu", *which, *data, *outputs, *more])
    return files


@pytest.mark.parametrize("kind", ["siglip", "altclip"])
def test_features_and_recall_are_those_worked_out_by_hand(
    kind: str, folders: Any, split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = extract(f"hf:{folders(kind)}", split, tmp_path / "out")
    chosen = emoji.load()[:NUM_PICTURES]
    images = [Image.open(io.BytesIO(emoji.png(one))) for one in chosen]
    image_rows, text_rows = theirs(folders(kind), kind, images, [one.name for one in chosen])
    numbers = [one.number for one in chosen]
    for file, rows in zip(files.values(), (image_rows, text_rows), strict=True):
        stored = np.load(file)
        order = [numbers.index(number) for number in stored["ids"].tolist()]
        np.testing.assert_allclose(stored["features"], rows[order], atol=1e-5)

    found, result = tmp_path / "found.jsonl", tmp_path / "result.json"
    where = ["--image-feats", files["image"], "--text-feats", files["text"], "--output", str(found)]
    cli.main(["topk", "--top-k", "10", *where])
    capsys.readouterr()
    cli.main(["recall", str(split / "valid_texts.jsonl"), str(found), str(result), "--json"])
    scores = json.loads(capsys.readouterr().out)["scoreJson"]
    cosines = text_rows.astype(np.float64) @ image_rows.T
    ranks = (cosines > np.diag(cosines)[:, None]).sum(axis=1)
    by_hand = {f"r{k}": 100 * float((ranks < k).mean()) for k in (1, 5, 10)}
    assert {name: scores[name] for name in by_hand} == pytest.approx(by_hand)
    assert 0 < scores["r10"] < 100


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_is_that_worked_out_by_hand(
    kind: str, folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["心", "猫脸", "水果"]
    emoji.write_classification(tmp_path / "data", {label: emoji.CLASSES[label] for label in labels})
    (tmp_path / "templates.txt").write_text("一张{}的图片\na photo of {}\n", encoding="utf-8")
    folder = tmp_path / "data" / "test"
    more = ["--label-file", str(tmp_path / "data" / "label_cn.txt"), "--templates", str(tmp_path / "templates.txt")]
    options = [
        "--datapath",
        str(folder),
        "--save-dir",
        str(tmp_path),
        "--dataset",
        "emoji",
        "--device",
        "cpu",
        "--json",
    ]
    cli.main(["zeroshot", "--model", f"hf:{folders(kind)}", *more, *options])
    result = json.loads(capsys.readouterr().out)

    written = [line for line in (tmp_path / "data" / "label_cn.txt").read_text(encoding="utf-8").splitlines() if line]
    paths = sorted(folder.glob("*/*.png"))
    targets = np.array([sorted(one.name for one in folder.iterdir()).index(path.parent.name) for path in paths])
    prompts = [template.format(label) for label in written for template in ("一张{}的图片", "a photo of {}")]
    image_rows, text_rows = theirs(folders(kind), kind, [Image.open(path) for path in paths], prompts)
    classes = text_rows.reshape(len(written), 2, -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    right = (image_rows @ classes.T).argmax(axis=1) == targets
    assert result["zeroshot-top1"] == pytest.approx(right.mean())
    assert [share["accuracy"] for share in result["per_class"]] == pytest.approx(
        [right[targets == number].mean() for number in range(len(written))]
    )
    assert json.loads((tmp_path / "emoji.json").read_text())["model_name"] == f"hf:{folders(kind)}"


def chosen_of(model: str, tmp_path: Path) -> Choice:
    options = extract_features.Options(model=model, extract_text_feats=True, text_data=str(tmp_path / "x_texts.jsonl"))
    return options.chosen


def test_rows_of_two_models_are_never_mixed(folders: Any, tmp_path: Path) -> None:
    """What a run is known by names every file of the folder, its tokenizer too."""
    one, other = (chosen_of(f"hf:{folders('clip', seed)}", tmp_path) for seed in (0, 1))
    quiet = Speaker(quiet=True)
    known = [dict(identity(each, open_encoder(each, quiet))("text")) for each in (one, other)]
    assert known[0] != known[1]
    listed: Any = known[0]["model"]
    assert {Path(path).name for path, _, _ in listed} == {
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert weights_digest(one) != weights_digest(other)
    copy = chosen_of(f"hf:{shutil.copytree(folders('clip'), tmp_path / 'copy')}", tmp_path)
    assert weights_digest(copy) == weights_digest(one)


def test_a_file_of_the_model_is_not_written_over(folders: Any, split: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("clip"), tmp_path / "clip")
    before = (folder / "vocab.json").read_bytes()
    data = ["--text-data", str(split / "valid_texts.jsonl"), "--text-feat-output-path", str(folder / "vocab.json")]
    with pytest.raises(SystemExit):
        cli.main(["features", "--model", f"hf:{folder}", "--extract-text-feats", *data])
    assert (folder / "vocab.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--backend", "tensorrt"], "runs in torch or onnx or openvino"),
        (["--vision-model", "ViT-B-16"], "is of another family and says itself what its"),
        (["--context-length", "30"], "this model cuts texts at 77 tokens"),
        (["--precision", "int8"], "--precision"),
    ],
)
def test_settings_of_chinese_clip_alone_are_refused(
    more: list[str], words: str, folders: Any, split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        extract(f"hf:{folders('clip')}", split, tmp_path / "out", *more)
    assert stopped.value.code in (1, 2)
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert list((tmp_path / "out").iterdir()) == []


def test_the_old_flag_and_the_new_one_are_the_same() -> None:
    from cn_clip.command import parse

    given = ["--datapath", "x", "--label-file", "y"]
    for flag in ("--resume", "--model"):
        assert parse(zeroshot_evaluation.Options, [*given, flag, "hf:somewhere"]).model == "hf:somewhere"


def test_an_index_knows_its_model_and_is_searched_with_it(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders("clip"), tmp_path / "clip")
    (tmp_path / "pictures").mkdir()
    chosen = emoji.load()[:6]
    for one in chosen:
        (tmp_path / "pictures" / f"{one.number}.png").write_bytes(emoji.png(one))
    cli.main(["index", "build", "pictures", "--output", "photos.index", "--model", "hf:clip", "--device", "cpu"])
    monkeypatch.chdir(tmp_path / "pictures")  # the index knows where the folder is
    capsys.readouterr()
    cli.main(["search", "../photos.index", "A “Cat”", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)["hits"]
    images = [Image.open(io.BytesIO(emoji.png(one))) for one in chosen]
    image_rows, text_rows = theirs(tmp_path / "clip", "clip", images, ["A “Cat”"])
    order = np.argsort(-(image_rows @ text_rows[0]))
    assert [Path(one["id"]).stem for one in found] == [str(chosen[place].number) for place in order]
    shutil.copy(folders("clip", 1) / "model.safetensors", tmp_path / "clip")
    with pytest.raises(SystemExit):
        cli.main(["search", "../photos.index", "cat", "--device", "cpu"])
    assert "photos.index" in capsys.readouterr().err


# --- open_clip

TINY_OPEN_CLIP = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {"image_size": RESOLUTION, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture
def open_clip_file(tmp_path: Path) -> Path:
    """Weights of an architecture that open_clip is told of here."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch and torchvision: make test-families")
    (tmp_path / "tiny-open-clip.json").write_text(json.dumps(TINY_OPEN_CLIP), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-open-clip.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-open-clip")
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.families
@pytest.mark.filterwarnings("default")  # of timm and torchvision
def test_open_clip_gives_its_own_vectors(open_clip_file: Path) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("tiny-open-clip", pretrained=str(open_clip_file))
    texts = ["a cat", "", "a photo of the dog " * 10]
    encoder = Encoder(f"open_clip:tiny-open-clip@{open_clip_file}", device="cpu")
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(image) for image in pictures()]), normalize=True)
        expected = model.encode_text(open_clip.get_tokenizer("tiny-open-clip")(texts), normalize=True)
    np.testing.assert_allclose(encoder.encode_images(pictures(), batch_size=3), images.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts, batch_size=2), expected.numpy(), atol=1e-5)
    assert (encoder.context_length, encoder.embed_dim) == (24, EMBED_DIM)
    backend: Any = encoder.backend
    assert backend.facts.num_parameters[0] > backend.facts.num_parameters[1] > 0


class OpenClip:
    """The part of open_clip that knows architectures and tags, with entries as it has them."""

    OPENAI: ClassVar[dict[str, Any]] = {
        "mean": (0.48, 0.46, 0.41),
        "std": (0.27, 0.26, 0.28),
        "interpolation": "bicubic",
    }
    ENTRIES: ClassVar[dict[str, dict[str, Any]]] = {
        "MobileCLIP-S1": {"datacompdr": {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}},
        "ViT-B-32": {"openai": OPENAI, "laion2b": {**OPENAI, "url": "elsewhere"}},
        "ViT-L-14": {"openai": OPENAI, "laion2b": {**OPENAI, "mean": (0.5,) * 3}},
        "EVA": {},
    }

    def list_models(self) -> list[str]:
        return list(self.ENTRIES)

    def list_pretrained_tags_by_model(self, name: str) -> list[str]:
        return list(self.ENTRIES[name])

    def get_pretrained_cfg(self, name: str, tag: str) -> dict[str, Any]:
        return self.ENTRIES[name][tag]


def pixels_for(architecture: str, place: Path) -> dict[str, Any]:
    from cn_clip.clip.families import open_clip_models

    name = names.parse(f"open_clip:{architecture}@{place}")
    open_clip_models._check(name, OpenClip())
    return open_clip_models._pixels_of_tags(name, OpenClip())


@pytest.mark.parametrize(
    ("architecture", "mean"),
    [
        ("MobileCLIP-S1", (0.0,) * 3),
        ("ViT-B-32", OpenClip.OPENAI["mean"]),
        ("ViT-L-14:laion2b", (0.5,) * 3),
        ("ViT-L-14:openai", OpenClip.OPENAI["mean"]),
        ("EVA", None),
    ],
)
def test_a_file_of_open_clip_takes_its_pictures_as_the_tags_say(architecture: str, mean: Any, tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    assert pixels_for(architecture, tmp_path / "w.pt").get("image_mean") == mean


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-L-14@{file}", r"different ways; .* as in open_clip:ViT-L-14:openai@.*w\.pt \(openai, laion2b\)"),
        ("ViT-L-14:nobody@{file}", "no weights 'nobody' of ViT-L-14, but openai, laion2b"),
        ("ViT-L-14:openai@laion2b", "a tag goes before a file alone; give open_clip:ViT-L-14@laion2b"),
        ("ViT-Q:openai@{file}", "no architecture 'ViT-Q'"),
    ],
)
def test_a_tag_that_says_nothing_of_the_file_is_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    architecture, place = name.format(file=tmp_path / "w.pt").split("@")
    with pytest.raises(ConfigError, match=words):
        pixels_for(architecture, Path(place))


@pytest.mark.families
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("architecture", ["MobileCLIP-S1", "ViT-B-16-SigLIP", "ViT-B-32"])
def test_settings_reach_the_transform_of_open_clip(architecture: str, open_clip_file: Path) -> None:
    import open_clip

    entry = open_clip.get_pretrained_cfg(architecture, open_clip.list_pretrained_tags_by_model(architecture)[0])
    with pytest.MonkeyPatch.context() as patch:  # a small model under the name of a large one
        create = open_clip.create_model_and_transforms
        patch.setattr(open_clip, "create_model_and_transforms", lambda _, **more: create("tiny-open-clip", **more))
        patch.setattr(
            open_clip, "get_tokenizer", lambda _, tokenizer=open_clip.get_tokenizer: tokenizer("tiny-open-clip")
        )
        encoder = Encoder(f"open_clip:{architecture}@{open_clip_file}", device="cpu")
    steps: Any = encoder.transform
    resize, normalize = steps._compose.transforms[0], steps._compose.transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (tuple(entry["mean"]), tuple(entry["std"]))
    assert resize.interpolation.value == entry["interpolation"]
    squeezed = {"shortest": (32, 43), "squash": (32, 32)}[entry["resize_mode"]]
    assert resize(Image.new("RGB", (50, 37))).size[::-1] == squeezed


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_open_clip_refuses_what_it_does_not_know_and_what_would_run_code(open_clip_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no architecture 'ViT-Q'"):
        Encoder(f"open_clip:ViT-Q@{open_clip_file}")
    with pytest.raises(CheckpointError, match="is no file, and no weights that open_clip knows"):
        Encoder("open_clip:ViT-B-32@nowhere.pt")
    with pytest.raises(CheckpointError, match="open_clip cannot open it"):
        Encoder(f"open_clip:ViT-B-32@{open_clip_file}")
    torch.save({"state_dict": {"logit_scale": _Runs(tmp_path / "ran")}}, open_clip_file)
    with pytest.raises(CheckpointError, match="open_clip cannot open it"):
        Encoder(f"open_clip:tiny-open-clip@{open_clip_file}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.families
@pytest.mark.filterwarnings("default")
def test_open_clip_goes_through_the_evaluation(open_clip_file: Path, split: Path, tmp_path: Path) -> None:
    name = f"open_clip:tiny-open-clip@{open_clip_file}"
    files = extract(name, split, tmp_path / "out")
    chosen = emoji.load()[:NUM_PICTURES]
    rows = Encoder(open_parts(name)).encode_texts([one.name for one in chosen])
    np.testing.assert_allclose(np.load(files["text"])["features"], rows, atol=1e-5)
    assert folders_of.files_of(name) == [open_clip_file]


# --- files that change, and files of other kinds


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_keeps_its_weights_when_its_file_is_written_over(tmp_path: Path, safe: bool) -> None:
    encoder = Encoder(f"hf:{write_family(tmp_path / 'clip', 'clip', safe=safe)}", device="cpu")
    before = encoder.encode_texts(["a", "cat"])
    for file in [*(tmp_path / "clip").glob("*.safetensors"), *(tmp_path / "clip").glob("*.bin")]:
        file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(encoder.encode_texts(["a", "cat"]), before)


@pytest.mark.parametrize("kind", ["pointer", "page", "empty"])
def test_weights_of_other_kinds_are_refused_with_the_next_step(tmp_path: Path, kind: str) -> None:
    content, said = OTHER_KINDS[kind]
    file = write_family(tmp_path / "clip", "clip") / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{file}: {said}')}"):
        Encoder(f"hf:{tmp_path / 'clip'}", device="cpu")
