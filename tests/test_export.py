"""Models exported to ONNX compute what PyTorch computes, in every form, batch and length; the command that does it."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from dataset_files import jsonl_line, picture, tsv_line, write_split
from deterministic import TEXT_TOWER
from numpy.typing import NDArray
from tiny_models import tiny_model

from cn_clip import cli, zoo
from cn_clip.clip import Encoder
from cn_clip.clip.backends import derived, export, onnx_files, parity
from cn_clip.clip.backends.base import ExportedBackend, unit_rows
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.backends.open_vino import OpenVinoTower
from cn_clip.clip.backends.parity import Reference
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.model import CLIP
from cn_clip.deploy import pytorch_to_onnx
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.preprocess import build_lmdb_dataset

KINDS: tuple[Kind, ...] = ("image", "text")
OPENERS: dict[str, Any] = {"onnx": functools.partial(OnnxTower, device="cpu"), "openvino": OpenVinoTower}
SMALL_HEAD = 8


def small(name: str) -> CLIP:
    """The architecture `name` with its patches, head counts and kinds of blocks, but two blocks of narrow heads."""
    vision, text = zoo.vision_config(name), zoo.text_config(TEXT_TOWER[name])
    if isinstance(vision.vision_layers, int):
        heads = vision.vision_width // vision.vision_head_width
        vision = replace(vision, vision_layers=2, vision_width=heads * SMALL_HEAD, vision_head_width=SMALL_HEAD)
    else:
        vision = replace(vision, vision_layers=(1, 2, 1, 1), vision_width=8, vision_head_width=SMALL_HEAD)
    width = text.text_num_attention_heads * SMALL_HEAD
    text = replace(
        text, vocab_size=99, text_num_hidden_layers=2, text_hidden_size=width, text_intermediate_size=2 * width
    )
    return randomised(CLIP.from_config(zoo.ModelConfig(vision, text)))


def randomised(model: CLIP) -> CLIP:
    """With every bias and statistic off its initial value."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.data += torch.rand(buffer.shape, generator=generator)
    return model.eval()


def pixels(model: CLIP, count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 3, model.resolution, model.resolution), dtype=np.float32)


def token_ids(model: CLIP, count: int, length: int) -> NDArray[np.int64]:
    """Rows of falling lengths, padded with 0."""
    rng = np.random.default_rng(length)
    ids = rng.integers(1, model.config.text.vocab_size, (count, length))
    ids[np.arange(length) >= length - 2 * np.arange(count)[:, None]] = 0
    return ids


def reference(model: CLIP, *kinds: Kind) -> Reference:
    backend = TorchBackend(model)
    inputs: dict[Kind, Any] = {"image": pixels(model, 3), "text": token_ids(model, 3, 12)}
    rows = {"image": backend.encode_pixels, "text": backend.encode_tokens}
    return Reference({kind: inputs[kind] for kind in kinds}, {kind: rows[kind](inputs[kind]) for kind in kinds})


def smallest_cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float((unit_rows(one) * unit_rows(other)).sum(axis=1).min())


def props(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads({one.key: one.value for one in onnx.load(path).metadata_props}["cn_clip"])
    return values


# --- every architecture


@pytest.mark.parametrize(
    "name",
    # Convolutions and one transformer; others have more or wider blocks of it, and ViT-L-14-336 those of ViT-L-14.
    [
        pytest.param(name, marks=() if name in ("RN50", "ViT-B-16") else pytest.mark.slow)
        for name in TEXT_TOWER
        if name != "ViT-L-14-336"
    ],
)
def test_picture_towers_equal_pytorch_at_any_batch_size(tmp_path: Path, name: str) -> None:
    model = small(name)
    expected = reference(model, "image")
    base, half = tmp_path / "m.img.fp32.onnx", tmp_path / "m.img.fp16.onnx"
    assert export.export_tower(model, "image", base, expected).smallest > 0.99999
    assert 0.999 < derived.derive(base, "image", "fp16", half, expected).smallest <= 1
    assert half.stat().st_size + onnx_files.extra_path(half).stat().st_size < 0.6 * base.stat().st_size
    backend = TorchBackend(model)
    for opener in OPENERS.values() if name in ("ViT-B-16", "RN50") else [OPENERS["onnx"]]:
        tower = opener(base, "image")
        assert (tower.facts.batch, tower.facts.resolution) == (None, model.resolution)
        for count in (1, 3):
            inputs = pixels(model, count)
            np.testing.assert_allclose(unit_rows(tower.run(inputs)), backend.encode_pixels(inputs), atol=2e-5)


# Base and large; RBT3 is a base of three layers.
@pytest.mark.parametrize("name", ["ViT-B-16", pytest.param("ViT-H-14", marks=pytest.mark.slow)])
def test_text_towers_equal_pytorch_at_any_batch_size_and_length(tmp_path: Path, name: str) -> None:
    model = small(name)
    expected = reference(model, "text")
    base, half = tmp_path / "m.txt.fp32.onnx", tmp_path / "m.txt.fp16.onnx"
    assert export.export_tower(model, "text", base, expected).smallest > 0.99999
    assert 0.999 < derived.derive(base, "text", "fp16", half, expected).smallest < 1
    backend = TorchBackend(model)
    towers = [opener(base, "text") for opener in OPENERS.values()]
    for count, length in ((1, 5), (3, 52), (3, 77), (1, 512)):
        inputs = token_ids(model, count, length)
        rows = backend.encode_tokens(inputs)
        for tower in towers:
            np.testing.assert_allclose(unit_rows(tower.run(inputs)), rows, atol=2e-5)
        # A mask turned into minus infinity, or padding that is seen, would show where there is much of it.
        assert smallest_cosine(OnnxTower(half, "text").run(inputs), rows) > 0.999
    with pytest.raises(ConfigError, match="takes texts of at most 512 tokens, got 513"):
        ExportedBackend(None, towers[0]).encode_tokens(np.ones((1, 513), np.int64))


# --- forms


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A picture tower one of whose products has an input that a step of 1/255 of the range does not resolve."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = tiny_model("vit")
    block = model.visual.transformer.resblocks[0]  # type: ignore[union-attr]
    block.mlp.c_fc.bias.data[3] = 2000  # type: ignore[union-attr]
    block.mlp.c_proj.weight.data[:, 3] *= 1e-3  # type: ignore[union-attr]
    expected = reference(model, "image", "text")
    path = tmp_path_factory.mktemp("outlier") / "m.img.fp32.onnx"
    export.export_tower(model, "image", path, expected)
    return path, expected


@pytest.mark.parametrize("form", ["int8", "int8.openvino"])
def test_the_product_that_loses_most_is_left_out_of_int8(
    tmp_path: Path, outlier: tuple[Path, Reference], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expected = outlier
    losses = derived.product_losses(base, "image", expected, tmp_path / "watched.onnx")
    worst = max(losses, key=lambda name: losses[name])
    assert losses[worst] > 10 * sorted(losses.values())[-2]
    monkeypatch.setattr(derived, "TARGET", -1)
    everything = derived.derive(base, "image", form, tmp_path / "all.onnx", expected, tolerance=-1)
    assert everything.left_out == ()
    monkeypatch.setattr(derived, "TARGET", (1 + everything.smallest) / 2)
    report = derived.derive(base, "image", form, tmp_path / "m.onnx", expected)
    assert report.left_out == (worst,)
    assert [path.name for path in base.parent.iterdir()] == ["m.img.fp32.onnx"]
    assert everything.smallest < report.smallest
    assert report.share is not None
    assert everything.share is not None
    assert report.share.num_int8 == everything.share.num_int8 - 1
    assert (props(tmp_path / "m.onnx")["left_out"], props(tmp_path / "m.onnx")["precision"]) == ([worst], "int8")
    assert parity.open_form(tmp_path / "m.onnx", "image", form).facts.left_out == (worst,)


@pytest.mark.parametrize("form", ["int8", "int8.openvino"])
def test_int8_models_too_large_for_one_file_keep_their_weights_outside(
    tmp_path: Path, outlier: tuple[Path, Reference], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expected = outlier
    monkeypatch.setattr(onnx_files, "LARGEST_FILE", 10_000)
    path = tmp_path / "m.onnx"
    assert derived.derive(base, "image", form, path, expected, tolerance=0.9).smallest > 0.9
    assert onnx_files.outside_files(path) == ["m.onnx.extra_file"]


def test_a_report_says_how_much_became_int8(tmp_path: Path, outlier: tuple[Path, Reference]) -> None:
    base, expected = outlier
    report = derived.derive(base, "image", "int8", tmp_path / "m.onnx", expected, tolerance=0.9)
    model = onnx.load(tmp_path / "m.onnx")
    in_int8 = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    others = sum(node.op_type in ("MatMul", "Gemm", "Conv") for node in onnx.load(base).graph.node)
    assert report.share is not None
    assert report.share.num_int8 == in_int8 > 0
    assert in_int8 < report.share.num_products <= others
    assert f"{in_int8} of {report.share.num_products} products in int8" in str(report)
    facts = props(tmp_path / "m.onnx")
    assert (facts["num_int8"], facts["num_products"]) == (in_int8, report.share.num_products)
    assert facts["levels"] in derived.LEVELS


def test_a_picture_tower_of_convolutions_is_said_to_gain_little_from_int8(tmp_path: Path) -> None:
    model = tiny_model("resnet")
    expected = reference(model, "image")
    base = tmp_path / "m.img.fp32.onnx"
    export.export_tower(model, "image", base, expected)
    found = derived.share(base, ())
    assert found.work < 0.2
    assert str(parity.Share(3, 37, 0.12)) == (
        "3 of 37 products in int8, 12 % of the work: most of it stays float32, so little is gained"
    )
    assert str(parity.Share(36, 37, 0.5)) == "36 of 37 products in int8"


def test_an_int8_file_that_is_too_far_off_is_an_error(tmp_path: Path, outlier: tuple[Path, Reference]) -> None:
    base, expected = outlier
    with pytest.raises(
        CheckpointError, match=r"m.onnx: differs from float32 by more than int8 may: smallest cosine 0.9"
    ):
        derived.derive(base, "image", "int8", tmp_path / "m.onnx", expected, tolerance=1)


def test_int8_weights_keep_the_scale_of_each_column() -> None:
    weight = np.array([[127.0, -2.0, 0.0], [-50.4, 0.5, 0.0]], dtype=np.float32)
    values, scale = derived.rounded(weight, 127)
    assert values.tolist() == [[127, -127, 0], [-50, 32, 0]]  # 0.5 / (2 / 127) = 31.75
    np.testing.assert_allclose(scale, [1, 2 / 127, 1], rtol=1e-6)
    assert derived.rounded(weight, 63)[0].tolist() == [[63, -63, 0], [-25, 16, 0]]


def test_the_loss_of_a_product_is_the_share_of_its_energy() -> None:
    exact = np.array([[0, 255.0], [3, 4]], dtype=np.float32)  # whole steps from 0 to 255
    weight = np.array([[127.0, 0], [0, 127]], dtype=np.float32)
    assert derived.loss(exact, weight) == 0
    off = np.array([[255.0, 0.4]], dtype=np.float32)  # 0.4 is rounded away
    assert derived.loss(off, weight) == pytest.approx(0.16 / (255**2 + 0.16))


def test_half_precision_keeps_float32_ends_and_normalisation(tmp_path: Path, outlier: tuple[Path, Reference]) -> None:
    base, expected = outlier
    path = tmp_path / "m.img.fp16.onnx"
    derived.derive(base, "image", "fp16", path, expected)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {one.data_type for one in model.graph.initializer} == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    ends = [*model.graph.input, *model.graph.output]
    assert [end.type.tensor_type.elem_type for end in ends] == [onnx.TensorProto.FLOAT] * 2
    made_by = {name: node for node in model.graph.node for name in node.output}
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert norms
    for node in norms:
        assert {(made_by[name].op_type, made_by[name].attribute[0].i) for name in node.input} == {("Cast", 1)}
    assert onnx_files.outside_files(path) == ["m.img.fp16.onnx.extra_file"]
    assert props(path)["precision"] == "fp16"


def test_weights_too_large_for_float16_are_an_error(tmp_path: Path, outlier: tuple[Path, Reference]) -> None:
    base, expected = outlier
    model = onnx.load(base)
    projection = next(one for one in model.graph.initializer if one.name.endswith("visual.proj"))
    values = onnx.numpy_helper.to_array(projection).copy()
    values[0, 0] = 70000
    projection.CopyFrom(onnx.numpy_helper.from_array(values, projection.name))
    onnx.save(model, tmp_path / "m.img.fp32.onnx")
    with pytest.raises(CheckpointError, match=r"visual.proj holds values too large for float16; use fp32"):
        derived.derive(tmp_path / "m.img.fp32.onnx", "image", "fp16", tmp_path / "m.img.fp16.onnx", expected)


def test_an_unknown_form_is_refused(tmp_path: Path, outlier: tuple[Path, Reference]) -> None:
    base, expected = outlier
    with pytest.raises(ConfigError, match=r"form: expected fp16, int8 or int8.openvino, got 'int4'"):
        derived.derive(base, "image", "int4", tmp_path / "m.onnx", expected)


# --- what a report says


def test_a_report_counts_cosines_and_pictures_with_the_same_best_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = np.float32([[0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]])
    monkeypatch.setattr(parity, "open_form", lambda *_: None)
    monkeypatch.setattr(parity, "rows_of", lambda *_: turned)
    texts = np.float32([[0, 1, 0], [0.6, 0.8, 0], [0, 0, 1]])
    expected = Reference({}, {"image": np.eye(3, dtype=np.float32), "text": texts})
    report = parity.compare(expected, tmp_path / "m.onnx", "image", "int8", tolerance=0.5)
    assert report.smallest == pytest.approx(0.8)
    assert report.mean == pytest.approx((0.8 + 1 + 1) / 3)
    # Captions best for the pictures: 1, 0, 2 in float32; scores of the turned first one are 0.6, 0.96, 0: still 1.
    assert report.agreement == 1
    turned[0] = [0.6, 0.8, 0]
    turned[1] = [0.8, 0.6, 0]  # 0.6 and 0.96: no longer 0
    report = parity.compare(expected, tmp_path / "m.onnx", "image", "int8", tolerance=0.5)
    assert report.agreement == pytest.approx(2 / 3)
    assert str(report) == ("m.onnx: cosine to float32: min 0.600000, mean 0.733333, same top-1 66.7 % (3 samples)")
    alone = Reference({}, {"image": np.eye(3, dtype=np.float32)})
    assert parity.compare(alone, tmp_path / "m.onnx", "image", "int8", tolerance=0).agreement is None


@pytest.mark.parametrize("bad", [np.nan, 0.98])
def test_rows_that_are_no_numbers_or_too_far_off_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    rows = np.eye(3, dtype=np.float32)
    monkeypatch.setattr(parity, "open_form", lambda *_: None)
    monkeypatch.setattr(parity, "rows_of", lambda *_: rows * np.float32([[1], [bad], [1]]))
    with pytest.raises(
        CheckpointError, match=r"m.onnx: differs from float32 by more than int8 may: .*tolerance 0.99; use a"
    ):
        parity.compare(Reference({}, {"image": rows}), tmp_path / "m.onnx", "image", "int8")


def test_the_embedded_samples_differ_and_keep_to_the_context_length() -> None:
    samples = parity.embedded_samples(context_length=6)
    assert len(samples.pictures) == len(set(samples.captions)) == 32
    ids = samples.inputs("text", 0)
    assert ids.shape == (32, 6)
    assert samples.inputs("image", 20).shape == (32, 3, 20, 20)


# --- the command


def call(*arguments: object) -> None:
    cli.main(["export", "onnx", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit):
        call(*arguments)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the smallest named towers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # Not the small pair of shortcuts.py: of --model-arch, the size of the picture tower is that of its name.
        towers = zoo.ModelConfig(zoo.vision_config("ViT-Tiny-64"), zoo.text_config("BERT-Tiny-chinese"))
        model = randomised(CLIP.from_config(towers))
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(model.state_dict(), path)
    return path


def test_the_command_writes_both_towers_in_every_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "out" / "tiny"
    forms = ("fp32", "fp16", "int8", "int8-openvino")
    call(
        "--model-arch",
        "Emoji-Tiny",
        "--save-onnx-path",
        prefix,
        "--convert-text",
        "--convert-vision",
        "--precisions",
        *forms,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Params:"
    assert "  context_length: 52" in lines
    assert lines[-9:] == [
        "Finished PyTorch to ONNX conversion...",
        f">>> The text FP32 ONNX model is saved at {prefix}.txt.fp32.onnx",
        f">>> The text FP16 ONNX model is saved at {prefix}.txt.fp16.onnx with extra file "
        f"{prefix}.txt.fp16.onnx.extra_file",
        f">>> The text INT8 ONNX model is saved at {prefix}.txt.int8.onnx",
        f">>> The text INT8 OpenVINO ONNX model is saved at {prefix}.txt.int8.openvino.onnx",
        f">>> The vision FP32 ONNX model is saved at {prefix}.img.fp32.onnx",
        f">>> The vision FP16 ONNX model is saved at {prefix}.img.fp16.onnx with extra file "
        f"{prefix}.img.fp16.onnx.extra_file",
        f">>> The vision INT8 ONNX model is saved at {prefix}.img.int8.onnx",
        f">>> The vision INT8 OpenVINO ONNX model is saved at {prefix}.img.int8.openvino.onnx",
    ]
    reports = [line for line in lines if "cosine to float32: min 0.9" in line or "cosine to float32: min 1.0" in line]
    assert len(reports) == 8
    assert all("(32 samples" in line and "same top-1 " in line for line in reports)
    assert len(list(prefix.parent.iterdir())) == 10  # eight files and two of outside weights
    exact = Encoder("Emoji-Tiny", device="cpu")
    texts = ["小狗", "红苹果"]
    for backend, precision in (("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("openvino", "int8")):
        encoder = Encoder(prefix, backend=backend, precision=precision)  # type: ignore[arg-type]
        assert smallest_cosine(encoder.encode_texts(texts), exact.encode_texts(texts)) > 0.99
    for path in prefix.parent.glob("*.onnx"):
        facts = props(path)
        assert facts["writer"].startswith("cn_clip 2.")
        assert facts["architecture"] == "RN-Small-64@BERT-Tiny-chinese"
        assert facts["logit_scale"] == pytest.approx(exact.facts.logit_scale)
        assert facts["precision"] == path.name.split(".")[2]
        assert facts["max_length"] == (52 if ".txt." in path.name else None)
        assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()


def test_one_tower_compared_on_a_split_of_ones_own_is_one_json_object(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [tsv_line(number, picture((40 * number, 99, 255 - 40 * number))) for number in range(1, 5)]
    texts = [jsonl_line(number, text, [number]) for number, text in enumerate(["红色", "绿色的布", "蓝色", "白"], 1)]
    write_split(tmp_path / "data", images, texts, split="valid")
    build_lmdb_dataset.main(["--data_dir", str(tmp_path / "data"), "--splits", "valid"])
    capsys.readouterr()
    call(
        *("--model-arch", "ViT-Tiny-64", "--pytorch-ckpt-path", checkpoint, "--save-onnx-path", tmp_path / "out" / "a"),
        *("--convert-text", "--precisions", "fp16", "--check-data", tmp_path / "data" / "lmdb" / "valid", "--json"),
        *("--context-length", "30"),
    )
    result = json.loads(capsys.readouterr().out)
    found = result["text"]["fp16"]
    path = tmp_path / "out" / "a.txt.fp16.onnx"
    assert (found["path"], found["extra_file"]) == (str(path), f"{path}.extra_file")
    assert (found["num_samples"], found["left_out"]) == (4, [])
    assert 0.999 < found["smallest_cosine"] < found["mean_cosine"] < 1
    assert 0 <= found["same_top1"] <= 1
    assert list(result) == ["text"]
    assert list(result["text"]) == ["fp16"]
    assert sorted(path.name for path in path.parent.iterdir()) == ["a.txt.fp16.onnx", "a.txt.fp16.onnx.extra_file"]
    assert props(path)["max_length"] == 30


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model-arch", "ViT-B-32", "--convert-text"], "no published weights of it; give --pytorch-ckpt-path"),
        (["--model-arch", "RN50", "--convert-text", "--pytorch-ckpt-path", "none.pt"], "none.pt"),
        (["--model-arch", "Emoji-Tiny", "--convert-text", "--context-length", "600"], "texts of at most 512 tokens"),
        (["--model-arch", "Emoji-Tiny", "--convert-text", "--check-data", "nowhere"], "no LMDB is here"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    error = refusal(capsys, *arguments, "--save-onnx-path", tmp_path / "out")
    assert error.startswith("error: ")
    assert expected in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model_arch": None}, "--model-arch: expected the architecture of the model"),
        ({"save_onnx_path": None}, "--save-onnx-path: expected the prefix of the files"),
        ({"convert_text": False}, "give --convert-text, --convert-vision, or both"),
        ({"context_length": 2}, "--context-length: expected at least 3, got 2"),
        ({"tolerance": 1.5}, "--tolerance: expected a cosine, -1 to 1, got 1.5"),
        ({"precisions": ()}, "--precisions: expected one or more of fp32, fp16, int8, int8-openvino"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}"):
        pytorch_to_onnx.Options(**{"model_arch": "RN50", "save_onnx_path": "a", "convert_text": True, **changed})


def test_a_file_that_is_not_close_enough_leaves_what_was_there(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt.fp32.onnx").write_text("before")
    error = refusal(
        capsys,
        *("--model-arch", "ViT-Tiny-64", "--pytorch-ckpt-path", checkpoint, "--save-onnx-path", tmp_path / "a"),
        *("--convert-text", "--precisions", "fp32", "int8", "--tolerance", "0.99999"),
    )
    assert "a.txt.int8.onnx: differs from float32 by more than int8 may" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt.fp32.onnx"]
    assert (tmp_path / "a.txt.fp32.onnx").read_text() == "before"


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = ["--model-arch", "ViT-Tiny-64", "--pytorch-ckpt-path", checkpoint, "--convert-text"]
    for module, name in ((onnx, "save_model"), (onnx_files.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            error = refusal(capsys, *arguments, "--precisions", "fp32", "--save-onnx-path", tmp_path / "a")
        assert error.splitlines() == [error.strip()]
        assert "a.txt.fp32.onnx: cannot be written (No space left on device); make room" in error
        assert list(tmp_path.iterdir()) == []


# --- full size


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_TOWER)
def test_full_size_models_equal_pytorch(tmp_path: Path, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = CLIP.from_config(zoo.model_config(name, TEXT_TOWER[name])).eval()
    backend = TorchBackend(model)
    for kind in KINDS:
        expected = reference(model, kind)
        path = onnx_files.onnx_path(tmp_path / "m", kind, "fp32")
        assert export.export_tower(model, kind, path, expected).smallest > 0.99999
        is_large = (name, kind) == ("ViT-H-14", "image")  # 2.5 GB of weights
        assert onnx_files.extra_path(path).exists() == is_large
        half = onnx_files.onnx_path(tmp_path / "m", kind, "fp16")
        assert derived.derive(path, kind, "fp16", half, expected).smallest > 0.999
        half.unlink()
        onnx_files.extra_path(half).unlink()
        (tmp_path / "moved").mkdir(exist_ok=True)
        moved = onnx_files.move(path, tmp_path / "moved")
        inputs = pixels(model, 1) if kind == "image" else token_ids(model, 2, 60)
        rows = backend.encode_pixels(inputs) if kind == "image" else backend.encode_tokens(inputs)
        for opener in OPENERS.values():
            np.testing.assert_allclose(unit_rows(opener(moved, kind).run(inputs)), rows, atol=1e-4)
        moved.unlink()
        onnx_files.extra_path(moved).unlink(missing_ok=True)
