"""Folders of transformers' ChineseCLIPModel give the features that transformers itself computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TOKENS

from cn_clip.clip import Encoder, load_from_name
from cn_clip.clip.loading import open_model
from cn_clip.clip.weights.hf import config_from_folder
from cn_clip.errors import CheckpointError, CnClipError

TEXT_FIELDS: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
VISION_FIELDS: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ChineseCLIPConfig(
        projection_dim=24, text_config=TEXT_FIELDS, vision_config=VISION_FIELDS, logit_scale_init_value=3.5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.ChineseCLIPModel(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("chinese-clip-tiny")
    theirs.save_pretrained(path)
    return path


def features(output: Any) -> torch.Tensor:
    """Older versions return the tensor itself."""
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return tensor


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def test_features_equal_those_of_transformers(folder: Path, theirs: Any) -> None:
    model, transform = load_from_name(str(folder), device="cpu")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        their_images = features(theirs.get_image_features(pixel_values=pixels))
        their_texts = features(theirs.get_text_features(input_ids=TOKENS, attention_mask=TOKENS.ne(0).long()))
        assert their_images.abs().mean() > 0.1
        assert largest_difference(model.encode_image(pixels), their_images) < 1e-5
        assert largest_difference(model.encode_text(TOKENS), their_texts) < 1e-5
    assert transform.resolution == 32
    assert torch.equal(model.logit_scale, theirs.logit_scale)


def test_the_weight_file_alone_uses_the_config_beside_it(folder: Path) -> None:
    from_folder, _ = open_model(folder)
    from_file, _ = open_model(folder / "model.safetensors")
    assert from_file.config == from_folder.config


def test_the_encoder_takes_a_folder(folder: Path, theirs: Any) -> None:
    from PIL import Image

    encoder = Encoder(folder, device="cpu")
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    rows = encoder.encode_images([picture])
    with torch.inference_mode():
        raw = features(theirs.get_image_features(pixel_values=encoder.transform(picture)[None]))
    np.testing.assert_allclose(rows, torch.nn.functional.normalize(raw).numpy(), atol=1e-5)


def test_an_old_folder_with_a_pickled_state_dict_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    # As versions before 4.31 wrote them.
    tensors["text_model.embeddings.position_ids"] = torch.arange(64)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    new, _ = open_model(folder)
    old, _ = open_model(tmp_path)
    assert old.config == new.config
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_heads_and_dropout_come_from_the_config(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 6, "hidden_dropout_prob": 0.25, "hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = config_from_folder(tmp_path)
    assert read.text.text_num_attention_heads == 6
    assert read.text.text_hidden_dropout_prob == 0.25
    assert read.text.text_hidden_act == "relu"
    assert read.vision.vision_head_width == 8


def test_fields_left_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    read, defaults = config_from_folder(tmp_path), transformers.ChineseCLIPConfig()
    text, vision = defaults.text_config, defaults.vision_config
    assert read.vision.embed_dim == defaults.projection_dim
    assert read.vision.image_resolution == vision.image_size
    assert read.vision.vision_patch_size == vision.patch_size
    assert read.vision.vision_width == vision.hidden_size
    assert read.vision.vision_layers == vision.num_hidden_layers
    assert read.vision.vision_head_width == vision.hidden_size // vision.num_attention_heads
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "type_vocab_size"):
        assert getattr(read.text, f"text_{name}") == getattr(text, name)
    for name in ("max_position_embeddings", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        assert getattr(read.text, f"text_{name}") == getattr(text, name)
    assert read.text.vocab_size == text.vocab_size


def test_the_sections_of_old_config_files_are_read(tmp_path: Path) -> None:
    config = {
        "text_config": None,
        "text_config_dict": {"vocab_size": 7, "hidden_size": 24, "num_attention_heads": 2},
        "vision_config": {"patch_size": 16},
        "vision_config_dict": None,
        "projection_dim": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = config_from_folder(tmp_path)
    assert (read.text.vocab_size, read.text.text_hidden_size, read.text.text_num_attention_heads) == (7, 24, 2)
    assert (read.vision.vision_patch_size, read.vision.embed_dim) == (16, 9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a JSON file that can be read"),
        ("[]", "holds a list, expected an object"),
        ('{"vision_config": {"hidden_act": "gelu"}}', "vision_config.hidden_act is 'gelu', expected 'quick_gelu'"),
        ('{"vision_config": {"num_channels": 1}}', "vision_config.num_channels is 1, expected 3"),
        ('{"text_config": {"layer_norm_eps": 1e-5}}', "text_config.layer_norm_eps is 1e-05, expected 1e-12"),
        ('{"vision_config": {"num_attention_heads": 0}}', "not the configuration of a ChineseCLIPModel"),
        ('{"vision_config": {"num_attention_heads": 7}}', "not the configuration of a ChineseCLIPModel"),
        ('{"text_config": {"hidden_size": "wide"}}', "not the configuration of a ChineseCLIPModel"),
        ('{"vision_config": {"image_size": [1, 2]}}', "not the configuration of a ChineseCLIPModel"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        config_from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {said}")


def with_config(folder: Path, target: Path, **sections: dict[str, Any]) -> Path:
    """The folder with other values in some sections of its config.json."""
    config = json.loads((folder / "config.json").read_text())
    for name, fields in sections.items():
        config[name] |= fields
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


GRID = r"position_embedding\.weight is \(17, 40\), but config\.json makes it"


@pytest.mark.parametrize(
    ("section", "fields", "said"),
    [
        ("text_config", {"num_hidden_layers": 3}, "text_config.num_hidden_layers is 3, but the weights have 2"),
        ("vision_config", {"num_hidden_layers": 2**20}, "is 1048576, but the weights have 2"),
        ("vision_config", {"num_hidden_layers": 10**8}, "expected an integer from 1 to 1048576, got 100000000"),
        ("vision_config", {"num_hidden_layers": 0}, "num_hidden_layers: expected an integer from 1"),
        ("vision_config", {"image_size": 64}, rf"{GRID} \(65, 40\)"),
        ("vision_config", {"image_size": 24}, rf"{GRID} \(10, 40\)"),
        ("vision_config", {"image_size": 2**20}, GRID),
        ("vision_config", {"image_size": 2_000_000}, "image_size: expected an integer from 1 to 1048576, got 2000000"),
        ("vision_config", {"image_size": -32}, "image_size: expected an integer"),
        ("vision_config", {"image_size": 4}, "image_size 4 is less than patch_size 8"),
        ("vision_config", {"image_size": True}, "image_size: expected an integer from 1 to 1048576, got True"),
        ("vision_config", {"patch_size": 0}, "patch_size: expected an integer"),
        (
            "vision_config",
            {"patch_size": 2**20, "image_size": 2**20},
            r"patch_embedding\.weight is \(40, 3, 8, 8\), but",
        ),
        ("vision_config", {"num_attention_heads": 0}, "num_attention_heads: expected an integer"),
        ("vision_config", {"num_attention_heads": -1}, "num_attention_heads: expected an integer"),
        ("text_config", {"num_attention_heads": -1}, "num_attention_heads: expected an integer"),
        ("text_config", {"num_attention_heads": 7}, "hidden_size 48 is not a multiple of num_attention_heads 7"),
        ("text_config", {"hidden_size": float("inf")}, "hidden_size: expected an integer from 1 to 1048576, got inf"),
        ("vision_config", {"hidden_size": float("nan")}, "hidden_size: expected an integer from 1 to 1048576, got nan"),
        ("vision_config", {"hidden_size": 10**30}, "hidden_size: expected an integer"),
        ("text_config", {"hidden_size": [[1]] * 10**4}, r"got .{40}…\)"),
        ("text_config", {"hidden_size": 49152}, "has shape"),
        ("text_config", {"hidden_dropout_prob": 10**400}, "hidden_dropout_prob: expected a number from 0 to 1"),
        ("text_config", {"hidden_dropout_prob": None}, "hidden_dropout_prob: expected a number from 0 to 1, got None"),
        ("text_config", {"hidden_act": ["gelu"]}, "hidden_act: expected a word"),
        ("text_config", {"hidden_act": "tanh"}, "text_hidden_act: expected one of"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(
    section: str, fields: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CnClipError, match=said):
        Encoder(with_config(folder, tmp_path, **{section: fields}), device="cpu")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '{"projection_dim": ' + "9" * 5000 + "}"])
def test_json_that_cannot_be_parsed_is_a_sentence(content: str, folder: Path, tmp_path: Path) -> None:
    with_config(folder, tmp_path)
    (tmp_path / "config.json").write_text(content)
    for model in (tmp_path, f"hf:{tmp_path}"):
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            Encoder(model, device="cpu")


@pytest.mark.parametrize("shards", [None, [1], {}, {"a": 1}, {"a": 1, "b": "x"}, "model.safetensors"])
def test_an_index_that_names_no_files_is_refused(shards: Any, folder: Path, tmp_path: Path) -> None:
    (with_config(folder, tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match="weight_map: expected an object from tensors to names of files"):
        Encoder(tmp_path)


@pytest.mark.parametrize("shard", ["..", "", "a\0b", "nowhere.safetensors", "x" * 300])
def test_a_shard_that_is_no_file_is_a_sentence(shard: str, folder: Path, tmp_path: Path) -> None:
    (with_config(folder, tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError):
        Encoder(tmp_path)


def test_the_pictures_of_a_folder_may_be_larger_on_purpose(folder: Path) -> None:
    model, transform = load_from_name(str(folder), device="cpu", input_resolution=48)
    assert (model.resolution, transform.resolution) == (48, 48)
