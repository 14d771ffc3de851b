"""Extraction and zero-shot classification through every backend, as typed: the same features, the same accuracy."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dataset_files import REPOSITORY, jsonl_line, tsv_line, write_split

from cn_clip.clip.backends import tensor_rt
from cn_clip.clip.backends.exported import Source, tower_files
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.demo import emoji
from cn_clip.eval import extract_features, extract_features_onnx, extract_features_tensorrt, zeroshot_evaluation
from cn_clip.features.files import read_features
from cn_clip.preprocess import build_lmdb_dataset

BACKENDS = ["onnx", "openvino"]
NUM_PICTURES = 12
# Says at the end of a command whether PyTorch was imported.
WITHOUT_TORCH = """
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(f"\\ntorch imported: {'torch' in sys.modules}\\n"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Workplace:
    """A few emoji as a dataset and as classes, and the exports of Emoji-Tiny in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, folder / "models"
        pictures = [(one, emoji.png(one)) for one in emoji.load()[:NUM_PICTURES]]
        images = [tsv_line(one.number, data) for one, data in pictures]
        write_split(folder, images, [jsonl_line(one.number, one.name) for one, _ in pictures], split="valid")
        build_lmdb_dataset.main(["--data_dir", str(folder), "--splits", "valid"])
        emoji.write_classification(
            folder / "classes", {label: emoji.CLASSES[label] for label in ("时钟", "心", "轮椅")}
        )

    def inputs(self, *kinds: str) -> list[str]:
        flags = [f"--extract-{kind}-feats" for kind in kinds or ("image", "text")]
        return [*flags, f"--image-data={self.folder}/lmdb/valid/imgs", f"--text-data={self.folder}/valid_texts.jsonl"]

    def script(self, name: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HOME": str(self.folder)}
        command = [sys.executable, "-c", WITHOUT_TORCH, f"cn_clip/eval/{name}.py", *flags]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    def model(self, backend: str) -> list[str]:
        shared = ["--resume=Emoji-Tiny", "--device=cpu", "--num-threads=1", f"--download-root={self.models}"]
        return [*shared, f"--backend={backend}"]

    def exported(self) -> list[str]:
        return sorted(path.name for path in self.models.glob("exported/*/*.onnx"))

    def file(self, name: str) -> str:
        (found,) = self.models.glob(f"exported/*/model.{name}.fp32.onnx")
        return str(found)

    def features(self) -> dict[str, np.ndarray]:
        images = read_features(self.folder / "valid_imgs.img_feat.jsonl", "image_id")
        texts = read_features(self.folder / "valid_texts.txt_feat.jsonl", "text_id")
        assert (len(images.ids), len(texts.ids)) == (NUM_PICTURES, NUM_PICTURES)
        return {"image": images.vectors, "text": texts.vectors}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("backends"))


@pytest.fixture(scope="module")
def by_torch(workplace: Workplace) -> tuple[dict[str, np.ndarray], float]:
    """The features, and the share of the pictures that zero-shot classification gets right."""
    threads = torch.get_num_threads()
    extract_features.main([*workplace.inputs(), *workplace.model("torch")])
    with contextlib.redirect_stdout(io.StringIO()) as told:
        zeroshot_evaluation.main([*classes(workplace), *workplace.model("torch")])
    torch.set_num_threads(threads)
    return workplace.features(), json.loads(told.getvalue())["zeroshot-top1"]


@pytest.fixture(scope="module")
def exports(workplace: Workplace) -> Workplace:
    """The workplace, once both towers are exported."""
    tower_files(Source("Emoji-Tiny", download_root=workplace.models), KINDS, "fp32")
    assert workplace.exported() == ["model.img.fp32.onnx", "model.txt.fp32.onnx"]
    return workplace


def classes(workplace: Workplace) -> list[str]:
    folder = workplace.folder / "classes"
    data = [f"--datapath={folder}/test", f"--label-file={folder}/label_cn.txt", "--dataset=emoji", "--json"]
    return [*data, f"--save-dir={folder}"]


def zeroshot(workplace: Workplace, backend: str) -> tuple[float, str]:
    done = workplace.script("zeroshot_evaluation", *classes(workplace), *workplace.model(backend))
    return json.loads(done.stdout)["zeroshot-top1"], done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_and_accuracy_are_those_of_torch_without_importing_it(
    backend: str, exports: Workplace, by_torch: tuple[dict[str, np.ndarray], float]
) -> None:
    done = exports.script("extract_features", *exports.inputs(), *exports.model(backend))
    assert "torch imported: False" in done.stderr
    assert f"=> opened 'Emoji-Tiny' ({backend}, fp32)" in done.stdout.splitlines()
    for kind, rows in exports.features().items():
        np.testing.assert_allclose(rows, by_torch[0][kind], atol=2e-5, err_msg=kind)
    accuracy, told = zeroshot(exports, backend)
    assert "torch imported: False" in told
    assert accuracy == by_torch[1] > 0.5
    assert not (exports.folder / ".cache" / "clip").exists()


# --- files by their names


def fixed(path: str, folder: Path, shape: list[int]) -> str:
    """The same model for inputs of one shape alone, without metadata: what Chinese-CLIP exports."""
    model = onnx.load(path)
    for place, size in enumerate(shape):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = size
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = shape[0]
    del model.metadata_props[:]
    onnx.save(model, folder / f"fixed.{Path(path).name}")
    return str(folder / f"fixed.{Path(path).name}")


@pytest.fixture(scope="module")
def reference_files(exports: Workplace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fixed")
    shapes = {"img": [1, 3, 64, 64], "txt": [1, 52]}
    return {name: fixed(exports.file(name), folder, shape) for name, shape in shapes.items()}


def test_the_onnx_script_computes_the_features_with_free_files_without_torch(
    exports: Workplace, by_torch: tuple[dict[str, np.ndarray], float]
) -> None:
    files = [f"--onnx-image-model={exports.file('img')}", f"--onnx-text-model={exports.file('txt')}"]
    batches = ["--img-batch-size=5", "--text-batch-size=4", "--context-length=52"]
    done = exports.script("extract_features_onnx", *exports.inputs(), *files, *batches, "--device=cpu")
    assert "torch imported: False" in done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert lines == [
        "Params:",
        f"=> opened '{exports.file('img')}' (CPUExecutionProvider)",
        f"=> opened '{exports.file('txt')}' (CPUExecutionProvider)",
        "Preparing image inference dataset.",
        "Preparing text inference dataset.",
        "Make inference for texts...",
        f"12 text features are stored in {exports.folder}/valid_texts.txt_feat.jsonl",
        "Make inference for images...",
        f"12 image features are stored in {exports.folder}/valid_imgs.img_feat.jsonl",
        "Done!",
    ]
    for kind, rows in exports.features().items():
        np.testing.assert_allclose(rows, by_torch[0][kind], atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("batches", [[], ["--img-batch-size=5", "--text-batch-size=4"]])
def test_files_for_one_picture_and_one_length_give_the_same_features(
    batches: list[str],
    exports: Workplace,
    reference_files: dict[str, str],
    by_torch: tuple[dict[str, np.ndarray], float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [f"--onnx-image-model={reference_files['img']}", f"--onnx-text-model={reference_files['txt']}"]
    extract_features_onnx.main([*exports.inputs(), *files, *batches, "--device=cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["num_images"] == NUM_PICTURES
    for kind, rows in exports.features().items():
        np.testing.assert_allclose(rows, by_torch[0][kind], atol=2e-5, err_msg=kind)


def test_only_the_file_that_is_needed_is_opened(exports: Workplace) -> None:
    flags = [f"--onnx-text-model={exports.file('txt')}", "--onnx-image-model=/nowhere.onnx", "--device=cpu"]
    extract_features_onnx.main([*exports.inputs("text"), *flags])


def test_without_a_device_named_the_processor_serves_where_there_is_no_cuda(
    exports: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    extract_features_onnx.main([*exports.inputs("text"), f"--onnx-text-model={exports.file('txt')}"])
    assert f"=> opened '{exports.file('txt')}' (CPUExecutionProvider)" in capsys.readouterr().out


def test_the_tensorrt_script_does_the_same_with_engines(
    exports: Workplace, by_torch: tuple[dict[str, np.ndarray], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def open_tower(path: str, kind: Kind, *, device: str) -> OnnxTower:
        devices.append(device)
        return OnnxTower(path, kind, device="cpu")

    monkeypatch.setattr(tensor_rt, "TensorRtTower", open_tower)
    engines = [f"--tensorrt-image-model={exports.file('img')}", f"--tensorrt-text-model={exports.file('txt')}"]
    extract_features_tensorrt.main([*exports.inputs(), *engines, "--device=cuda:1"])
    assert devices == ["cuda:1", "cuda:1"]
    for kind, rows in exports.features().items():
        np.testing.assert_allclose(rows, by_torch[0][kind], atol=2e-5, err_msg=kind)


def refuses(command: Any, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_info:
        command.main(flags)
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in told
    return int(str(exit_info.value.code)), told


@pytest.mark.parametrize(
    ("flags", "status", "reason"),
    [
        (["--device=cuda"], 1, "has no CUDAExecutionProvider, only CPUExecutionProvider; use --device cpu, or install"),
        (["--vision-model=ViT-B-16", "--device=cpu"], 1, "--vision-model ViT-B-16: takes 224 pixels a side"),
        (["--context-length=53", "--device=cpu"], 1, "takes texts of at most 52 tokens; use --context-length 52"),
        (["--onnx-text-model=/nowhere.onnx", "--device=cpu"], 1, "/nowhere.onnx: no such file"),
        (["--num-threads=0"], 2, "--num-threads: expected at least 1"),
    ],
)
def test_what_does_not_fit_the_files_is_refused_before_any_work(
    flags: list[str], status: int, reason: str, exports: Workplace, reference_files: dict[str, str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    files = [f"--onnx-image-model={reference_files['img']}", f"--onnx-text-model={reference_files['txt']}"]
    before = sorted(exports.folder.iterdir())
    found, told = refuses(extract_features_onnx, capsys, *exports.inputs(), *files, *flags)
    assert (found, reason in told) == (status, True), told
    assert sorted(exports.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "flag"),
    [(extract_features_onnx, "--onnx-text-model"), (extract_features_tensorrt, "--tensorrt-text-model")],
)
def test_a_file_that_is_not_given_is_asked_for(command: Any, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = refuses(command, capsys, "--extract-text-feats")
    assert (status, f"{flag}: expected the file of the text model" in told) == (2, True)


@pytest.mark.parametrize("command", [extract_features_onnx, extract_features_tensorrt])
@pytest.mark.parametrize("flag", ["--img-batch-size", "--text-batch-size"])
def test_a_batch_of_nothing_is_refused(command: Any, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = refuses(command, capsys, "--extract-text-feats", f"{flag}=0")
    assert (status, f"{flag}: expected at least 1, got 0" in told) == (2, True)


def test_the_model_that_is_named_fits_the_file(exports: Workplace) -> None:
    flags = ["--vision-model=RN-Small-64", f"--onnx-image-model={exports.file('img')}", "--device=cpu"]
    extract_features_onnx.main([*exports.inputs("image"), *flags])
