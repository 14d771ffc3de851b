"""From a name or a path to a model: the API that guides of Chinese-CLIP use, as they use it."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CONFIGS, TOKENS, tiny_model, tiny_pixels

import cn_clip.clip as clip
from cn_clip import zoo
from cn_clip.clip import available_models, create_model, image_transform, load_from_name
from cn_clip.clip.loading import open_model
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights import hub
from cn_clip.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"vision_model_name": "RN-Tiny-64", "text_model_name": "BERT-Tiny-chinese"}

# As guides show it for ViT-B-16.
MODEL_INFO = (
    "Model info {'embed_dim': 512, 'image_resolution': 224, 'vision_layers': 12, 'vision_width': 768, "
    "'vision_patch_size': 16, 'vocab_size': 21128, 'text_attention_probs_dropout_prob': 0.1, "
    "'text_hidden_act': 'gelu', 'text_hidden_dropout_prob': 0.1, 'text_hidden_size': 768, "
    "'text_initializer_range': 0.02, 'text_intermediate_size': 3072, 'text_max_position_embeddings': 512, "
    "'text_num_attention_heads': 12, 'text_num_hidden_layers': 12, 'text_type_vocab_size': 2}"
)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned checkpoint of the small named model, with the real vocabulary."""
    path = tmp_path_factory.mktemp("weights") / "epoch_latest.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP.from_config(zoo.model_config(NAMES["vision_model_name"], NAMES["text_model_name"]))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "step": 2, "name": "x", "state_dict": state, "optimizer": {}}, path)
    return path


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    torch.save({"state_dict": tiny_model().state_dict()}, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def test_the_published_models_are_listed_in_the_known_order_and_the_bundled_one_after_them() -> None:
    qa_clip = [f"QA-CLIP-{name}" for name in ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")]
    assert available_models() == ["ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50", *qa_clip, "Emoji-Tiny"]


def test_a_path_with_names_prints_the_lines_of_the_guides(small_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, preprocess = load_from_name(str(small_file), device="cpu", input_resolution=64, **NAMES)
    lines = capsys.readouterr().out.splitlines()
    folder = ROOT / "cn_clip" / "clip" / "model_configs"
    assert lines[:2] == [
        f"Loading vision model config from {folder / 'RN-Tiny-64.json'}",
        f"Loading text model config from {folder / 'BERT-Tiny-chinese.json'}",
    ]
    assert len(lines) == 3
    assert lines[2].startswith("Model info {'embed_dim': ")
    info = ast.literal_eval(lines[2].removeprefix("Model info "))
    vision, text = (json.loads((folder / f"{name}.json").read_text()) for name in NAMES.values())
    assert info == vision | text
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert preprocess(Image.new("L", (9, 5))).shape == (3, 64, 64)


def test_create_model_prints_the_model_info_of_the_guides(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = create_model("ViT-B-16@RoBERTa-wwm-ext-base-chinese")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("/model_configs/ViT-B-16.json")
    assert lines[1].endswith("/model_configs/RoBERTa-wwm-ext-base-chinese.json")
    assert lines[2:] == [MODEL_INFO]
    assert model.resolution == 224


def test_block_counts_are_printed_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        create_model("RN50@RBT3-chinese")
    assert "'vision_layers': [3, 4, 6, 3], 'vision_width': 64, 'vision_patch_size': None," in capsys.readouterr().out


def test_a_path_without_names_gives_the_same_model(small_file: Path) -> None:
    named, _ = load_from_name(str(small_file), device="cpu", input_resolution=64, **NAMES)
    inferred, _ = load_from_name(str(small_file), device="cpu")
    assert inferred.config == named.config
    assert all(torch.equal(a, b) for a, b in zip(inferred.parameters(), named.parameters(), strict=True))


def test_a_path_object_works_as_a_name(tiny_file: Path) -> None:
    assert open_model(tiny_file)[0].resolution == 32


def test_another_resolution_reaches_model_and_preprocessing(tiny_file: Path) -> None:
    model, preprocess = load_from_name(str(tiny_file), device="cpu", input_resolution=48)
    assert model.resolution == 48
    assert preprocess(Image.new("RGB", (10, 10))).shape == (3, 48, 48)


@pytest.mark.parametrize("resolution", [0, 20, -32])
def test_a_resolution_that_is_no_multiple_of_a_patch_is_refused(tiny_file: Path, resolution: int) -> None:
    with pytest.raises(ConfigError, match=rf"input resolution {resolution}: expected a multiple of 8"):
        load_from_name(str(tiny_file), device="cpu", input_resolution=resolution)


def test_an_unknown_name_lists_the_known_ones() -> None:
    expected = (
        r"^Model ViT-B-61 not found; available models = "
        r"\['ViT-B-16', 'ViT-L-14', 'ViT-L-14-336', 'ViT-H-14', 'RN50', 'QA-CLIP-RN50', .*'Emoji-Tiny'\]"
    )
    with pytest.raises(RuntimeError, match=expected):
        load_from_name("ViT-B-61", device="cpu")


def test_an_unknown_architecture_lists_the_known_ones(tiny_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'ViT-X'; expected one of ViT-B-32, ViT-B-16"):
        load_from_name(str(tiny_file), device="cpu", vision_model_name="ViT-X", text_model_name="RBT3-chinese")


def test_a_published_name_is_downloaded_with_its_architecture(
    small_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = zoo.Published("repo", "file.pt", NAMES["vision_model_name"], NAMES["text_model_name"], 64)
    monkeypatch.setitem(zoo.PUBLISHED, "RN50", published)
    asked: list[Any] = []

    def download(entry: zoo.Published, root: Path, *, use_modelscope: bool) -> Path:
        asked.append((entry, Path(root), use_modelscope))
        return small_file

    monkeypatch.setattr(hub, "download", download)
    model, _ = load_from_name("RN50", device="cpu", download_root=str(tmp_path), use_modelscope=True)
    assert asked == [(published, tmp_path, True)]
    assert model.resolution == 64
    assert "RN-Tiny-64.json" in capsys.readouterr().out


def test_create_model_takes_a_checkpoint_or_random_weights(small_file: Path) -> None:
    name = "@".join(NAMES.values())
    checkpoint = torch.load(small_file, weights_only=True)
    first = create_model(name, checkpoint)
    loaded, _ = open_model(small_file)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))
    random = create_model(name)
    assert not random.training
    assert not torch.equal(random.text_projection, first.text_projection)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16@", "@RBT3-chinese", "ViT-B-16@gpt"])
def test_create_model_refuses_what_is_no_pair(name: str) -> None:
    with pytest.raises(ConfigError):
        create_model(name)


def test_create_model_refuses_a_checkpoint_of_another_model(small_file: Path) -> None:
    with pytest.raises(CheckpointError, match="is it another architecture"):
        create_model("RN50@RBT3-chinese", torch.load(small_file, weights_only=True))


def test_the_import_paths_of_guides_lead_to_the_same_functions() -> None:
    from cn_clip.clip import _tokenizer, bert_tokenizer, model, utils

    for name in ("available_models", "create_model", "image_transform", "load", "load_from_name", "tokenize"):
        assert getattr(utils, name) is getattr(clip, name)
    for name in ("CLIP", "convert_weights", "convert_state_dict", "convert_models_to_fp32", "resize_pos_embed"):
        assert callable(getattr(model, name))
    assert clip.convert_state_dict is model.convert_state_dict
    assert isinstance(_tokenizer, bert_tokenizer.FullTokenizer)
    assert _tokenizer.vocab["[CLS]"] == 101
    assert image_transform().resolution == 224


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clip.nothing  # noqa: B018


def test_the_example_of_the_readme_runs(small_file: Path) -> None:
    device = "cpu"
    model, preprocess = load_from_name(str(small_file), device=device, download_root="./")
    model.eval()
    picture = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3))
    image = preprocess(picture).unsqueeze(0).to(device)
    text = clip.tokenize(["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]).to(device)
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        text_features /= text_features.norm(dim=-1, keepdim=True)
        logits_per_image, _ = model.get_similarity(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
        by_hand = (model.logit_scale.exp() * image_features @ text_features.t()).softmax(dim=-1).numpy()
    assert probs.shape == (1, 4)
    assert probs.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(probs, by_hand, atol=1e-6)


def test_the_recipe_for_fine_tuned_checkpoints_runs(small_file: Path, tiny_file: Path) -> None:
    saved_model = torch.load(small_file, map_location=torch.device("cpu"))
    adjusted = {}
    for key in saved_model["state_dict"]:
        new_key = key[7:] if key.startswith("module.") else key
        adjusted[new_key] = saved_model["state_dict"][key]
    other = create_model("@".join(NAMES.values()))
    model, preprocess = other, image_transform(other.resolution)
    assert str(model.load_state_dict(adjusted)) == "<All keys matched successfully>"
    model.eval()
    image = preprocess(Image.new("RGBA", (70, 60), (250, 220, 30, 128))).unsqueeze(0)
    text = clip.tokenize(["杰尼龟", "皮卡丘"])
    with torch.no_grad():
        image_features, text_features, logit_scale = model(image, text)
        expected, _ = model.get_similarity(image, text)
    torch.testing.assert_close(logit_scale * image_features @ text_features.t(), expected)
    assert float(image_features.norm()) == pytest.approx(1, abs=1e-6)


def test_a_dictionary_saved_by_the_model_loads_by_path_without_names(tmp_path: Path) -> None:
    model = tiny_model("resnet", seed=4)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded, _ = load_from_name(str(tmp_path / "state.pt"), device="cpu")
    assert loaded.config == CONFIGS["resnet"]
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_text(TOKENS), model.encode_text(TOKENS))
        torch.testing.assert_close(loaded.encode_image(tiny_pixels(model)), model.encode_image(tiny_pixels(model)))


# --- what importing costs ---------------------------------------------------------------------------------------------

IMPORT_PROBE = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import cn_clip.clip
print(time.perf_counter() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def import_probe() -> tuple[float, set[str]]:
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    seconds, names = answer.stdout.splitlines()
    return float(seconds), set(names.split())


def test_importing_the_package_costs_little_beside_torch() -> None:
    seconds, imported = import_probe()
    heavy = {"tokenizers", "huggingface_hub", "PIL", "tqdm", "safetensors", "lmdb", "opencc", "tyro", "transformers"}
    assert imported & heavy == set()
    assert "cn_clip" in imported
    # Must be at most 0.4 s; about 0.02 s on an idle machine.
    assert min(seconds, import_probe()[0] if seconds > 0.4 else seconds) <= 0.4


LOADING_PROBE = """
import sys
import torch, cn_clip.clip
cn_clip.clip.load_from_name(sys.argv[1], device="cpu")
print(*[name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_loading_a_model_draws_no_random_numbers_and_imports_no_compiler(small_file: Path) -> None:
    before = torch.get_rng_state()
    open_model(small_file)
    assert torch.equal(torch.get_rng_state(), before)
    arguments = [sys.executable, "-c", LOADING_PROBE, str(small_file)]
    answer = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == ""
