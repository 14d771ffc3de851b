"""TensorRT engines, built and run with a stand-in for the bindings (`fake_tensorrt`); the last test wants a GPU."""

import contextlib
import inspect
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny_models import TEXT, VIT, tiny_pixels

from cn_clip import cli
from cn_clip import files as written
from cn_clip.clip.backends import engines, export, half, onnx_files, parity, tensor_rt
from cn_clip.clip.backends.base import KINDS, Kind
from cn_clip.clip.backends.engines import Build, build_engine
from cn_clip.clip.backends.exported import Source, tower_files
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.backends.tensor_rt import TensorRtTower, open_engines
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.deploy import onnx_to_tensorrt, tensorrt_utils
from cn_clip.deploy.tensorrt_utils import TensorRTModel, TensorRTShape
from cn_clip.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from cn_clip.zoo import ModelConfig

VERSIONS = ["8.6.1", "10.13.3.9", "11.4.0.106"]
IDS = np.array([[101, 2769, 102, 0], [101, 2769, 2769, 102]])


class CpuGpu(tensor_rt.Gpu):
    """Memory of the processor in place of a GPU's."""

    def current(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        yield fake_tensorrt.STREAM


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> ModuleType:
    """The stand-in; `asked_devices` of it are those a GPU was looked for with."""
    trt = fake_tensorrt.module(version)
    trt.asked_devices = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    gpu = CpuGpu(torch.device("cpu"), fake_tensorrt.GPU, "9.0")

    def find_gpu(device: str | torch.device | None = None) -> CpuGpu:
        trt.asked_devices.append(device)
        return gpu

    monkeypatch.setattr(tensor_rt, "find_gpu", find_gpu)
    return trt


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return install(monkeypatch, "10.13.3.9")


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    """Takes all token ids, for the comparison of engines uses real texts; 512 dimensions, as ViT-B-16 gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ModelConfig(replace(VIT, embed_dim=512), replace(TEXT, vocab_size=21128))
        return CLIP.from_config(config).eval()


@pytest.fixture(scope="module")
def files(tiny: CLIP, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """The ONNX files, batch and text length free."""
    folder = tmp_path_factory.mktemp("onnx")
    expected = parity.reference(TorchBackend(tiny), parity.embedded_samples())
    for kind in KINDS:
        export.export_tower(tiny, kind, folder / f"{kind}.onnx", expected)
    return {kind: folder / f"{kind}.onnx" for kind in KINDS}


def fixed(path: Path, folder: Path, shape: list[int]) -> Path:
    """A file as Chinese-CLIP exports them: of one shape, without metadata."""
    proto = onnx.load(path)
    del proto.metadata_props[:]
    for end, sizes in ((proto.graph.input[0], shape), (proto.graph.output[0], shape[:1])):
        for position, size in enumerate(sizes):
            end.type.tensor_type.shape.dim[position].dim_value = size
    onnx.save_model(proto, folder / path.name)
    return folder / path.name


def convert(*flags: object) -> None:
    onnx_to_tensorrt.main(["--model-arch", "ViT-B-16", *map(str, flags)])


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """What the command says when it stops, without the frame that the parser draws."""
    with pytest.raises(SystemExit) as stopped:
        convert(*flags)
    assert stopped.value.code in (1, 2)
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split()).removeprefix("错误 / error: ")


def both(files: dict[Kind, Path], prefix: Path) -> list[object]:
    towers = ["--convert-text", "--text-onnx-path", files["text"], "--convert-vision", "--vision-onnx-path"]
    return [*towers, files["image"], "--save-tensorrt-path", prefix]


@pytest.mark.parametrize("name", fake_tensorrt.SIGNATURES)
def test_stand_in_takes_what_the_bindings_take(name: str) -> None:
    owner, method = name.split(".")
    parameters = list(inspect.signature(getattr(getattr(fake_tensorrt, owner), method)).parameters)
    assert parameters[1:] == fake_tensorrt.SIGNATURES[name].split()


def test_command_writes_plain_engines_and_says_where(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*both(files, tmp_path / "e"), "--fp16", "--fp32", "--batch-size", 4, "--max-batch-size", 9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Params:"
    assert "  batch_size: 4" in lines
    assert lines[-5:] == [
        "Finished ONNX to TensorRT conversion...",
        f">>> The text FP32 TensorRT model is saved at {tmp_path}/e.txt.fp32.trt",
        f">>> The text FP16 TensorRT model is saved at {tmp_path}/e.txt.fp16.trt",
        f">>> The vision FP32 TensorRT model is saved at {tmp_path}/e.img.fp32.trt",
        f">>> The vision FP16 TensorRT model is saved at {tmp_path}/e.img.fp16.trt",
    ]
    names = [f"e.{middle}.{form}.trt" for middle in ("img", "txt") for form in ("fp16", "fp32")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, *(f"{name}.json" for name in names)])
    assert (tmp_path / "e.img.fp16.trt").read_bytes().startswith(fake_tensorrt.MAGIC)


def test_shapes_go_from_one_to_the_largest_batch_and_from_two_tokens(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*both(files, tmp_path / "e"), "--fp16", "--batch-size", 4, "--max-batch-size", 9, "--json")
    (text, text_config), (image, image_config) = trt.Builder.built
    assert text_config.profiles[0].shapes == {"text": [(1, 2), (4, 52), (9, 52)]}
    assert image_config.profiles[0].shapes == {"image": [(1, 3, 32, 32), (4, 3, 32, 32), (9, 3, 32, 32)]}
    assert text.num_inputs == image.num_inputs == 1
    result = json.loads(capsys.readouterr().out)
    assert [(one["kind"], one["precision"]) for one in result["engines"]] == [("text", "fp16"), ("image", "fp16")]
    assert result["engines"][1]["path"] == str(tmp_path / "e.img.fp16.trt")
    assert result["engines"][1]["tensorrt"] == "10.13.3.9"
    assert result["engines"][1]["cosine"] == pytest.approx(1, abs=1e-5)


def test_description_names_versions_shapes_facts_and_the_command(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path
) -> None:
    flags = ["--convert-text", "--text-onnx-path", files["text"], "--save-tensorrt-path", tmp_path / "e"]
    convert(*flags, "--fp16", "--context-length", 30)
    written = json.loads((tmp_path / "e.txt.fp16.trt.json").read_text())
    assert written["tensorrt"] == "10.13.3.9"
    assert written["gpu"] == "NVIDIA Stand-in"
    assert written["compute_capability"] == "9.0"
    assert written["shapes"] == {"min": [1, 2], "opt": [1, 30], "max": [1, 30]}
    assert written["facts"]["kind"] == "text"
    assert written["facts"]["embed_dim"] == 512
    assert written["facts"]["precision"] == "fp16"
    assert written["facts"]["max_length"] == 512
    assert written["facts"]["weights"] == OnnxTower(files["text"], "text", device="cpu").facts.weights
    assert shlex.split(written["command"]) == [
        *["python", "cn_clip/deploy/onnx_to_tensorrt.py", "--model-arch", "ViT-B-16", "--convert-text"],
        *["--text-onnx-path", str(files["text"]), "--context-length", "30"],
        *["--save-tensorrt-path", str(tmp_path / "e"), "--fp16"],
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_precision_is_a_flag_up_to_10_and_the_types_of_the_file_in_11(
    monkeypatch: pytest.MonkeyPatch, version: str, precision: str, files: dict[Kind, Path], tmp_path: Path
) -> None:
    trt = install(monkeypatch, version)
    build_engine(files["image"], "image", tmp_path / "e", Build(precision))  # type: ignore[arg-type]
    ((network, config),) = trt.Builder.built
    by_flag = precision == "fp16" and version != "11.4.0.106"
    assert config.flags == (["FP16", "OBEY_PRECISION_CONSTRAINTS"] if by_flag else [])
    # EXPLICIT_BATCH is bit 0 before 11, STRONGLY_TYPED bit 1 in 10.
    assert network.flags == {"8.6.1": 1, "10.13.3.9": 0 if by_flag else 2, "11.4.0.106": 0}[version]
    types = {one.data_type for one in onnx.load_from_string(network.plan).graph.initializer}
    assert (TensorProto.FLOAT16 in types) == (precision == "fp16" and version == "11.4.0.106")


def test_float16_file_is_built_strongly_typed(trt: ModuleType, files: dict[Kind, Path], tmp_path: Path) -> None:
    onnx_files.save(half.halved(files["image"]), tmp_path / "half.onnx")
    built = build_engine(tmp_path / "half.onnx", "image", tmp_path / "e", Build("fp16"))
    ((network, config),) = trt.Builder.built
    assert network.flags == 2
    assert config.flags == []
    assert built.cosine == pytest.approx(1, abs=1e-4)
    with pytest.raises(ConfigError, match=r"half.onnx: holds float16 weights; give the fp32 file for a float32 engine"):
        build_engine(tmp_path / "half.onnx", "image", tmp_path / "f", Build("fp32"))


def test_float16_file_needs_the_flag_in_8(
    monkeypatch: pytest.MonkeyPatch, files: dict[Kind, Path], tmp_path: Path
) -> None:
    trt = install(monkeypatch, "8.6.1")
    onnx_files.save(half.halved(files["image"]), tmp_path / "half.onnx")
    build_engine(tmp_path / "half.onnx", "image", tmp_path / "e", Build("fp16"))
    assert "FP16" in trt.Builder.built[0][1].flags


def test_new_engine_never_stands_beside_the_description_of_another(
    trt: ModuleType, monkeypatch: pytest.MonkeyPatch, files: dict[Kind, Path], tmp_path: Path
) -> None:
    def killed(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        source.rename(target)

    build_engine(files["image"], "image", tmp_path / "e", Build("fp32"))
    with monkeypatch.context() as patch:
        patch.setattr(written.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            build_engine(files["image"], "image", tmp_path / "e", Build("fp16"))
    model = TensorRTModel(tmp_path / "e")  # moves what is left to its place first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", engines.description_path(tmp_path / "e").name]
    assert (
        json.loads(engines.description_path(tmp_path / "e").read_text(encoding="utf-8"))["facts"]["precision"] == "fp16"
    )
    assert model is not None


def test_delicate_and_named_layers_stay_float32(trt: ModuleType, files: dict[Kind, Path], tmp_path: Path) -> None:
    build_engine(files["image"], "image", tmp_path / "e", Build("fp16", kept_float=("Conv",)))
    ((network, _),) = trt.Builder.built
    kept = {layer.name for layer in network.layers if getattr(layer, "precision", None) is trt.DataType.FLOAT}
    expected = [one.name for one in onnx.load(files["image"]).graph.node]
    delicate = {
        one.name for one in onnx.load(files["image"]).graph.node if one.op_type in ("LayerNormalization", "Softmax")
    }
    convolutions = {name for name in expected if "Conv" in name}
    assert len(delicate) == 8  # 3 + 2 per layer and before the projection; a softmax per layer
    assert len(convolutions) == 1
    assert kept == delicate | convolutions
    assert {layer.name: layer.pinned for layer in network.layers if layer.pinned} == {
        name: {0: trt.DataType.FLOAT} for name in convolutions
    }


def test_sums_of_powers_keep_float32_results_and_integer_layers_are_left_alone(trt: ModuleType, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Pow", ["image", "two"], ["squared"], name="power"),
        helper.make_node("ReduceMean", ["squared", "axes"], ["mean"], name="mean", keepdims=0),
        helper.make_node("Mul", ["mean", "two"], ["unnorm_image_features"], name="twice"),
        helper.make_node("Shape", ["image"], ["shape"], name="shape"),
        helper.make_node("ReduceMax", ["shape"], ["largest"], name="largest"),
    ]
    float_type = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "powers",
        [helper.make_tensor_value_info("image", float_type, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("unnorm_image_features", float_type, ["batch", 3])],
        [helper.make_tensor("two", float_type, [], [2.0]), helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, tmp_path / "powers.onnx")
    build_engine(tmp_path / "powers.onnx", "image", tmp_path / "e", Build("fp16"))
    ((network, _),) = trt.Builder.built
    assert {layer.name: layer.pinned for layer in network.layers if hasattr(layer, "precision")} == {
        "power": {0: trt.DataType.FLOAT},
        "mean": {0: trt.DataType.FLOAT},
    }
    # The mean of the squares of 16 numbers 3, times 2.
    engine = TensorRTModel(tmp_path / "e")
    found = engine({"image": torch.full((1, 3, 4, 4), 3.0)})["unnorm_image_features"]
    assert found.tolist() == [[18.0, 18.0, 18.0]]


@pytest.mark.parametrize("version", VERSIONS)
def test_model_computes_what_the_file_does(
    monkeypatch: pytest.MonkeyPatch, version: str, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
    install(monkeypatch, version)
    for kind in KINDS:
        build_engine(files[kind], kind, tmp_path / kind, Build("fp32", max_batch=3))
    pixels = tiny_pixels(tiny)
    image, text = TensorRTModel(tmp_path / "image"), TensorRTModel(tmp_path / "text")
    with torch.no_grad():
        expected = [tiny.encode_image(pixels), tiny.encode_text(torch.from_numpy(IDS))]
    # The difference of ONNX Runtime and PyTorch.
    torch.testing.assert_close(image(inputs={"image": pixels})["unnorm_image_features"], expected[0], atol=1e-4, rtol=0)
    for ids in (torch.from_numpy(IDS), torch.from_numpy(IDS).int()):
        torch.testing.assert_close(text({"text": ids})["unnorm_text_features"], expected[1], atol=1e-4, rtol=0)
    assert text.inputs["text"].dtype == (torch.int32 if version == "8.6.1" else torch.int64)


def test_model_casts_and_refuses_other_names_places_and_shapes(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path
) -> None:
    build_engine(files["image"], "image", tmp_path / "e", Build("fp32", max_batch=2))
    model = TensorRTModel(tmp_path / "e")
    pixels = torch.ones(2, 3, 32, 32)
    varied = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    found = model({"image": varied.double()})["unnorm_image_features"]
    strided = varied.mT.contiguous().mT
    assert not strided.is_contiguous()
    torch.testing.assert_close(found, model({"image": strided})["unnorm_image_features"])
    refusals = {
        "takes the inputs ['image'], got ['pixels']": {"pixels": pixels},
        "takes image of the shape (1, 3, 32, 32) to (2, 3, 32, 32), got (3, 3, 32, 32)": {
            "image": torch.ones(3, 3, 32, 32)
        },
        "takes image of the shape (1, 3, 32, 32) to (2, 3, 32, 32), got (3, 32, 32)": {"image": torch.ones(3, 32, 32)},
        "image lies on meta, expected cpu": {"image": pixels.to("meta")},
    }
    for sentence, inputs in refusals.items():
        with pytest.raises(ConfigError) as caught:
            model(inputs)
        assert str(caught.value) == f"{tmp_path}/e: {sentence}"


def test_refusal_of_tensorrt_while_running_is_told(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engine(files["image"], "image", tmp_path / "e", Build("fp32"))
    model = TensorRTModel(tmp_path / "e")
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", lambda self, stream_handle: False)
    with pytest.raises(CheckpointError, match="e: TensorRT refuses to run: it gives no reason"):
        model({"image": torch.ones(1, 3, 32, 32)})
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "create_execution_context", lambda self: None)
    with pytest.raises(
        CheckpointError, match=r"e: TensorRT cannot run it on NVIDIA Stand-in \(compute capability 9.0\)"
    ):
        TensorRTModel(tmp_path / "e")


def test_tower_cuts_batches_and_gives_the_rows_of_the_model(
    trt: ModuleType, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
    for kind in KINDS:
        build_engine(files[kind], kind, tmp_path / kind, Build("fp32", max_batch=2, context_length=4))
    backend = open_engines(tmp_path / "image", tmp_path / "text")
    pixels = tiny_pixels(tiny, 5).numpy()
    expected = TorchBackend(tiny)
    np.testing.assert_allclose(backend.encode_pixels(pixels), expected.encode_pixels(pixels), atol=1e-5)
    np.testing.assert_allclose(backend.encode_tokens(IDS), expected.encode_tokens(IDS), atol=1e-5)
    assert (backend.resolution, backend.embed_dim) == (32, 512)
    assert backend.facts.logit_scale == pytest.approx(float(tiny.logit_scale.detach().exp()))
    with pytest.raises(ConfigError, match="takes texts of at most 4 tokens, got 5"):
        backend.encode_tokens(np.ones((1, 5), dtype=np.int64))
    with pytest.raises(ConfigError, match="no text model was opened"):
        open_engines(tmp_path / "image", None).encode_tokens(IDS)
    with pytest.raises(CheckpointError, match=r"text: expected the image model.*are the two files swapped"):
        TensorRtTower(tmp_path / "text", "image")


def test_fixed_sizes_stay_fixed_and_engines_without_description_run(
    trt: ModuleType, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
    shaped: dict[Kind, list[int]] = {"image": [2, 3, 32, 32], "text": [2, 6]}
    for kind in KINDS:
        path = fixed(files[kind], tmp_path, shaped[kind])
        build_engine(path, kind, tmp_path / kind, Build("fp32", batch=2, max_batch=2, context_length=6))
        (tmp_path / f"{kind}.json").unlink()
    assert [config.profiles for _, config in trt.Builder.built] == [[], []]
    backend = open_engines(tmp_path / "image", tmp_path / "text")
    pixels, expected = tiny_pixels(tiny, 3).numpy(), TorchBackend(tiny)
    np.testing.assert_allclose(backend.encode_pixels(pixels), expected.encode_pixels(pixels), atol=1e-5)
    np.testing.assert_allclose(backend.encode_tokens(IDS), expected.encode_tokens(IDS), atol=1e-5)
    with pytest.raises(ConfigError, match=r"image.onnx: was exported for batches of 2; use --batch-size 2"):
        build_engine(tmp_path / "image.onnx", "image", tmp_path / "e", Build("fp32"))
    with pytest.raises(ConfigError, match=r"text.onnx: was exported for texts of 6 tokens; use --context-length 6"):
        build_engine(tmp_path / "text.onnx", "text", tmp_path / "e", Build("fp32", batch=2, max_batch=2))


def test_engine_of_another_version_or_gpu_says_how_to_build_it_again(
    trt: ModuleType, monkeypatch: pytest.MonkeyPatch, files: dict[Kind, Path], tmp_path: Path
) -> None:
    flags = ["--convert-vision", "--vision-onnx-path", files["image"], "--save-tensorrt-path", tmp_path / "e"]
    convert(*flags, "--fp16")
    engine = tmp_path / "e.img.fp16.trt"
    again = (
        f"build it again: python cn_clip/deploy/onnx_to_tensorrt.py --model-arch ViT-B-16 --convert-vision "
        f"--vision-onnx-path {files['image']} --save-tensorrt-path {tmp_path}/e --fp16"
    )
    there = "NVIDIA Stand-in"
    here = "NVIDIA Stand-in (compute capability 9.0)"
    install(monkeypatch, "10.13.3.9.post1")
    with pytest.raises(CheckpointError, match="TensorRT: The engine plan file is not compatible"):
        TensorRTModel(engine)  # to the stand-in it is another version, and only then
    install(monkeypatch, "10.14.1.48")
    with pytest.raises(CheckpointError) as caught:
        TensorRTModel(engine)
    assert str(caught.value) == (
        f"{engine}: the engine was built with TensorRT 10.13.3.9 on {there}, "
        f"here is TensorRT 10.14.1.48 on {here}; {again}"
    )
    tensor_rt.description_path(engine).unlink()
    with pytest.raises(CheckpointError) as caught:
        TensorRTModel(engine)
    assert str(caught.value) == (
        f"{engine}: no engine for this machine, here is TensorRT 10.14.1.48 on {here}, and engines run where they were "
        "built; build it again: python cn_clip/deploy/onnx_to_tensorrt.py --help "
        "(TensorRT: The engine plan file is not compatible with this version of TensorRT)"
    )


def test_files_that_are_no_engines_are_told(trt: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"gone: cannot be read \(No such file or directory\); build the engine with"
    ):
        TensorRTModel(tmp_path / "gone")
    (tmp_path / "e").write_bytes(b"\0no engine")
    with pytest.raises(CheckpointError, match=r"e: no engine for this machine.*magicTag"):
        TensorRTModel(tmp_path / "e")
    (tmp_path / "e.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"e.json: expected a JSON object; delete it, or build the engine again"):
        TensorRTModel(tmp_path / "e")
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"e.json: cannot be read"):
        TensorRTModel(tmp_path / "e")


def test_parser_errors_are_listed_and_nothing_is_written(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt.OnnxParser.failures = ("In node 3 (importGelu):\n  UNSUPPORTED_NODE", "In node 9: INVALID_GRAPH")
    (tmp_path / "out").mkdir()
    message = refused(capsys, *both(files, tmp_path / "out" / "e"), "--fp16")
    assert message == (
        f"{files['text']}: TensorRT 10.13.3.9 cannot read it: In node 3 (importGelu): UNSUPPORTED_NODE; "
        "In node 9: INVALID_GRAPH; export it again"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_failed_build_leaves_the_engine_that_was_there(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--convert-text", "--text-onnx-path", files["text"], "--save-tensorrt-path", tmp_path / "e", "--fp32"]
    convert(*flags)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trt.Builder.failure = "out of memory"
    assert refused(capsys, *flags) == "TensorRT 10.13.3.9 cannot build the engine: out of memory"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_engine_that_computes_something_else_is_not_written(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TensorRtTower.run
    monkeypatch.setattr(TensorRtTower, "run", lambda self, inputs: run(self, inputs) * np.nan)
    with pytest.raises(CheckpointError, match=r"image.onnx: its fp16 engine differs.*cosine nan, tolerance 0.999"):
        build_engine(files["image"], "image", tmp_path / "e", Build("fp16"))
    assert list(tmp_path.iterdir()) == []


def test_workspace_and_timing_cache_reach_the_builder(
    trt: ModuleType, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--convert-vision", "--vision-onnx-path", files["image"], "--save-tensorrt-path", tmp_path / "e"]
    cache = tmp_path / "timing"
    for expected in (b"+", b"++"):
        convert(*flags, "--fp32", "--workspace-gib", 1.5, "--timing-cache", cache)
        assert cache.read_bytes() == expected
    assert trt.Builder.built[0][1].pools == {trt.MemoryPoolType.WORKSPACE: 1_610_612_736}
    cache.write_bytes(b"other GPU")
    convert(*flags, "--fp32", "--timing-cache", cache)
    assert cache.read_bytes() == b"+"
    assert "is of another GPU or TensorRT; measuring again" in capsys.readouterr().out
    cache.write_bytes(b"damaged")
    convert(*flags, "--fp32", "--timing-cache", cache)
    assert cache.read_bytes() == b"+"


def test_timings_that_cannot_be_kept_are_told_before_the_build_or_lose_no_engine(
    trt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[Kind, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--convert-vision", "--vision-onnx-path", files["image"], "--save-tensorrt-path", tmp_path / "e", "--fp32"]
    assert refused(capsys, *flags, "--timing-cache", tmp_path / "none" / "t").startswith(
        f"--timing-cache {tmp_path}/none/t: the folder {tmp_path}/none does not exist"
    )
    assert "cannot be read (Is a directory)" in refused(capsys, *flags, "--timing-cache", tmp_path)
    assert trt.Builder.built == []

    def full(path: Path, mode: str) -> None:
        raise DataError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(engines, "atomic_write", full)
    convert(*flags, "--timing-cache", tmp_path / "t")
    assert f"{tmp_path}/t: cannot be written (No space left on device)" in capsys.readouterr().out
    assert (tmp_path / "e.img.fp32.trt").is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--save-tensorrt-path e --fp16", "give --convert-text, --convert-vision, or both"),
        (
            "--convert-text --text-onnx-path t --fp16",
            "--save-tensorrt-path: expected the prefix of the engines to write",
        ),
        ("--convert-text --text-onnx-path t --save-tensorrt-path e", "give --fp16, --fp32, or both"),
        ("--convert-text --save-tensorrt-path e --fp16", "--convert-text: give the ONNX file with --text-onnx-path"),
        (
            "--convert-text --text-onnx-path t --vision-onnx-path v --save-tensorrt-path e --fp16",
            "--vision-onnx-path: is for --convert-vision, which was not given",
        ),
        (
            "--convert-text --text-onnx-path t --save-tensorrt-path e --fp32 --fp16-banned-ops Add",
            "--fp16-banned-ops: is for --fp16, which was not given",
        ),
        (
            "--convert-text --text-onnx-path t --save-tensorrt-path e --fp32 --batch-size 8 --max-batch-size 4",
            "--max-batch-size: expected at least 8, got 4",
        ),
        (
            "--convert-text --text-onnx-path t --save-tensorrt-path e --fp32 --workspace-gib nan",
            "--workspace-gib: expected a number above 0, got nan",
        ),
        (
            "--convert-text --text-onnx-path none.onnx --save-tensorrt-path e --fp32",
            "none.onnx: no such file; export the model with deploy/pytorch_to_onnx.py",
        ),
        (
            "--convert-text --text-onnx-path none.onnx --save-tensorrt-path none/e --fp32",
            "none/e.txt.fp32.trt: the folder none does not exist; create it first",
        ),
    ],
)
def test_command_refuses(trt: ModuleType, flags: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, *flags.split())


def test_command_refuses_files_and_settings_that_do_not_fit(
    trt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[Kind, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*both(files, tmp_path / "e"), "--fp16"]
    assert refused(capsys, *flags, "--context-length", 600) == (
        f"--context-length: {files['text']} takes at most 512 tokens, got 600"
    )
    assert refused(capsys, *flags, "--model-arch", "ViT-L-14").startswith(
        f"{files['text']}: gives 512 dimensions, ViT-L-14 gives 768"
    )
    assert refused(capsys, *flags, "--text-onnx-path", files["image"]).startswith(
        f"{files['image']}: expected the text model"
    )
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 9)
    assert refused(capsys, *flags, "--text-onnx-path", tmp_path / "junk.onnx").startswith(
        f"{tmp_path}/junk.onnx: is not an ONNX file"
    )
    install(monkeypatch, "11.4.0.106")
    assert refused(capsys, *flags, "--fp16-banned-ops", "Add") == (
        "--fp16-banned-ops: this engine has the types of its file in TensorRT 11.4.0.106; "
        "leave it out, or use TensorRT 10 with --fp16 and an fp32 file"
    )


def test_package_and_gpu_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"needs the package `tensorrt`; .*pip install 'cn_clip\[tensorrt\]'"):
        Encoder("Emoji-Tiny", backend="tensorrt", precision="fp16")
    assert refused(capsys, *both(files, tmp_path / "e"), "--fp16").endswith("pip install 'cn_clip[tensorrt]'")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module("10.13.3.9"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, and PyTorch finds none here"):
        Encoder("Emoji-Tiny", backend="tensorrt", precision="fp16")
    for device in ("cpu", "gpu", "cuda:x"):
        with pytest.raises(ConfigError, match=f"runs on cuda or cuda:N, got '{device}'"):
            tensor_rt.find_gpu(device)


def test_libraries_and_drivers_that_do_not_fit_are_told(
    trt: ModuleType, monkeypatch: pytest.MonkeyPatch, files: dict[Kind, Path], tmp_path: Path
) -> None:
    def no_builder(log: fake_tensorrt.ILogger) -> None:
        log.log(fake_tensorrt.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = no_builder  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"cannot start on NVIDIA Stand-in .*: CUDA initialization.*check that the driver"
    ):
        build_engine(files["image"], "image", tmp_path / "e", Build("fp16"))

    def no_library(module: str, **settings: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensor_rt, "require", no_library)
    with pytest.raises(ConfigError, match=r"cannot load the libraries of TensorRT \(libnvinfer.so.10: cannot open"):
        TensorRTModel(tmp_path / "e")


def test_gpus_are_found_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA A", "NVIDIA B"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    assert tensor_rt.find_gpu() == tensor_rt.find_gpu("cuda") == tensor_rt.find_gpu("cuda:1")
    assert tensor_rt.find_gpu("cuda:0") == tensor_rt.Gpu(torch.device("cuda:0"), "NVIDIA A", "8.0")
    with pytest.raises(ConfigError, match="device: cuda:2 was asked for, but there are 2 GPUs; the first is cuda:0"):
        tensor_rt.find_gpu("cuda:2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A download root with the text tower of Emoji-Tiny."""
    root = tmp_path_factory.mktemp("root")
    tower_files(Source("Emoji-Tiny", download_root=root), ["text"], "fp32")
    return root


@pytest.fixture
def options(exported: Path, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(exported / "exported", tmp_path / "exported")
    return {"backend": "tensorrt", "precision": "fp16", "download_root": tmp_path, "kinds": ["text"]}


def test_engines_are_built_once_and_again_for_another_version(
    trt: ModuleType,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def same_rows() -> None:
        rows = open_backend("Emoji-Tiny", **options).encode_tokens(IDS)
        np.testing.assert_allclose(rows, open_backend("Emoji-Tiny").encode_tokens(IDS), atol=1e-4)

    same_rows()
    assert len(trt.Builder.built) == 1
    assert trt.Builder.built[0][1].profiles[0].shapes == {"text": [(1, 2), (32, 52), (128, 52)]}
    assert "正在构建 TensorRT 引擎" in capsys.readouterr().err
    same_rows()
    assert len(trt.Builder.built) == 1
    engine = next(tmp_path.rglob("model.trt10.13.3.9-sm9.0-NVIDIA-Stand-in.txt.fp16.trt"))
    engine.write_bytes(b"x" * engine.stat().st_size)
    same_rows()
    assert "重新构建" in capsys.readouterr().err
    assert len(trt.Builder.built) == 2
    newer = install(monkeypatch, "10.14.1.48")
    same_rows()
    assert len(newer.Builder.built) == 1


def test_a_failed_first_build_is_tried_again_the_next_time(
    trt: ModuleType, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trt.Builder.failure = "out of memory"
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot build the engine: out of memory"):
            open_backend("Emoji-Tiny", **options)
    assert len(trt.Builder.built) == 2
    assert "重新构建" not in capsys.readouterr().err
    trt.Builder.failure = None
    assert open_backend("Emoji-Tiny", **options).encode_tokens(IDS).shape == (2, 256)


def test_cached_engines_are_built_and_opened_on_the_gpu_that_is_named(trt: ModuleType, options: dict[str, Any]) -> None:
    open_backend("Emoji-Tiny", device="cuda:1", **options)
    # The check of a new engine names the place that was found, which is the processor here.
    assert {str(device) for device in trt.asked_devices} == {"cuda:1", "cpu"}


def test_no_rows_give_no_rows(trt: ModuleType, files: dict[Kind, Path], tmp_path: Path) -> None:
    build_engine(files["text"], "text", tmp_path / "e", Build("fp32"))
    assert TensorRtTower(tmp_path / "e", "text").run(IDS[:0]).shape == (0, 512)


def test_encoder_opens_the_prefix_of_engines(
    trt: ModuleType, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
    convert(*both(files, tmp_path / "e"), "--fp32", "--max-batch-size", 8)
    encoder = Encoder(tmp_path / "e", backend="tensorrt", precision="fp32")
    expected = Encoder(tiny).encode_texts(["一只猫", "苹果"])
    np.testing.assert_allclose(encoder.encode_texts(["一只猫", "苹果"]), expected, atol=1e-5)
    with pytest.raises(
        CheckpointError, match=r"e.img.fp16.trt: no such file; build it with python cn_clip/deploy/onnx_to"
    ):
        Encoder(tmp_path / "e", backend="tensorrt", precision="fp16")
    with pytest.raises(ConfigError, match="num_threads: is for processors"):
        open_backend(tmp_path / "e", backend="tensorrt", precision="fp32", num_threads=2)


def test_cn_clip_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.COMMANDS["export tensorrt"].module == "cn_clip.deploy.onnx_to_tensorrt"


# --- the helpers of Chinese-CLIP


def test_an_engine_is_built_by_the_helpers_of_chinese_clip(
    trt: ModuleType, files: dict[Kind, Path], tiny: CLIP, tmp_path: Path
) -> None:
    runtime = trt.Runtime(tensorrt_utils.TRT_LOGGER)
    shape = TensorRTShape((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32), "image")
    engine = tensorrt_utils.build_engine(
        runtime=runtime,
        onnx_file_path=str(files["image"]),
        logger=None,
        input_shapes=[shape],
        workspace_size=2**31,
        fp16=False,
        int8=False,
    )
    network, config = trt.Builder.built[-1]
    assert config.profiles[0].shapes == {"image": [(1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32)]}
    assert config.pools[trt.MemoryPoolType.WORKSPACE] == 2**31
    assert tensorrt_utils.get_binding_idxs(engine, 0) == ([0], [1])
    room = tensorrt_utils.get_output_tensors(engine.create_execution_context(), [torch.zeros(3, 3, 32, 32)], [0], [1])
    assert {name: tuple(tensor.shape) for name, tensor in room.items()} == {"unnorm_image_features": (3, 512)}
    assert tensorrt_utils.fix_fp16_network(network, ["MatMul"]) is network
    lengths = {"min_shape": (1, 8), "optimal_shape": (1, 8), "max_shape": (1, 8)}
    text = tensorrt_utils.build_engine(runtime, str(files["text"]), None, True, False, **lengths)
    assert text.get_tensor_profile_shape("text", 0)[2] == [1, 8]
    with pytest.raises(ConfigError, match="int8"):
        tensorrt_utils.build_engine(runtime, str(files["text"]), None, True, True, **lengths)
    with pytest.raises(AssertionError, match="input_shapes"):
        tensorrt_utils.build_engine(runtime, str(files["text"]), None, True, False)


def test_an_opened_engine_times_its_calls_and_opens_others(
    trt: ModuleType, files: dict[Kind, Path], tiny: CLIP, tmp_path: Path
) -> None:
    build_engine(files["image"], "image", tmp_path / "e.trt", Build("fp32", max_batch=3))
    model, seconds = TensorRTModel(str(tmp_path / "e.trt")), []
    pixels = tiny_pixels(tiny)
    outputs = model(inputs={"image": pixels}, time_buffer=seconds)
    assert torch.equal(outputs["unnorm_image_features"], model({"image": pixels})["unnorm_image_features"])
    assert [one > 0 for one in seconds] == [True]
    assert model.load_engine(str(tmp_path / "e.trt")).num_io_tensors == 2
    with pytest.raises(AssertionError, match="no such file"):
        model.load_engine(str(tmp_path / "none"))


def test_shapes_of_chinese_clip_are_checked_and_copied() -> None:
    shape = TensorRTShape([1, 8], [2, 8], [4, 8], None)
    assert shape.generate_multiple_shapes(["a", "b"])[1] == TensorRTShape([1, 8], [2, 8], [4, 8], "b")
    with pytest.raises(AssertionError, match="input_name"):
        shape.check_validity()
    for wrong in (([1], [2, 8], [4, 8]), ([0], [1], [1]), ([], [], [])):
        with pytest.raises(AssertionError, match="three shapes of one length"):
            TensorRTShape(*wrong, input_name="a").check_validity()
    with pytest.raises(AssertionError, match="expected None, got 'a'"):
        shape.make_copy("a").generate_multiple_shapes(["b"])


@pytest.mark.gpu
def test_engines_on_a_gpu(files: dict[Kind, Path], tiny: CLIP, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    for precision, tolerance in (("fp32", 0.9999), ("fp16", 0.999)):
        convert(*both(files, tmp_path / "e"), f"--{precision}", "--batch-size", 2, "--max-batch-size", 4)
        image, text = (tensor_rt.engine_path(tmp_path / "e", kind, precision) for kind in KINDS)
        backend, expected = open_engines(image, text), TorchBackend(tiny)
        pixels = tiny_pixels(tiny, 5).numpy()
        assert (backend.encode_pixels(pixels) * expected.encode_pixels(pixels)).sum(axis=1).min() > tolerance
        assert (backend.encode_tokens(IDS) * expected.encode_tokens(IDS)).sum(axis=1).min() > tolerance
        found = TensorRTModel(image)({"image": torch.from_numpy(pixels[:1]).cuda()})["unnorm_image_features"]
        assert found.shape == (1, 512)
        assert found.is_cuda
