"""Distillation: the loss is the original's, the teacher any model there is, and nothing of it is trained."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_pixels
from torch import Tensor, nn

from cn_clip.errors import CheckpointError, ConfigError, DownloadError, MissingExtraError
from cn_clip.training import building
from cn_clip.training.building import open_teacher
from cn_clip.training.loss import feature_distillation_loss

TEAM = "damo/multi-modal_team-vit-large-patch14_multi-modal-similarity"
RLEG = "damo/multi-modal_rleg-vit-large-patch14"
HUGE = "damo/multi-modal_clip-vit-huge-patch14_zh"


def rows(count: int, width: int, function: Any, factor: float) -> Tensor:
    return function(torch.arange(count * width).float() * factor).view(count, width)


# (rows, teacher's width, student's width), the loss, the student's first three gradients: recorded from the function
# of the same name in cn_clip 1.6.0 (torch 2.13, CPU, float32).
GOLDEN = [
    ((2, 4, 4), 1.118037462234497, [-0.12484042346477509, -0.17785435914993286, -0.11400337517261505]),
    ((3, 6, 4), 1.583703637123108, [-0.0457613579928875, -0.16191455721855164, -0.12733395397663116]),
    ((3, 4, 6), 1.136358380317688, [-0.00312645616941154, -0.02696339413523674, -0.07776372879743576]),
    ((1, 5, 2), 0.3150232434272766, [0.11687790602445602, -0.4369286000728607]),
]


@pytest.mark.parametrize(("shape", "loss", "gradient"), GOLDEN)
def test_loss_and_gradient_are_those_of_the_original(
    shape: tuple[int, int, int], loss: float, gradient: list[float]
) -> None:
    count, teacher_width, student_width = shape
    teacher = rows(count, teacher_width, torch.sin, 0.7)
    student = rows(count, student_width, torch.cos, 1.3).requires_grad_()
    ours = feature_distillation_loss(teacher, student)
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=2e-6)
    assert student.grad is not None
    torch.testing.assert_close(student.grad.flatten()[:3], torch.tensor(gradient), atol=1e-6, rtol=1e-5)


def test_the_loss_worked_by_hand() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert feature_distillation_loss(teacher, 3 * teacher).item() == pytest.approx(0, abs=1e-6)
    assert feature_distillation_loss(teacher, -teacher).item() == pytest.approx(2)
    # Cosines 1 and 0.6.
    assert feature_distillation_loss(teacher, torch.tensor([[5.0, 0.0], [4.0, 3.0]])).item() == pytest.approx(0.2)


def test_half_precision_features_are_compared_in_float32() -> None:
    features = rows(2, 4, torch.sin, 0.7)
    assert feature_distillation_loss(features.half(), features.bfloat16()).dtype == torch.float32


def test_other_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of the teacher, but 3 of the student"):
        feature_distillation_loss(torch.ones(2, 4), torch.ones(3, 4))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": tiny_model().state_dict()}, path)
    return path


def test_the_features_of_a_checkpoint_are_its_picture_features_without_gradient(checkpoint: Path) -> None:
    model = tiny_model()
    pixels = tiny_pixels(model).requires_grad_()
    features = open_teacher(str(checkpoint), "cpu").features(pixels)
    torch.testing.assert_close(features, model.encode_image(pixels.detach()), atol=1e-6, rtol=1e-6)
    assert (features.requires_grad, features.dtype) == (False, torch.float32)


def test_the_teacher_obeys_the_precision_of_its_caller_and_answers_in_float32(checkpoint: Path) -> None:
    teacher, pixels = open_teacher(str(checkpoint), "cpu"), tiny_pixels(tiny_model())
    exact = teacher.features(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = teacher.features(pixels)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0.05)


def test_pixels_of_another_size_are_brought_to_the_teachers(checkpoint: Path) -> None:
    teacher = open_teacher(str(checkpoint), "cpu")
    assert teacher.resolution == 32
    flat = torch.full((1, 3, 64, 64), 0.25)
    expected = teacher.features(torch.full((1, 3, 32, 32), 0.25))
    torch.testing.assert_close(teacher.features(flat), expected, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_teacher_is_trained_and_its_text_tower_is_let_go(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_model = building.open_model
    monkeypatch.setattr(building, "open_model", lambda name: opened.append(open_model(name)) or opened[0])
    open_teacher(str(checkpoint), "cpu")
    ((model, _),) = opened
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(name.startswith("bert.") for name in model.state_dict())


@pytest.mark.parametrize("name", ["no-such-model", "weights/missing.pt", "/nowhere/at/all"])
def test_an_unknown_name_says_which_names_there_are(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"Model {name} not found; available models = \['ViT-B-16'"):
        open_teacher(name, "cpu")


class _Encoder(nn.Module):
    """Stands for the inner model of ModelScope: features are the means of the channels, times two."""

    def __init__(self, method: str, *, in_tuple: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.in_tuple = in_tuple
        setattr(self, method, self._encode)

    def _encode(self, pixels: Tensor) -> Any:
        features = self.weight * pixels.mean(dim=(2, 3))
        return (features, "hidden states") if self.in_tuple else features


class _Model(nn.Module):
    def __init__(self, part: str, encoder: nn.Module) -> None:
        super().__init__()
        setattr(self, part, encoder)


def install_modelscope(monkeypatch: pytest.MonkeyPatch, fetch: Any) -> None:
    models = ModuleType("modelscope.models")
    models.Model = type("Model", (), {"from_pretrained": staticmethod(fetch)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.models", models)


@pytest.mark.parametrize(
    ("name", "part", "encoder"),
    [
        (HUGE, "clip_model", _Encoder("encode_image")),
        (RLEG, "model", _Encoder("encode_image", in_tuple=True)),
        (TEAM, "model", _Encoder("image_model")),
    ],
)
def test_the_models_of_modelscope_are_asked_where_they_encode(
    name: str, part: str, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    model = _Model(part, encoder)
    install_modelscope(monkeypatch, lambda name: (asked.append(name), model)[1])
    teacher = open_teacher(name, "cpu")
    assert asked == [name]
    assert not model.training
    features = teacher.features(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 5, 5))
    assert (features.tolist(), features.requires_grad) == ([[2.0, 4.0, 6.0]], False)


def test_a_modelscope_model_without_a_picture_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install_modelscope(monkeypatch, lambda name: _Model("decoder", _Encoder("generate")))
    with pytest.raises(ConfigError, match=r"damo/text: a _Model has none of clip_model\.encode_image, "):
        open_teacher("damo/text", "cpu")


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (OSError("no\nroute"), DownloadError, "on ModelScope: no route; try again, or give --teacher-model-name"),
        (RuntimeError("Unexpected key(s) in state_dict: x"), CheckpointError, "pip install --upgrade modelscope"),
    ],
)
def test_a_failure_of_modelscope_is_told_in_one_line(
    raised: Exception, expected: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str) -> None:
        raise raised

    install_modelscope(monkeypatch, fetch)
    with pytest.raises(expected) as caught:
        open_teacher(HUGE, "cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_modelscope_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingExtraError, match=r"from ModelScope needs .*pip install 'cn-clip-next\[modelscope\]'"):
        open_teacher(HUGE, "cpu")
