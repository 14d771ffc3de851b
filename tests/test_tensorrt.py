"""TensorRT engines, built and run by a stand-in for ONNX Runtime's provider (`fake_tensorrt`); the last needs a GPU."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fake_tensorrt import Runtime
from tiny_models import TEXT, VIT, tiny_pixels

from cn_clip import cli
from cn_clip.clip.backends import derived, export, onnx_files, parity, tensor_rt
from cn_clip.clip.backends.exported import Source, tower_files
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.backends.opening import open_backend, open_files
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.backends.tensor_rt import Build, TensorRtTower, build_engine
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.deploy import onnx_to_tensorrt, tensorrt_utils
from cn_clip.deploy.tensorrt_utils import TensorRTModel, TensorRTShape
from cn_clip.errors import CheckpointError, ConfigError, MissingExtraError
from cn_clip.zoo import ModelConfig

IDS = np.array([[101, 2769, 102, 0], [101, 2769, 2769, 102]])


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return fake_tensorrt.install(monkeypatch)


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
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split()).removeprefix("error: ")


def both(files: dict[Kind, Path], prefix: Path) -> list[object]:
    towers = ["--convert-text", "--text-onnx-path", files["text"], "--convert-vision", "--vision-onnx-path"]
    return [*towers, files["image"], "--save-tensorrt-path", prefix]


def metadata(path: Path) -> dict[str, Any]:
    return {one.key: json.loads(one.value) for one in onnx.load(path).metadata_props}


def profile(options: dict[str, str]) -> list[str]:
    return [options[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")]


def test_command_writes_one_file_an_engine_and_says_where(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (node,) = onnx.load(tmp_path / "e.img.fp16.trt").graph.node
    assert node.op_type == "EPContext"


def test_shapes_go_from_one_to_the_largest_batch_and_from_two_tokens(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(*both(files, tmp_path / "e"), "--fp16", "--batch-size", 4, "--max-batch-size", 9, "--json")
    assert [profile(options) for options in runtime.built] == [
        ["text:1x2", "text:4x52", "text:9x52"],
        ["image:1x3x32x32", "image:4x3x32x32", "image:9x3x32x32"],
    ]
    result = json.loads(capsys.readouterr().out)
    assert [(one["kind"], one["precision"]) for one in result["engines"]] == [("text", "fp16"), ("image", "fp16")]
    assert result["engines"][1]["path"] == str(tmp_path / "e.img.fp16.trt")
    assert result["engines"][1]["onnxruntime"] == onnxruntime.__version__
    assert result["engines"][1]["cosine"] == pytest.approx(1, abs=1e-5)


def test_metadata_names_versions_shapes_facts_and_the_command(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path
) -> None:
    flags = ["--convert-text", "--text-onnx-path", files["text"], "--save-tensorrt-path", tmp_path / "e"]
    convert(*flags, "--fp16", "--context-length", 30)
    written = metadata(tmp_path / "e.txt.fp16.trt")
    facts, engine = written["cn_clip"], written["cn_clip_engine"]
    assert engine["onnxruntime"] == onnxruntime.__version__
    assert engine["shapes"] == {"text": [[1, 2], [1, 30], [1, 30]]}
    assert (facts["kind"], facts["embed_dim"], facts["precision"], facts["max_length"]) == ("text", 512, "fp16", 30)
    assert facts["weights"] == OnnxTower(files["text"], "text", device="cpu").facts.weights
    assert shlex.split(engine["command"]) == [
        *["python", "cn_clip/deploy/onnx_to_tensorrt.py", "--model-arch", "ViT-B-16", "--convert-text"],
        *["--text-onnx-path", str(files["text"]), "--context-length", "30"],
        *["--save-tensorrt-path", str(tmp_path / "e"), "--fp16"],
    ]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_normalisations_of_a_float16_engine_stay_float32(
    runtime: Runtime, precision: Any, files: dict[Kind, Path], tmp_path: Path
) -> None:
    build_engine(files["image"], "image", tmp_path / "e", Build(precision))
    flag = "1" if precision == "fp16" else "0"
    (options,) = runtime.built
    assert (options["trt_fp16_enable"], options["trt_layer_norm_fp32_fallback"]) == (flag, flag)


def test_a_float16_file_gives_float16_engines_only(runtime: Runtime, files: dict[Kind, Path], tmp_path: Path) -> None:
    onnx_files.save(derived.halved(files["image"]), tmp_path / "half.onnx", outside=True)
    built = build_engine(tmp_path / "half.onnx", "image", tmp_path / "e", Build("fp16"))
    assert built.cosine == pytest.approx(1, abs=1e-4)
    with pytest.raises(ConfigError, match=r"half.onnx: holds float16 weights; give the fp32 file for a float32 engine"):
        build_engine(tmp_path / "half.onnx", "image", tmp_path / "f", Build("fp32"))


def test_a_file_that_no_engine_file_could_hold_is_refused(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "LARGEST_FILE", 1000)
    with pytest.raises(ConfigError, match=r"image.onnx: holds more than 2 GiB, and an engine file cannot; export it"):
        build_engine(files["image"], "image", tmp_path / "e", Build("fp16"))
    assert runtime.built == []


def test_model_computes_what_the_file_does(
    runtime: Runtime, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
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


def test_model_casts_and_refuses_other_names_and_shapes(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path
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
    }
    for sentence, inputs in refusals.items():
        with pytest.raises(ConfigError) as caught:
            model(inputs)
        assert str(caught.value) == f"{tmp_path}/e: {sentence}"


def test_refusal_of_tensorrt_while_running_is_told(runtime: Runtime, files: dict[Kind, Path], tmp_path: Path) -> None:
    build_engine(files["image"], "image", tmp_path / "e", Build("fp32"))
    model, tower = TensorRTModel(tmp_path / "e"), TensorRtTower(tmp_path / "e", "image")
    runtime.run_failure = "TensorRT EP execution context enqueue failed.\nmore"
    for run in (lambda: model({"image": torch.ones(1, 3, 32, 32)}), lambda: tower.run(np.ones((1, 3, 32, 32)))):
        with pytest.raises(
            CheckpointError, match=r"e: TensorRT stopped \(TensorRT EP execution context enqueue failed\)"
        ):
            run()


def test_tower_cuts_batches_and_gives_the_rows_of_the_model(
    runtime: Runtime, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
    for kind in KINDS:
        build_engine(files[kind], kind, tmp_path / kind, Build("fp32", max_batch=2, context_length=4))
    backend = open_files("tensorrt", tmp_path / "image", tmp_path / "text", device="cuda")
    pixels = tiny_pixels(tiny, 5).numpy()
    expected = TorchBackend(tiny)
    np.testing.assert_allclose(backend.encode_pixels(pixels), expected.encode_pixels(pixels), atol=1e-5)
    np.testing.assert_allclose(backend.encode_tokens(IDS), expected.encode_tokens(IDS), atol=1e-5)
    assert (backend.resolution, backend.embed_dim) == (32, 512)
    assert backend.facts.logit_scale == pytest.approx(float(tiny.logit_scale.detach().exp()))
    with pytest.raises(ConfigError, match="takes texts of at most 4 tokens, got 5"):
        backend.encode_tokens(np.ones((1, 5), dtype=np.int64))
    with pytest.raises(ConfigError, match="no text model was opened"):
        open_files("tensorrt", tmp_path / "image", None, device="cuda").encode_tokens(IDS)
    with pytest.raises(CheckpointError, match=r"text: expected the image model.*are the two files swapped"):
        TensorRtTower(tmp_path / "text", "image")


def test_fixed_sizes_stay_fixed_and_engines_without_metadata_run(
    runtime: Runtime, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
) -> None:
    shaped: dict[Kind, list[int]] = {"image": [2, 3, 32, 32], "text": [2, 6]}
    for kind in KINDS:
        path = fixed(files[kind], tmp_path, shaped[kind])
        build_engine(path, kind, tmp_path / kind, Build("fp32", batch=2, max_batch=2, context_length=6))
        proto = onnx.load(tmp_path / kind)
        del proto.metadata_props[:]
        onnx.save_model(proto, tmp_path / kind)
    assert not any("trt_profile_min_shapes" in options for options in runtime.built)
    backend = open_files("tensorrt", tmp_path / "image", tmp_path / "text", device="cuda")
    pixels, expected = tiny_pixels(tiny, 3).numpy(), TorchBackend(tiny)
    np.testing.assert_allclose(backend.encode_pixels(pixels), expected.encode_pixels(pixels), atol=1e-5)
    np.testing.assert_allclose(backend.encode_tokens(IDS), expected.encode_tokens(IDS), atol=1e-5)
    with pytest.raises(ConfigError, match=r"image.onnx: was exported for batches of 2; use --batch-size 2"):
        build_engine(tmp_path / "image.onnx", "image", tmp_path / "e", Build("fp32"))
    with pytest.raises(ConfigError, match=r"text.onnx: was exported for texts of 6 tokens; use --context-length 6"):
        build_engine(tmp_path / "text.onnx", "text", tmp_path / "e", Build("fp32", batch=2, max_batch=2))


def test_engine_of_another_version_or_gpu_says_how_to_build_it_again(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path
) -> None:
    flags = ["--convert-vision", "--vision-onnx-path", files["image"], "--save-tensorrt-path", tmp_path / "e"]
    convert(*flags, "--fp16")
    engine = tmp_path / "e.img.fp16.trt"
    runtime.version = "10.10.0"
    with pytest.raises(CheckpointError) as caught:
        TensorRTModel(engine)
    versions = f"ONNX Runtime {onnxruntime.__version__} and TensorRT ?"
    assert str(caught.value) == (
        f"{engine}: cannot be opened by ONNX Runtime on tensorrt (TensorRT EP could not deserialize engine from binary "
        f"data); if the file is damaged, export it again; the engine was built with {versions}, here is {versions}, "
        "and engines run on the kind of GPU and the TensorRT that built them; build it again: "
        "python cn_clip/deploy/onnx_to_tensorrt.py --model-arch ViT-B-16 --convert-vision "
        f"--vision-onnx-path {files['image']} --save-tensorrt-path {tmp_path}/e --fp16"
    )


def test_files_that_are_no_engines_say_what_to_do(runtime: Runtime, files: dict[Kind, Path], tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"gone: cannot be read \(No such file or directory\); build the engine with python"
    ):
        TensorRTModel(tmp_path / "gone")
    (tmp_path / "raw").write_bytes(b"ftrt\0\0a raw TensorRT engine")
    shutil.copy(files["image"], tmp_path / "onnx")
    for name in ("raw", "onnx"):
        with pytest.raises(CheckpointError) as caught:
            TensorRTModel(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path}/{name}: is not an engine for ONNX Runtime; raw TensorRT engines, which Chinese-CLIP and older "
            "versions of this package write, cannot be opened: build it again from the ONNX file with "
            "python cn_clip/deploy/onnx_to_tensorrt.py"
        )
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="pointer: is a git-LFS pointer"):
        TensorRTModel(tmp_path / "pointer")


def test_reasons_of_the_builder_are_told_and_nothing_is_written(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    flags = [*both(files, tmp_path / "out" / "e"), "--fp16"]
    runtime.failure = "In node 3 (importGelu): UNSUPPORTED_NODE"
    assert refused(capsys, *flags) == (
        f"{files['text']}: cannot be opened by ONNX Runtime on tensorrt (In node 3 (importGelu): UNSUPPORTED_NODE); "
        "if the file is damaged, export it again"
    )
    runtime.failure, runtime.writes_nothing = None, True
    assert refused(capsys, *flags).startswith(
        f"{files['text']}: ONNX Runtime wrote no engine of it; its log says which"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_failed_build_leaves_the_engine_that_was_there(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--convert-text", "--text-onnx-path", files["text"], "--save-tensorrt-path", tmp_path / "e", "--fp32"]
    convert(*flags)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    runtime.run_failure = "no kernel image is available"
    assert refused(capsys, *flags) == (
        f"{files['text']}: TensorRT stopped (no kernel image is available); its log may say more"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_engine_that_computes_something_else_is_not_written(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TensorRtTower.run
    monkeypatch.setattr(TensorRtTower, "run", lambda self, inputs: run(self, inputs) * np.nan)
    with pytest.raises(CheckpointError, match=r"image.onnx: its fp16 engine differs.*cosine nan, tolerance 0.999"):
        build_engine(files["image"], "image", tmp_path / "e", Build("fp16"))
    assert list(tmp_path.iterdir()) == []


def test_workspace_and_timing_cache_reach_the_builder(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--convert-vision", "--vision-onnx-path", files["image"], "--save-tensorrt-path", tmp_path / "e"]
    flags += ["--fp32", "--workspace-gib", 1.5, "--timing-cache", tmp_path / "timing"]
    assert refused(capsys, *flags) == f"--timing-cache {tmp_path}/timing: no such folder; create it first"
    (tmp_path / "timing").mkdir()
    convert(*flags)
    (options,) = runtime.built
    assert options["trt_max_workspace_size"] == "1610612736"
    assert (options["trt_timing_cache_enable"], options["trt_timing_cache_path"]) == ("1", str(tmp_path / "timing"))


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
            "--convert-text --text-onnx-path t --save-tensorrt-path e --fp16 --fp16-banned-ops Add",
            "--fp16-banned-ops: ONNX Runtime builds the engine and cannot keep single layers in float32; leave it out",
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
def test_command_refuses(runtime: Runtime, flags: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, *flags.split())


def test_command_refuses_files_that_do_not_fit(
    runtime: Runtime, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        f"{tmp_path}/junk.onnx: cannot be opened by ONNX Runtime on cpu"
    )
    assert runtime.built == []


def test_every_door_names_the_package_where_the_provider_is_missing(
    monkeypatch: pytest.MonkeyPatch, files: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    sentence = (
        "the tensorrt backend needs the package `onnxruntime-gpu`: the ONNX Runtime that is installed has no TensorRT "
        "provider; install it with: pip uninstall onnxruntime && pip install 'cn-clip-next[tensorrt]'"
    )
    for door in (
        lambda: Encoder("Emoji-Tiny", backend="tensorrt", precision="fp16"),
        lambda: TensorRTModel(tmp_path / "e"),
        lambda: open_files("tensorrt", tmp_path / "e", None, device="cuda"),
        lambda: build_engine(files["image"], "image", tmp_path / "e", Build("fp16")),
    ):
        with pytest.raises(MissingExtraError) as caught:
            door()
        assert str(caught.value) == sentence
    assert refused(capsys, *both(files, tmp_path / "e"), "--fp16") == sentence
    for device in ("cpu", "gpu", "cuda:x"):
        with pytest.raises(ConfigError, match=f"runs on cuda or cuda:N, got '{device}'"):
            tensor_rt.device_of(device)


def test_a_provider_that_cannot_start_is_told(runtime: Runtime, files: dict[Kind, Path], tmp_path: Path) -> None:
    build_engine(files["image"], "image", tmp_path / "e", Build("fp16"))
    runtime.falls_back = True
    with pytest.raises(
        ConfigError,
        match=r"device: TensorrtExecutionProvider was asked for, but ONNX Runtime fell back to CPU.*or use the",
    ):
        TensorRTModel(tmp_path / "e")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A download root with the text tower of Emoji-Tiny."""
    root = tmp_path_factory.mktemp("root")
    tower_files(Source("Emoji-Tiny", download_root=root), ["text"], "fp16")
    return root


@pytest.fixture
def options(exported: Path, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(exported / "exported", tmp_path / "exported")
    return {"backend": "tensorrt", "precision": "fp16", "download_root": tmp_path, "kinds": ["text"]}


@pytest.mark.long
def test_engines_are_built_once_and_again_for_another_version(
    runtime: Runtime, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def same_rows() -> None:
        rows = open_backend("Emoji-Tiny", **options).encode_tokens(IDS)
        cosines = (rows * open_backend("Emoji-Tiny").encode_tokens(IDS)).sum(axis=1)
        assert cosines.min() > 0.999  # float16

    same_rows()
    assert len(runtime.built) == 1
    assert profile(runtime.built[0]) == ["text:1x2", "text:32x52", "text:128x52"]
    assert "first use, building the TensorRT engine" in capsys.readouterr().err
    same_rows()
    assert len(runtime.built) == 1
    engine = next(tmp_path.rglob("model.onnxruntime*tensorrt.txt.fp16.trt"))
    engine.write_bytes(b"x" * engine.stat().st_size)
    same_rows()
    assert "building again" in capsys.readouterr().err
    assert len(runtime.built) == 2
    runtime.version = "10.10.0"
    same_rows()
    assert "could not deserialize" in capsys.readouterr().err
    assert len(runtime.built) == 3


def test_a_failed_first_build_is_tried_again_the_next_time(
    runtime: Runtime, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.failure = "out of workspace"
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot be opened by ONNX Runtime on tensorrt"):
            open_backend("Emoji-Tiny", **options)
    assert len(runtime.built) == 2
    assert "again" not in capsys.readouterr().err
    runtime.failure = None
    assert open_backend("Emoji-Tiny", **options).encode_tokens(IDS).shape == (2, 256)


def test_cached_engines_are_built_and_opened_on_the_gpu_that_is_named(
    runtime: Runtime, options: dict[str, Any], tmp_path: Path
) -> None:
    open_backend("Emoji-Tiny", device="cuda:1", **options)
    assert {one["device_id"] for one in [*runtime.built, *runtime.opened]} == {"1"}
    assert list(tmp_path.rglob("*tensorrt1.txt.fp16.trt"))


def test_no_rows_give_no_rows(runtime: Runtime, files: dict[Kind, Path], tmp_path: Path) -> None:
    build_engine(files["text"], "text", tmp_path / "e", Build("fp32"))
    assert TensorRtTower(tmp_path / "e", "text").run(IDS[:0]).shape == (0, 512)


def test_encoder_opens_the_prefix_of_engines(
    runtime: Runtime, tiny: CLIP, files: dict[Kind, Path], tmp_path: Path
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
    runtime: Runtime, files: dict[Kind, Path], tiny: CLIP
) -> None:
    shape = TensorRTShape((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32), "image")
    model = tensorrt_utils.build_engine(
        runtime=None,
        onnx_file_path=str(files["image"]),
        logger=tensorrt_utils.TRT_LOGGER,
        input_shapes=[shape],
        workspace_size=2**31,
        fp16=False,
        int8=False,
    )
    assert profile(runtime.built[-1]) == ["image:1x3x32x32", "image:2x3x32x32", "image:4x3x32x32"]
    assert runtime.built[-1]["trt_max_workspace_size"] == str(2**31)
    assert model({"image": tiny_pixels(tiny, 4)})["unnorm_image_features"].shape == (4, 512)
    lengths = {"min_shape": (1, 8), "optimal_shape": (1, 8), "max_shape": (1, 8)}
    text = tensorrt_utils.build_engine(None, str(files["text"]), None, True, False, **lengths)
    assert text.shapes["text"][2] == [1, 8]
    with pytest.raises(ConfigError, match="int8"):
        tensorrt_utils.build_engine(None, str(files["text"]), None, True, True, **lengths)
    with pytest.raises(AssertionError, match="input_shapes"):
        tensorrt_utils.build_engine(None, str(files["text"]), None, True, False)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("fix_fp16_network", [None]), ("get_binding_idxs", [None, 0]), ("get_output_tensors", [None, [], [], []])],
)
def test_helpers_over_bindings_say_that_there_are_none(name: str, arguments: list[Any]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: TensorRT runs inside ONNX Runtime here"):
        getattr(tensorrt_utils, name)(*arguments)


def test_an_opened_engine_times_its_calls_and_opens_others(
    runtime: Runtime, files: dict[Kind, Path], tiny: CLIP, tmp_path: Path
) -> None:
    build_engine(files["image"], "image", tmp_path / "e.trt", Build("fp32", max_batch=3))
    build_engine(files["text"], "text", tmp_path / "t.trt", Build("fp32"))
    model, seconds = TensorRTModel(str(tmp_path / "e.trt")), []
    pixels = tiny_pixels(tiny)
    outputs = model(inputs={"image": pixels}, time_buffer=seconds)
    assert torch.equal(outputs["unnorm_image_features"], model({"image": pixels})["unnorm_image_features"])
    assert [one > 0 for one in seconds] == [True]
    model.load_engine(str(tmp_path / "t.trt"))
    assert set(model({"text": torch.from_numpy(IDS[:1])})) == {"unnorm_text_features"}
    with pytest.raises(CheckpointError, match="none: cannot be read"):
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
    if fake_tensorrt.PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    for precision, tolerance in (("fp32", 0.9999), ("fp16", 0.999)):
        convert(*both(files, tmp_path / "e"), f"--{precision}", "--batch-size", 2, "--max-batch-size", 4)
        image, text = (tensor_rt.engine_path(tmp_path / "e", kind, precision) for kind in KINDS)
        backend, expected = open_files("tensorrt", image, text, device="cuda"), TorchBackend(tiny)
        pixels = tiny_pixels(tiny, 5).numpy()
        assert (backend.encode_pixels(pixels) * expected.encode_pixels(pixels)).sum(axis=1).min() > tolerance
        assert (backend.encode_tokens(IDS) * expected.encode_tokens(IDS)).sum(axis=1).min() > tolerance
        found = TensorRTModel(image)({"image": torch.from_numpy(pixels[:1]).cuda()})["unnorm_image_features"]
        assert found.shape == (1, 512)
        assert found.is_cuda
