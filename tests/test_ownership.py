"""What has been loaded stays what it was, whatever happens to its file or to whoever shares its tensors."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import SPELLINGS, State, fused, prefixed, save_plain, state_of, training_file
from tiny_models import CONFIGS, TOKENS, tiny_model, tiny_pixels

from cn_clip.clip import create_model
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.loading import load, open_model
from cn_clip.clip.weights.checkpoint import read_checkpoint


def is_mapped(path: Path) -> bool:
    """Whether this process has the file in its memory."""
    return str(path) in Path("/proc/self/maps").read_text()


def damage(path: Path) -> None:
    """What `cp` over it, a full disk or a killed download leave behind: the same file, cut off and of other bytes."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        file.write_bytes(bytes(64))


def half(state: State) -> State:
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


FILES: dict[str, Callable[[Path, State], None]] = {
    **SPELLINGS,
    "half.pt": lambda path, state: training_file(path, prefixed(half(state))),
    "half.safetensors": lambda path, state: save_file(half(state), path),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("name", FILES)
def test_a_model_keeps_its_weights_when_its_file_is_cut_off(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    FILES[name](path, state_of())
    model, checkpoint = open_model(path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not is_mapped(path)
    damage(path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.isfinite(value).all() for value in checkpoint.state_dict.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("name", FILES)
def test_what_is_read_from_a_file_does_not_lie_in_it(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name, state_of())
    checkpoint = read_checkpoint(tmp_path / name)
    assert checkpoint.state_dict
    assert not is_mapped(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_a_model_is_saved_over_the_file_it_came_from(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    FILES[name](path, state_of())
    model, _ = open_model(path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    target = path / "model.safetensors" if path.is_dir() else path
    if target.suffix == ".safetensors":
        save_file(model.state_dict(), target)
        saved = load_file(target)
    else:
        torch.save({"state_dict": model.state_dict()}, target)
        saved = torch.load(target, weights_only=True)["state_dict"]
    assert saved.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in saved.items())


@pytest.mark.parametrize("towers", [("visual.",), ("bert.",), ("visual.", "bert.")])
def test_no_two_weights_of_a_model_share_memory_when_those_of_its_file_do(
    tmp_path: Path, towers: tuple[str, ...]
) -> None:
    save_plain(tmp_path / "fused.pt", fused(state_of(), *towers))
    model, _ = open_model(tmp_path / "fused.pt")
    save_file(model.state_dict(), tmp_path / "apart.safetensors")  # refuses tensors that share memory
    assert read_checkpoint(tmp_path / "apart.safetensors").state_dict.keys() == state_of().keys()


# --- tensors that a caller has


def stepped(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_models_of_one_dictionary_are_independent(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    content = {
        "state_dict": {key: v.to(dtype) if v.is_floating_point() else v for key, v in prefixed(state_of()).items()}
    }
    before = {key: value.clone() for key, value in content["state_dict"].items()}
    monkeypatch.setattr("cn_clip.clip.loading.zoo.model_config", lambda *_: CONFIGS["vit"])
    teacher, student = (create_model("ViT-B-16@RBT3-chinese", content) for _ in range(2))
    stepped(student)
    assert all(torch.equal(value, before[key]) for key, value in content["state_dict"].items())
    expected = {key.removeprefix("module."): value.float() for key, value in before.items()}
    assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())


def test_a_model_initialised_from_a_file_keeps_its_weights_when_that_is_cut_off(tmp_path: Path) -> None:
    save_plain(tmp_path / "both.pt", state_of())
    model = load(tiny_model(seed=1), "cpu", clip_path=tmp_path / "both.pt", bert_path=tmp_path / "both.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    damage(tmp_path / "both.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("is_training", [True, False])
def test_an_encoder_over_a_model_leaves_it_as_it_is(precision: str, is_training: bool) -> None:
    model = tiny_model().train(is_training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = tiny_pixels(model).numpy()
    Encoder(model, precision=precision).backend.encode_pixels(pixels)
    assert model.training is is_training
    assert all(module.training is is_training for module in model.modules())
    for key, value in model.state_dict().items():
        assert value.dtype is before[key].dtype
        assert torch.equal(value, before[key])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_encoder_of_a_model_follows_its_training() -> None:
    model = tiny_model()
    encoder = Encoder(model)
    stepped(model)
    with torch.inference_mode():
        features = model.encode_text(TOKENS)
        expected = features / features.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(encoder.backend.encode_tokens(TOKENS.numpy()), expected.numpy(), rtol=0, atol=1e-6)
