"""The cache of exported models: made once, told in few lines, never believed when it is not whole."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python

from cn_clip import digests, zoo
from cn_clip.clip import Encoder
from cn_clip.clip.backends import exported
from cn_clip.clip.backends.base import ExportedBackend
from cn_clip.clip.backends.exported import DAMAGED, FIRST_USE, Source, tower_files
from cn_clip.clip.backends.onnx_files import extra_path, onnx_path
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.model import CLIP
from cn_clip.errors import CheckpointError, ConfigError

TEXTS = ["一只小狗", "红苹果"]
APART = """
import sys
from cn_clip.clip.backends.exported import Source, tower_files
print(tower_files(Source(sys.argv[1], download_root=sys.argv[2]), ["text"], sys.argv[3])["text"])
"""
# Killed when the weights of a float16 file are at their place and the file that names them is not.
KILLED = """
import os, signal, sys
from cn_clip.clip.backends import onnx_files
replace = os.replace
def killing(source, target):
    if str(target).endswith("fp16.onnx"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
onnx_files.os.replace = killing
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"))
    path = tmp_path_factory.mktemp("weights") / "小模型.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def both_processes(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A root whose cache two processes asked for at once, and what they printed to stdout and stderr."""
    root = tmp_path_factory.mktemp("both")
    runs = [start(APART, weights, root, "fp32") for _ in range(2)]
    printed = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    return root, printed


@pytest.fixture
def root(both_processes: tuple[Path, object], tmp_path: Path) -> Path:
    """A copy of a root where the text tower is exported in float32."""
    return Path(shutil.copytree(both_processes[0], tmp_path / "root"))


CLOSE = "model.txt.fp32.onnx: cosine to float32: "


def start(code: str, *arguments: object, python: str | None = None) -> "subprocess.Popen[str]":
    strict = f"import warnings\nwarnings.simplefilter('error')\n{code}"
    command = [python or warm_python.program(), "-c", strict, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files_in(folder: Path) -> list[str]:
    """Without what `digests` remembers of them."""
    return sorted(path.name for path in folder.iterdir() if path.name != digests.VERIFIED)


def text_file(weights: Path, root: Path, form: str = "fp32") -> Path:
    return onnx_path(Source(weights, download_root=root).folder() / "model", "text", form)


def encoded(
    weights: Path, root: Path, said: list[str], precision: str = "fp32"
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    backend = open_backend(
        weights, backend="onnx", precision=precision, device="cpu", download_root=root, kinds=["text"], say=said.append
    )
    assert isinstance(backend, ExportedBackend)
    return Encoder(backend).encode_texts(TEXTS)


def test_two_processes_at_once_export_once_and_one_says_so(
    weights: Path, both_processes: tuple[Path, list[tuple[str, str]]]
) -> None:
    root, printed = both_processes
    path = text_file(weights, root)
    assert [out for out, _ in printed] == [f"{path}\n"] * 2
    said = sorted((err.splitlines() for _, err in printed), key=len)
    assert len(said[0]) <= 1
    assert all(line.startswith(f"{path.parent}: {exported.WAITING[1]} (pid ") for line in said[0])
    first, report = said[1]
    assert first == f"{FIRST_USE[1]} {weights} (text, fp32) -> {path.parent}"
    assert report.startswith("model.txt.fp32.onnx: cosine to float32: min 1.000000, mean 1.000000 (32")
    assert files_in(path.parent) == ["manifest.json", "model.txt.fp32.onnx"]


def test_a_later_use_says_nothing_and_computes_what_pytorch_does(weights: Path, root: Path) -> None:
    said: list[str] = []
    rows = encoded(weights, root, said)
    assert said == []
    np.testing.assert_allclose(rows, Encoder(weights, device="cpu").encode_texts(TEXTS), atol=1e-5)


def test_another_precision_is_made_of_the_float32_file_without_pytorch(weights: Path, root: Path) -> None:
    code = APART + "assert 'torch' not in sys.modules, 'torch'"
    run = start(code, weights, root, "int8", python=sys.executable)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out == f"{text_file(weights, root, 'int8')}\n"
    first, report = err.splitlines()
    assert first == f"{FIRST_USE[1]} {weights} (text, int8) -> {text_file(weights, root).parent}"
    assert report.startswith("model.txt.int8.onnx: cosine to float32: min 0.99")


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone", "a page of zeros", "a bit"])
def test_a_damaged_file_is_exported_again_once_with_one_line(weights: Path, root: Path, damage: str) -> None:
    exact = encoded(weights, root, [])
    path = text_file(weights, root)
    size = path.stat().st_size
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "a page of zeros":  # among the weights, where every reader takes it
        place = size // 2 // 4096 * 4096
        path.write_bytes(data[:place] + bytes(4096) + data[place + 4096 :])
    elif damage == "a bit":
        data[size // 3] ^= 0x40
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-100] if damage == "cut" else b"\xff" * size)
    said: list[str] = []
    np.testing.assert_allclose(encoded(weights, root, said), exact, atol=1e-6)
    assert all(line.startswith(words) for line, words in zip(said, (DAMAGED[1], CLOSE), strict=True)), said
    assert path.stat().st_size == size
    encoded(weights, root, said)
    assert len(said) == 2


def test_a_damaged_float32_file_does_not_spoil_what_is_made_of_it(weights: Path, root: Path) -> None:
    path = text_file(weights, root)
    path.write_bytes(b"\xff" * path.stat().st_size)
    said: list[str] = []
    rows = encoded(weights, root, said, "fp16")
    begins = (FIRST_USE[1], DAMAGED[1], CLOSE, CLOSE.replace("fp32", "fp16"))
    assert all(line.startswith(words) for line, words in zip(said, begins, strict=True)), said
    np.testing.assert_allclose(rows, Encoder(weights, device="cpu").encode_texts(TEXTS), atol=2e-3)


def test_what_a_killed_export_leaves_is_not_taken_for_whole(weights: Path, root: Path) -> None:
    run = start(KILLED + APART, weights, root, "fp16")
    run.communicate(timeout=120)
    assert run.returncode == -9
    path = text_file(weights, root, "fp16")
    assert extra_path(path).exists()
    assert not path.exists()
    assert (path.parent / exported.BUILDING).is_dir()
    said: list[str] = []
    encoded(weights, root, said, "fp16")
    assert said[0].startswith(FIRST_USE[1])
    assert len(said) == 2
    assert path.exists()
    assert not (path.parent / exported.BUILDING).exists()


def test_files_of_a_version_that_kept_no_digests_are_exported_again(weights: Path, root: Path) -> None:
    path = text_file(weights, root)
    (path.parent / exported.MANIFEST).write_text(json.dumps({path.name: {path.name: path.stat().st_size}}))
    said: list[str] = []
    encoded(weights, root, said)
    assert said[0].startswith(FIRST_USE[1])
    assert json.loads((path.parent / exported.MANIFEST).read_text())[path.name][path.name]["digest"]


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"a": 3}', '{"a": {"b": {"c": 1}}}', '{"a": {"b": []}}'])
def test_a_manifest_that_is_none_means_that_nothing_is_there(tmp_path: Path, content: str) -> None:
    (tmp_path / exported.MANIFEST).write_text(content)
    assert exported.kept_file(tmp_path / "x", lambda: (tmp_path / "x").write_bytes(b"1")) == tmp_path / "x"
    assert json.loads((tmp_path / exported.MANIFEST).read_text())["x"]["x"]["bytes"] == 1


def test_a_fp16_file_whose_weights_are_gone_is_made_again(weights: Path, root: Path) -> None:
    encoded(weights, root, [], "fp16")
    extra_path(text_file(weights, root, "fp16")).unlink()
    said: list[str] = []
    encoded(weights, root, said, "fp16")
    assert said[0].startswith(DAMAGED[1])


def test_changed_weights_have_a_cache_of_their_own(weights: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(weights, tmp_path / "own.pt"))
    before = Source(own, download_root=tmp_path).folder()
    assert Source(own, download_root=tmp_path).folder() == before
    assert Source(own, text="RBT3-chinese", download_root=tmp_path).folder() != before
    status = own.stat()
    os.utime(own, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    after = Source(own, download_root=tmp_path).folder()
    assert after != before
    assert after.parent == tmp_path / "exported"


def test_a_model_that_cannot_be_exported_faithfully_leaves_no_file(
    weights: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cn_clip.clip.backends.parity.TOLERANCES", {"int8": 1.0, "fp32": 0.9})
    with pytest.raises(CheckpointError, match=r"model.txt.int8.onnx: differs from float32 by more than int8 may"):
        encoded(weights, root, [], "int8")
    folder = text_file(weights, root).parent
    assert files_in(folder) == ["manifest.json", "model.txt.fp32.onnx"]


def test_a_root_that_cannot_be_written_is_a_sentence(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        tower_files(Source(weights, download_root=tmp_path / "file"), ["text"], "fp32")
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'exported'}")
    assert str(caught.value).endswith(
        "exported models cannot be kept there (Not a directory); choose another download_root"
    )


def test_an_error_of_the_work_is_not_said_to_be_one_of_the_cache(tmp_path: Path) -> None:
    def make() -> None:
        raise FileNotFoundError(2, "No such file or directory", "elsewhere")

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        exported.kept_file(tmp_path / "a" / "x", make)


def test_who_waits_for_the_lock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "PATIENCE_S", 0.01)
    said: list[str] = []
    with exported._alone(tmp_path):
        waiting = threading.Thread(target=lambda: exported._alone(tmp_path, said.append).__enter__())
        waiting.start()
        waiting.join(0.5)
        assert [line.partition(" (pid ")[0] for line in said] == [f"{tmp_path}: {exported.WAITING[1]}"]
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_kept_file_that_is_whole_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    made: list[int] = []

    def make() -> None:
        made.append(path.write_bytes(b"1234"))

    assert exported.kept_file(path, make) == path
    monkeypatch.setattr(exported, "_alone", lambda *_: pytest.fail("asked for the lock"))
    exported.kept_file(path, make)
    assert made == [4]


def test_a_folder_named_by_a_dot_has_its_name_in_the_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "模型").mkdir()
    shutil.copy(weights, tmp_path / "模型" / "a.pt")
    monkeypatch.chdir(tmp_path / "模型")
    monkeypatch.setattr(exported.hub, "weight_file", lambda *_, **__: Path("."))
    assert Source(".", download_root=tmp_path).folder().name.startswith("模型-")


def test_a_finished_cache_needs_no_lock_so_it_may_be_read_only(
    weights: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise AssertionError("asked for the lock")

    monkeypatch.setattr(exported, "_alone", refuse)
    assert encoded(weights, root, []).shape == (2, 64)
