"""Prefixes of what the deployment commands write: refused before any work when nothing can be written there."""

from pathlib import Path
from typing import Any

import pytest

from cn_clip.deploy import onnx_to_tensorrt, pytorch_to_coreml, pytorch_to_onnx
from cn_clip.deploy.model_arch import check_targets
from cn_clip.errors import ConfigError

COMMANDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "onnx": (pytorch_to_onnx, {"convert_vision": True}, "a.img.fp16.onnx"),
    "coreml": (pytorch_to_coreml, {"convert_vision": True}, "a.image.mlpackage"),
    "tensorrt": (
        onnx_to_tensorrt,
        {"convert_vision": True, "vision_onnx_path": "x", "fp16": True},
        "a.img.fp16.trt",
    ),
}
BOTH = pytest.mark.parametrize("name", COMMANDS)


def refusal(name: str, prefix: str) -> str:
    module, settings, _ = COMMANDS[name]
    with pytest.raises(ConfigError) as caught:
        module.run(module.Options(model_arch="ViT-H-14", json=True, **settings, **{f"save_{name}_path": prefix}))
    return str(caught.value)


@BOTH
@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("", "expected a prefix such as out/vit-b-16, got ''"),
        ("out/", "ends like a folder; give a prefix in it, such as out/vit-b-16"),
        ("folder", "is a folder; give a prefix in it, such as folder/vit-b-16"),
        (".", "is a folder; give a prefix in it, such as vit-b-16"),
        ("file/a", "cannot be written (Not a directory); choose another folder"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, prefix: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    assert refusal(name, prefix) == f"--save-{name}-path {prefix}: {reason}".replace("  ", " ").replace(" : ", ": ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@BOTH
def test_a_target_of_another_kind_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    target = Path(COMMANDS[name][2])
    if name == "coreml":
        target.touch()
        assert refusal(name, "a") == "--save-coreml-path a: a.image.mlpackage is a file; choose another prefix"
    else:
        target.mkdir()
        assert refusal(name, "a") == f"--save-{name}-path a: {target} is a folder; choose another prefix"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_prefix_in_a_folder_that_is_not_there_yet_is_good(tmp_path: Path) -> None:
    check_targets("--x", tmp_path / "new" / "deep" / "a", [tmp_path / "new" / "deep" / "a.onnx"])
    assert list(tmp_path.iterdir()) == []
