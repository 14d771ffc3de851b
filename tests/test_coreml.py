"""Core ML export: what a package says of itself, what it computes, and that it appears whole or not at all."""

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from tiny_models import tiny_model, tiny_pixels

from cn_clip import __version__
from cn_clip.clip.model import CLIP
from cn_clip.deploy import coreml_package, pytorch_to_coreml
from cn_clip.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from cn_clip.files import staged_folder

if sys.platform == "win32":
    pytest.skip("coremltools has no wheel for Windows", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from coremltools.models.utils import load_spec
    from mil_programs import evaluate

# coremltools leaves temporary folders to the interpreter's end, and warns of what it reads of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[1]
LENGTH = 12
TOKENS = np.array([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]], dtype=np.int32)
Package = Callable[[str, str, str], tuple[Path, dict[str, Any]]]
FLOAT32, INT32 = 65568, 131104  # MLMultiArrayDataType of Core ML's specification


def write(model: CLIP, kind: Any, path: Path, **settings: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"precision": "fp16", "batch_size": 2, "context_length": LENGTH, **settings}
    return coreml_package.write_package(model, kind, path, **chosen)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Tower, kind, precision -> where its package is, written once, and what writing it returned."""

    @functools.cache
    def written(tower: str, kind: str, precision: str) -> tuple[Path, dict[str, Any]]:
        path = tmp_path_factory.mktemp("package") / "x.mlpackage"
        return path, write(tiny_model(tower), kind, path, precision=precision)

    return written


def inputs_of(model: CLIP, kind: str) -> np.ndarray:
    if kind == "image":
        return tiny_pixels(model, 2).numpy()
    return np.pad(TOKENS, ((0, 0), (0, LENGTH - TOKENS.shape[1])))


def expected_of(model: CLIP, kind: str) -> np.ndarray:
    given = torch.from_numpy(inputs_of(model, kind))
    with torch.no_grad():
        return (model.encode_image(given) if kind == "image" else model.encode_text(given)).numpy()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("tower", "kind"),
    [("vit", "image"), pytest.param("resnet", "image", marks=pytest.mark.long), ("vit", "text")],
)
def test_package_computes_what_the_model_does(tower: str, kind: str, precision: str, package: Package) -> None:
    model = tiny_model(tower)
    path, _ = package(tower, kind, precision)
    # The arithmetic of this check is float32; weights of float16 alone cost a thousandth.
    tolerance = 1e-5 if precision == "fp32" else 3e-3
    found = evaluate(path, inputs_of(model, kind))
    expected = expected_of(model, kind)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    assert np.abs(found - expected).max() > 0 or precision == "fp32"


@pytest.mark.parametrize(("kind", "shape", "type_"), [("image", [2, 3, 32, 32], FLOAT32), ("text", [2, LENGTH], INT32)])
def test_package_names_shapes_and_types_are_those_of_chinese_clip(
    kind: str, shape: list[int], type_: int, package: Package
) -> None:
    path, written = package("vit", kind, "fp16")
    spec = load_spec(str(path))
    (given,), (result,) = spec.description.input, spec.description.output
    assert (given.name, list(given.type.multiArrayType.shape), given.type.multiArrayType.dataType) == (
        kind,
        shape,
        type_,
    )
    assert (result.name, list(result.type.multiArrayType.shape), result.type.multiArrayType.dataType) == (
        f"{kind}_features",
        [2, 24],
        FLOAT32,
    )
    assert spec.specificationVersion == 6  # iOS 15, macOS 12
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    assert written["num_operations"] == sum(operation.type != "const" for operation in block.operations) > 30


def test_package_tells_the_facts_of_the_model(package: Package) -> None:
    model = tiny_model()
    path, _ = package("vit", "text", "fp16")
    description = load_spec(str(path)).description
    facts = json.loads(description.metadata.userDefined["cn_clip"])
    assert facts["writer"] == f"cn_clip {__version__}"
    assert {name: facts[name] for name in ("kind", "embed_dim", "batch", "length", "max_length", "precision")} == {
        "kind": "text",
        "embed_dim": 24,
        "batch": 2,
        "length": LENGTH,
        "max_length": 512,
        "precision": "fp16",
    }
    assert facts["logit_scale"] == pytest.approx(float(model.logit_scale.exp()))
    assert description.metadata.shortDescription == "Chinese-CLIP, text tower: 24 dimensions, fp16"
    assert description.input[0].shortDescription == "Token ids with [CLS] and [SEP], padded with 0 to 12"


def test_fp16_weights_take_half_the_bytes(package: Package) -> None:
    sizes = {}
    for precision in ("fp16", "fp32"):
        path, _ = package("vit", "image", precision)
        sizes[precision] = (path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size
    assert sizes["fp32"] / sizes["fp16"] == pytest.approx(2, rel=0.05)


def test_failed_conversion_leaves_the_earlier_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.mlpackage"
    with staged_folder(path) as folder:
        (folder / "earlier").write_text("kept")

    def fail(self: CLIP, image: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(image[:, 0]).real  # no such operation in Core ML

    monkeypatch.setattr(CLIP, "encode_image", fail)
    with pytest.raises(CheckpointError, match="could not convert the image tower"):
        write(tiny_model(), "image", path)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == [
        "x.mlpackage",
        "x.mlpackage/earlier",
    ]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_a_full_disk_is_not_blamed_on_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(coreml_package, "_save", fail)
    with pytest.raises(DataError) as caught:
        write(tiny_model(), "text", tmp_path / "x.mlpackage")
    assert (
        str(caught.value)
        == "x.mlpackage: cannot be written (No space left on device); make room or choose another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_packages_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = coreml_package.write_package

    def without_pictures(model: CLIP, kind: Any, path: Path, **settings: Any) -> dict[str, Any]:
        if kind == "image":
            raise CheckpointError("no")
        return written(model, kind, path, **settings)

    monkeypatch.setattr(coreml_package, "write_package", without_pictures)
    options = pytorch_to_coreml.Options(
        model_arch="Emoji-Tiny", save_coreml_path=str(tmp_path / "a"), convert_text=True, convert_vision=True, json=True
    )
    with pytest.raises(CheckpointError, match="no"):
        pytorch_to_coreml.run(options)
    assert list(tmp_path.iterdir()) == []


def test_texts_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--context-length 513: this model takes texts of at most 512 tokens"):
        write(tiny_model(), "text", tmp_path / "x.mlpackage", context_length=513)


def test_without_coremltools_the_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingExtraError, match=r"exporting to Core ML needs .* pip install 'cn-clip-next\[coreml\]'"):
        write(tiny_model(), "text", tmp_path / "x.mlpackage")


# --- the command


def command(*args: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "cn_clip" / "deploy" / "pytorch_to_coreml.py"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cn_clip'}"}
    return subprocess.run([warm_python.program(), str(script), *args], env=env, capture_output=True, text=True)


def test_command_writes_both_packages_and_the_lines_of_chinese_clip(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "emoji"
    done = command(
        "--model-arch", "Emoji-Tiny", "--save-coreml-path", str(prefix), "--convert-text", "--convert-vision"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "Params:"
    assert "  precision: fp16" in lines
    assert f"Text model converted to CoreML and saved at: {prefix}.text.mlpackage" in lines
    assert f"Image model converted to CoreML and saved at: {prefix}.image.mlpackage" in lines
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["emoji.image.mlpackage", "emoji.text.mlpackage"]
    text = load_spec(f"{prefix}.text.mlpackage").description.input[0]
    assert list(text.type.multiArrayType.shape) == [1, 52]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_coreml_path": "x", "convert_text": True}, "--model-arch: expected the architecture"),
        ({"model_arch": "RN50", "convert_text": True}, "--save-coreml-path: expected the prefix"),
        ({"model_arch": "RN50", "save_coreml_path": "x"}, "give --convert-text, --convert-vision, or both"),
        (
            {"model_arch": "RN50", "save_coreml_path": "x", "convert_text": True, "batch_size": 0},
            "--batch-size: expected at least 1, got 0",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pytorch_to_coreml.Options(**settings)


def test_architecture_without_published_weights_wants_a_checkpoint(tmp_path: Path) -> None:
    options = pytorch_to_coreml.Options(
        model_arch="ViT-B-32", save_coreml_path=str(tmp_path / "x"), convert_text=True, json=True
    )
    with pytest.raises(ConfigError, match="there are no published weights of it; give --pytorch-ckpt-path"):
        pytorch_to_coreml.run(options)


@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS runs Core ML")
@pytest.mark.parametrize("kind", ["image", "text"])
def test_core_ml_predicts_what_the_model_does(kind: str, tmp_path: Path) -> None:
    import coremltools

    model = tiny_model()
    path = tmp_path / "x.mlpackage"
    write(model, kind, path, precision="fp32")
    package = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    found = package.predict({kind: inputs_of(model, kind)})[f"{kind}_features"]
    np.testing.assert_allclose(found, expected_of(model, kind), atol=1e-4)
