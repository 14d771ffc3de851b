"""`cn-clip convert`: one model in every form, the same bits and features in each; and what is refused in one line."""

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import tree
from deterministic import SMALL_MODEL, TEXT_TOWER, TEXTS, picture_bytes, weight
from PIL import Image
from tiny_models import TOKENS, tiny_model

from cn_clip import cli, zoo
from cn_clip.clip import load_from_name, tokenize
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.tokenizer import VOCAB_FILE, encode
from cn_clip.clip.transforms import image_transform
from cn_clip.clip.weights import forms, hf
from cn_clip.clip.weights.checkpoint import read_checkpoint

VITS = [(vision, text) for vision, text in TEXT_TOWER.items() if vision != "RN50"]
VITS.append(("ViT-Tiny-64", "BERT-Tiny-chinese"))
PICTURE = Image.fromarray(picture_bytes(3))
# Where torchvision is installed, transformers 5 resizes with it, a little differently.
PICTURE_TOLERANCE = 0.02 if find_spec("torchvision") else 1e-5
Tensors = dict[str, torch.Tensor]


def deterministic(config: zoo.ModelConfig) -> CLIP:
    with torch.device("meta"):
        model = CLIP.from_config(config)
    tensors = {name: torch.from_numpy(weight(name, tuple(v.shape))) for name, v in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def small() -> CLIP:
    return deterministic(zoo.config_from_info(SMALL_MODEL))


@pytest.fixture
def reference(tmp_path: Path, small: CLIP) -> Path:
    """A training checkpoint of Chinese-CLIP in the types of the published ones, with what older versions left in it."""
    half = deterministic(small.config)
    convert_weights(half)
    state = {f"module.{name}": value for name, value in half.state_dict().items()}
    state["module.bert.pooler.dense.weight"] = torch.ones(64, 64)
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    content = {"epoch": 3, "step": 7, "name": "run", "state_dict": state, "optimizer": optimizer}
    torch.save(content, tmp_path / "run.pt")
    return tmp_path / "run.pt"


def convert(*args: object) -> None:
    cli.main(["convert", *map(str, args)])


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit):
        convert(*args)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        assert torch.equal(found[name], value), name


def features(path: Path) -> torch.Tensor:
    model, transform = load_from_name(str(path), device="cpu")
    with torch.inference_mode():
        return torch.cat([model.encode_image(transform(PICTURE)[None]), model.encode_text(tokenize(TEXTS))])


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What transformers logs as a warning, or Python warns of, while the test runs."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
        found += [str(one.message) for one in caught]
    logger.removeHandler(handler)


# --- bits and features


def test_every_form_holds_the_same_bits_and_gives_the_same_features(reference: Path, tmp_path: Path) -> None:
    original = torch.load(reference, weights_only=True)
    names = [name for name in original["state_dict"] if "pooler" not in name and "position_ids" not in name]
    expected = {name.removeprefix("module."): original["state_dict"][name] for name in names}
    assert {value.dtype for value in expected.values()} == {torch.float16, torch.float32}
    convert(reference, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "sbert", "--to", "sentence-transformers")
    convert(tmp_path / "sbert", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_bits(back["state_dict"], {f"module.{name}": value for name, value in expected.items()})
    assert back.keys() == {"epoch", "step", "name", "state_dict"}
    rows = features(reference)
    assert rows.abs().mean() > 0.1
    for form in ("folder", "model.safetensors", "sbert", "back.pt"):
        read = read_checkpoint(tmp_path / form).state_dict
        assert_same_bits({name: read[name] for name in expected}, expected)
        assert torch.equal(features(tmp_path / form), rows)


@pytest.mark.parametrize(("vision", "text"), VITS)
def test_each_architecture_has_the_names_and_shapes_that_transformers_expects(vision: str, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = zoo.model_config(vision, text)
    fields = hf.fields_of_config(config)
    with torch.device("meta"):
        ours = CLIP.from_config(config).state_dict()
        theirs = transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**fields)).state_dict()
    written = hf.from_reference(ours)
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in theirs.items()}
    back = hf.to_reference(written)
    assert {name: value.shape for name, value in back.items()} == {n: v.shape for n, v in ours.items()}


@pytest.mark.long
@pytest.mark.parametrize(("vision", "text"), VITS)
def test_each_architecture_gives_the_features_of_transformers(vision: str, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    full = zoo.model_config(vision, text)
    text_config = replace(full.text, text_num_hidden_layers=1, vocab_size=40)
    config = zoo.ModelConfig(replace(full.vision, vision_layers=1), text_config)
    config = zoo.at_resolution(config, 2 * int(full.vision.vision_patch_size or 0))
    model = deterministic(config)
    theirs = transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**hf.fields_of_config(config))).eval()
    theirs.load_state_dict(hf.from_reference(model.state_dict()))
    pixels = image_transform(model.resolution)(PICTURE)[None]
    with torch.inference_mode():
        # Not get_text_features: that of 4.57 fails.
        output = theirs(pixel_values=pixels, input_ids=TOKENS, attention_mask=TOKENS.ne(0).long())
        image_BE, text_TE, _ = model(pixels, TOKENS)
    # Sums of thousands of float32 products in another order.
    torch.testing.assert_close(image_BE, output.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_TE, output.text_embeds, atol=1e-5, rtol=0)
    assert_same_bits(
        {name: hf.to_reference(theirs.state_dict())[name] for name in model.state_dict()}, model.state_dict()
    )


# --- what transformers makes of the folder


def test_transformers_opens_the_folder_without_a_warning(
    reference: Path, tmp_path: Path, complaints: list[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    convert(reference, tmp_path / "folder")
    model, report = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    assert model.dtype is torch.float32
    # 4.57 warns of its slow picture processor whatever the folder says.
    slow = {"use_fast": False} if transformers.__version__.startswith("4.") else {}
    processors = [
        kind.from_pretrained(tmp_path / "folder", **slow)
        for kind in (transformers.ChineseCLIPProcessor, transformers.AutoProcessor)
    ]
    inputs = [processor(text=TEXTS, images=PICTURE, padding=True, return_tensors="pt") for processor in processors]
    with torch.inference_mode():
        outputs = [model(**given) for given in inputs]
    assert complaints == []
    rows = torch.cat([outputs[0].image_embeds, outputs[0].text_embeds])
    expected = torch.nn.functional.normalize(features(reference))
    torch.testing.assert_close(rows[1:], expected[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[:1], expected[:1], atol=PICTURE_TOLERANCE, rtol=0)
    assert torch.equal(outputs[0].logits_per_image, outputs[1].logits_per_image)


def test_transformers_treats_pictures_and_texts_as_this_package_does(reference: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(reference, tmp_path / "folder")
    is_four = transformers.__version__.startswith("4.")
    with_pil = transformers.ChineseCLIPImageProcessor if is_four else transformers.ChineseCLIPImageProcessorPil
    pictures = with_pil.from_pretrained(tmp_path / "folder")
    tall = Image.fromarray(picture_bytes(5, height=111, width=37))
    for picture in (PICTURE, tall, tall.convert("L"), tall.resize((32, 32))):
        theirs = np.asarray(pictures(picture, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(theirs, image_transform(32).array(picture), atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    texts = [*TEXTS, "ÉLAN Naïve", "[SEP] 与 [PAD]", "很长" * 60, "a" * 100, "\u2028", "WiFi！（５Ｇ）𠀀"]
    assert tokenizer.model_max_length == 52
    ids = tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
    assert ids == tokenize(texts).tolist()


def test_the_vocabulary_of_the_folder_is_that_of_the_package() -> None:
    vocab = forms.tokenizer_json(21128)["model"]["vocab"]
    lines = VOCAB_FILE.read_text(encoding="utf-8").split("\n")
    assert list(vocab) == lines[:-1]
    assert list(vocab.values()) == list(range(21128))


def test_tokenizers_alone_reads_the_tokenizer_of_the_folder() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(forms.tokenizer_json(21128)))
    assert tokenizer.encode("杰尼龟 Pikachu").ids == encode("杰尼龟 Pikachu")[0]
    pair = tokenizer.encode("猫", "狗")
    assert (pair.tokens, pair.type_ids) == (["[CLS]", "猫", "[SEP]", "狗", "[SEP]"], [0, 0, 0, 1, 1])


@pytest.mark.families
def test_sentence_transformers_opens_the_folder(reference: Path, tmp_path: Path) -> None:
    import sentence_transformers as library

    convert(reference, tmp_path / "sbert", "--to", "sentence-transformers")
    model = library.SentenceTransformer(str(tmp_path / "sbert"), device="cpu")
    assert model.modalities == ["text", "image"]
    rows = np.concatenate([model.encode([PICTURE]), model.encode(TEXTS)])
    expected = torch.nn.functional.normalize(features(reference)).numpy()
    np.testing.assert_allclose(rows[1:], expected[1:], atol=1e-5)
    np.testing.assert_allclose(rows[:1], expected[:1], atol=PICTURE_TOLERANCE)


def test_a_folder_for_sentence_transformers_names_its_modules(reference: Path, tmp_path: Path) -> None:
    convert(reference, tmp_path / "plain")
    convert(reference, tmp_path / "sbert", "--to", "sentence-transformers")
    plain, sbert = tree(tmp_path / "plain"), tree(tmp_path / "sbert")
    assert {name: sbert[name] for name in plain} == plain
    assert sorted(sbert.keys() - plain.keys()) == [
        "1_Normalize/config.json",
        "README.md",
        "config_sentence_transformers.json",
        "modules.json",
        "sentence_bert_config.json",
    ]
    modules = json.loads(sbert["modules.json"])
    assert [(one["idx"], one["path"], one["type"].split(".")[-1]) for one in modules] == [
        (0, "", "Transformer"),
        (1, "1_Normalize", "Normalize"),
    ]


def test_a_folder_for_sentence_transformers_says_what_mteb_reads(reference: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    convert(reference, tmp_path / "sbert", "--to", "sentence-transformers")
    card = ModelCard.load(tmp_path / "sbert" / "README.md").data
    assert (card.language, card.library_name, card.base_model) == ("zh", "sentence-transformers", None)
    facts = json.loads((tmp_path / "sbert" / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert (facts["model_type"], facts["similarity_fn_name"]) == ("SentenceTransformer", "cosine")
    assert facts["prompts"] == {"query": "", "document": ""}
    # Weights under a published name are from there.
    published = zoo.PUBLISHED["ViT-B-16"]
    reference.rename(tmp_path / published.filename)
    convert(tmp_path / published.filename, tmp_path / "sbert", "--to", "sentence-transformers", "--overwrite")
    card = ModelCard.load(tmp_path / "sbert" / "README.md").data
    assert card.base_model == "OFA-Sys/chinese-clip-vit-base-patch16"


def test_a_page_that_somebody_wrote_is_never_replaced(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(reference, tmp_path / "sbert", "--to", "sentence-transformers")
    (tmp_path / "sbert" / "README.md").write_text("mine", encoding="utf-8")
    error = refusal(capsys, reference, tmp_path / "sbert", "--to", "sentence-transformers", "--overwrite")
    assert "holds other things (README.md)" in error


@pytest.mark.families
def test_mteb_knows_the_folder_for_sentence_transformers(reference: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    meta = pytest.importorskip("mteb.models.model_meta").ModelMeta
    convert(reference, tmp_path / "sbert", "--to", "sentence-transformers")
    model = library.SentenceTransformer(str(tmp_path / "sbert"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = meta.from_sentence_transformer_model(model)
    assert (found.max_tokens, found.similarity_fn_name.value) == (52, "cosine")
    assert found.embed_dim == features(reference).shape[1]
    assert model.prompts == {"query": "", "document": ""}


# --- settings


def test_precision_casts_as_the_other_commands_do(reference: Path, tmp_path: Path) -> None:
    convert(reference, tmp_path / "full", "--precision", "fp32")
    convert(tmp_path / "full", tmp_path / "half.pt", "--precision", "fp16")
    full = read_checkpoint(tmp_path / "full").state_dict
    assert {value.dtype for value in full.values()} == {torch.float32}
    before = read_checkpoint(reference).state_dict
    assert_same_bits(read_checkpoint(tmp_path / "half.pt").state_dict, before)


def test_adapters_are_merged(small: CLIP, tmp_path: Path) -> None:
    state = dict(small.state_dict())
    stem = "bert.encoder.layer.1.attention.self.query"
    down, up = torch.full((2, 64), 0.25), torch.full((64, 2), 0.5)
    adapters = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    torch.save({"state_dict": state | adapters, "lora": {"rank": 2, "alpha": 4.0}}, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "folder")
    merged = read_checkpoint(tmp_path / "folder").state_dict
    # alpha / rank * B A = 4 / 2 * (2 * 0.5 * 0.25) in every place
    torch.testing.assert_close(merged.pop(f"{stem}.weight"), state.pop(f"{stem}.weight") + 0.5)
    assert all(torch.equal(merged[name], value) for name, value in state.items())


def test_a_resnet_goes_from_file_to_file(tmp_path: Path) -> None:
    state = tiny_model("resnet").state_dict() | {"logit_bias": torch.tensor(-10.0)}
    torch.save({"epoch": 2, "step": 9, "name": "run", "state_dict": state}, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back.pth")
    assert_same_bits(read_checkpoint(tmp_path / "back.pth").state_dict, tiny_model("resnet").state_dict())


def test_a_name_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert("Emoji-Tiny", tmp_path / "emoji.pt", "--json")
    told = json.loads(capsys.readouterr().out)
    bundled = read_checkpoint(zoo.BUNDLED["Emoji-Tiny"].path).state_dict
    assert told == {
        "source": str(zoo.BUNDLED["Emoji-Tiny"].path),
        "target": str(tmp_path / "emoji.pt"),
        "to": "pt",
        "num_tensors": len(bundled),
        "bytes": (tmp_path / "emoji.pt").stat().st_size,
    }
    written = read_checkpoint(tmp_path / "emoji.pt").state_dict
    assert written.keys() == bundled.keys()
    assert all(torch.equal(written[name], value) for name, value in bundled.items())


def test_what_a_config_says_is_kept_in_a_folder(small: CLIP, tmp_path: Path) -> None:
    torch.save({"state_dict": small.state_dict()}, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 2, "hidden_act": "relu", "hidden_dropout_prob": 0.25}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "first", tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == config


# --- places


def test_overwrite_replaces_a_folder_of_either_form_and_a_file(reference: Path, tmp_path: Path) -> None:
    convert(reference, tmp_path / "folder", "--to", "sentence-transformers")
    convert(reference, tmp_path / "folder", "--overwrite")
    assert not (tmp_path / "folder" / "modules.json").exists()
    (tmp_path / "model.safetensors").write_bytes(b"earlier")
    convert(reference, tmp_path / "model.safetensors", "--overwrite")
    assert len(read_checkpoint(tmp_path / "model.safetensors").state_dict) > 50
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["missing.pt", "out"], "Model missing.pt not found"),
        (["bad.pt", "out"], "bad.pt: is text, not weights; give the weight file"),
        (["run.pt", "out.bin"], "TARGET out.bin: .bin tells no form; give --to, or a name in .pt or .safetensors"),
        (["run.pt", "out.pt", "--to", "safetensors"], "--to safetensors does not go with a name in .pt"),
        (["run.pt", ""], "TARGET: expected a path, got an empty one"),
        (["run.pt", "there.pt"], "there.pt: exists; give --overwrite or choose another TARGET"),
        (["run.pt", "there.pt", "--to", "transformers"], "does not go with a name in .pt"),
        (["run.pt", "file"], "file: is a file; expected the name of a folder"),
        (["run.pt", "full", "--overwrite"], "full: holds other things (photo.png); choose a new folder"),
        (["run.pt", "full", "--to", "pt"], "full: is a folder; expected the path of a file to write"),
        (["run.pt", "run.pt", "--overwrite"], "TARGET run.pt: would overwrite run.pt, which it reads"),
        (["folder", "folder", "--overwrite"], "TARGET folder: would overwrite folder, which it reads"),
        (["folder/model.safetensors", "folder", "--overwrite"], "TARGET folder: holds folder/model.safetensors"),
        (
            ["folder", "folder/model.safetensors", "--overwrite"],
            "TARGET folder/model.safetensors: is inside folder, which",
        ),
        (["folder", "folder/model.pt"], "TARGET folder/model.pt: is inside folder, which is read"),
        (["folder", "folder/new"], "TARGET folder/new: is inside folder, which is read"),
        (["folder/model.safetensors", "./folder/config.json", "--to", "pt", "--overwrite"], "config.json, which"),
        (["run.pt", "deep", "--overwrite"], "deep: holds other things (1_Normalize/photo.png); choose a new folder"),
        (["odd", "out.pt"], "odd: image_resolution is 36, which a file of weights cannot say"),
        (["x" * 300, "out"], "Model xxx"),
        (["run.pt", "x" * 300], "cannot be written (File name too long)"),
        (["run.pt", "x" * 300 + ".pt"], "cannot be written (File name too long)"),
        (["run.pt", "x" * 300 + ".bin"], "tells no form"),
        (["hf:run", "out"], "hf:run: only Chinese-CLIP is taken here"),
        (["run.pt", "nowhere/out.pt"], "the folder nowhere does not exist"),
        (["resnet.pt", "out"], "resnet.pt: the picture tower is a ResNet, but ChineseCLIPModel of transformers"),
        (["words.pt", "out"], "words.pt: the text tower knows 40 words, but this package's vocabulary has 21128"),
        (["heads", "out.pt"], "heads: text_num_attention_heads is 2, which a file of weights cannot say"),
        (["lacking.pt", "out"], "lacking.pt: the tensor text_projection is missing"),
        (["openai.pt", "out"], "openai.pt: no Chinese text tower"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_changes_nothing(
    args: list[str],
    reason: str,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.pt").write_bytes(b"no checkpoint")
    Path("there.pt").write_bytes(b"earlier")
    Path("file").write_bytes(b"earlier")
    Path("full").mkdir()
    Path("full/photo.png").write_bytes(b"mine")
    Path("deep/1_Normalize").mkdir(parents=True)
    Path("deep/1_Normalize/photo.png").write_bytes(b"mine")
    torch.save({"state_dict": tiny_model("resnet").state_dict()}, "resnet.pt")
    torch.save({"state_dict": tiny_model("vit").state_dict()}, "words.pt")
    state = read_checkpoint(reference).state_dict
    torch.save({name: value for name, value in state.items() if name != "text_projection"}, "lacking.pt")
    torch.save({name: value for name, value in state.items() if name.startswith("visual.")}, "openai.pt")
    for name in ("folder", "heads", "odd"):
        forms.write_transformers(made(name), state, zoo.config_from_info(SMALL_MODEL))
    changed("heads", "text_config", num_attention_heads=2)
    changed("odd", "vision_config", image_size=36)
    Path("odd/preprocessor_config.json").unlink()
    before = tree(tmp_path)
    assert reason in refusal(capsys, *args)
    assert tree(tmp_path) == before


def made(name: str) -> Path:
    Path(name).mkdir()
    return Path(name)


def changed(folder: str, section: str, **fields: object) -> None:
    config = json.loads(Path(folder, "config.json").read_text())
    config[section] |= fields
    Path(folder, "config.json").write_text(json.dumps(config))


def test_a_disk_that_is_full_leaves_the_earlier_folder(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(reference, tmp_path / "folder")
    before = tree(tmp_path)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forms.shutil, "copyfile", full)
    error = refusal(capsys, reference, tmp_path / "folder", "--overwrite", "--precision", "fp32")
    assert "folder: cannot be written (No space left on device)" in error
    assert tree(tmp_path) == before
