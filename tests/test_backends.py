"""Exported towers in ONNX Runtime and OpenVINO: rows, whatever shapes a file takes; a sentence for what is wrong."""

import functools
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_towers import LENGTH, RESOLUTION, expected_rows, some_inputs, weights, write_tower
from other_kinds import OTHER_KINDS

from cn_clip.clip import Encoder
from cn_clip.clip.backends import onnx_files, onnx_runtime
from cn_clip.clip.backends.base import ExportedBackend, Tower, TowerFacts, unit_rows
from cn_clip.clip.backends.names import Kind
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.backends.open_vino import OpenVinoTower, settings_for
from cn_clip.clip.backends.opening import open_backend
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, MissingExtraError, NotFiniteError

KINDS: tuple[Kind, ...] = ("image", "text")
OPENERS: dict[str, Any] = {"onnx": functools.partial(OnnxTower, device="cpu"), "openvino": OpenVinoTower}
BOTH = pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)


def backend_of(tower: Tower) -> ExportedBackend:
    return ExportedBackend(tower, None) if tower.facts.kind == "image" else ExportedBackend(None, tower)


def encode(backend: ExportedBackend, kind: Kind, inputs: Any) -> Any:
    return backend.encode_pixels(inputs) if kind == "image" else backend.encode_tokens(inputs)


# --- what is computed


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, "batch"])
def test_rows_are_right_whatever_batch_a_file_takes(tmp_path: Path, opener: Any, kind: Kind, batch: int | str) -> None:
    tower = opener(write_tower(tmp_path / "tower.onnx", kind, batch=batch), kind)
    assert tower.facts.batch == (None if batch == "batch" else batch)
    inputs = some_inputs(kind, 5)
    for count in (1, 5):
        rows = encode(backend_of(tower), kind, inputs[:count])
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected_rows(kind, inputs[:count]), atol=1e-5)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_files_with_float16_inputs_and_outputs_are_fed_and_read(tmp_path: Path, opener: Any, kind: Kind) -> None:
    backend = backend_of(opener(write_tower(tmp_path / "tower.onnx", kind, half=True), kind))
    inputs = some_inputs(kind, 3)
    rows = encode(backend, kind, inputs)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected_rows(kind, inputs), atol=5e-3)  # float16 has 11 bits


@BOTH
def test_rows_outlive_the_next_batch(tmp_path: Path, opener: Any) -> None:
    tower = opener(write_tower(tmp_path / "tower.onnx", "image", batch="batch"), "image")
    inputs = some_inputs("image", 4)
    first = tower.run(inputs[:2])
    tower.run(inputs[2:])
    np.testing.assert_allclose(unit_rows(first), expected_rows("image", inputs[:2]), atol=1e-5)


@BOTH
def test_texts_are_padded_to_the_length_of_a_file_and_longer_ones_are_refused(tmp_path: Path, opener: Any) -> None:
    path = write_tower(tmp_path / "tower.onnx", "text")
    backend = backend_of(opener(path, "text"))
    ids = some_inputs("text", 2)
    padded = ids.copy()
    padded[:, 9:] = 0
    np.testing.assert_allclose(backend.encode_tokens(ids[:, :9]), expected_rows("text", padded), atol=1e-5)
    with pytest.raises(ConfigError) as caught:
        backend.encode_tokens(np.ones((1, 53), np.int64))
    assert str(caught.value) == (
        f"{path}: was exported for texts of 52 tokens, got 53; use a context length of 52, or export it again"
    )


def test_texts_beyond_the_length_that_the_metadata_state_are_refused(tmp_path: Path) -> None:
    path = write_tower(tmp_path / "tower.onnx", "text", metadata=json.dumps({"kind": "text", "max_length": 20}))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    onnx.save(model, path)
    with pytest.raises(ConfigError, match=r"texts of at most 20 tokens, got 21; use a context length of 20, or export"):
        backend_of(OnnxTower(path, "text")).encode_tokens(np.ones((1, 21), np.int64))


# --- files that do not fit


@BOTH
def test_swapped_files_are_told(tmp_path: Path, opener: Any) -> None:
    path = write_tower(tmp_path / "img.onnx", "image")
    with pytest.raises(CheckpointError) as caught:
        opener(path, "text")
    assert str(caught.value).startswith(f"{path}: expected the text model, with the input 'text' and the output")
    assert str(caught.value).endswith("are the two files swapped, or is it another model?")


@BOTH
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, "这不是模型".encode(), None], ids=["empty", "zeros", "text", "none"]
)
def test_what_is_no_model_is_a_sentence(tmp_path: Path, opener: Any, content: bytes | None) -> None:
    path = tmp_path / "tower.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        opener(path, "image")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("{", "its metadata 'cn_clip' cannot be read"),
        ("7", "its metadata 'cn_clip' cannot be read"),
        ("[]", "its metadata 'cn_clip' cannot be read"),
        ('{"kind": ["image"]}', "its metadata 'cn_clip' cannot be read"),
        ('{"left_out": 3}', "its metadata 'cn_clip' cannot be read"),
        ('{"left_out": [3]}', "its metadata 'cn_clip' cannot be read"),
        ('{"logit_scale": "100"}', "its metadata 'cn_clip' cannot be read"),
        ('{"num_parameters": true}', "its metadata 'cn_clip' cannot be read"),
        ('{"weights": {}}', "its metadata 'cn_clip' cannot be read"),
        ('{"kind": "text"}', "is the text model; expected the image model"),
    ],
)
def test_damaged_metadata_are_a_sentence(tmp_path: Path, metadata: str, expected: str) -> None:
    path = write_tower(tmp_path / "tower.onnx", "image", metadata=metadata)
    with pytest.raises(CheckpointError, match=expected):
        OnnxTower(path, "image")


def test_towers_of_different_models_are_refused(tmp_path: Path) -> None:
    narrow = OnnxTower(write_tower(tmp_path / "narrow.onnx", "image"), "image")
    wide = OnnxTower(write_tower(tmp_path / "wide.onnx", "text", width=6), "text")
    with pytest.raises(ConfigError, match=r"narrow.onnx gives 4 dimensions, .*wide.onnx gives 6; give the two files"):
        ExportedBackend(narrow, wide)
    known = [
        OnnxTower(write_tower(tmp_path / f"{kind}.onnx", kind, metadata=json.dumps({"weights": kind})), kind)
        for kind in KINDS
    ]
    with pytest.raises(ConfigError, match="were exported from different weights; give files of one model"):
        ExportedBackend(*known)


def test_a_missing_tower_is_an_error_only_when_it_is_asked_for(tmp_path: Path) -> None:
    backend = backend_of(OnnxTower(write_tower(tmp_path / "tower.onnx", "image"), "image"))
    assert (backend.resolution, backend.embed_dim) == (RESOLUTION, 4)
    with pytest.raises(ConfigError, match=r"no text model was opened, only .*tower.onnx; give both files"):
        backend.encode_tokens(np.ones((1, LENGTH), np.int64))


def test_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    backend = backend_of(OnnxTower(write_tower(tmp_path / "tower.onnx", "image"), "image"))
    with pytest.raises(ConfigError, match=r"takes pictures \(B, \(3, 8, 8\)\), got the shape \(1, 3, 16, 16\)"):
        backend.encode_pixels(np.zeros((1, 3, 16, 16), np.float32))


# --- weights outside


@BOTH
def test_weights_outside_move_with_the_file_and_are_missed_without(tmp_path: Path, opener: Any) -> None:
    model = onnx.load(write_tower(tmp_path / "plain.onnx", "image"))
    path = tmp_path / "tower.onnx"
    onnx_files.save(model, path, outside=True)
    assert onnx_files.outside_files(path) == ["tower.onnx.extra_file"]
    assert onnx_files.extra_path(path).stat().st_size == weights("image").nbytes
    assert onnx_files.extra_path(path).stat().st_mode == path.stat().st_mode
    (tmp_path / "moved").mkdir()
    moved = onnx_files.move(path, tmp_path / "moved")
    inputs = some_inputs("image", 2)
    np.testing.assert_allclose(
        backend_of(opener(moved, "image")).encode_pixels(inputs), expected_rows("image", inputs), atol=1e-5
    )
    onnx_files.extra_path(moved).unlink()
    with pytest.raises(CheckpointError) as caught:
        opener(moved, "image")
    assert str(caught.value) == (
        f"{moved}: its weights are in tower.onnx.extra_file, which is not beside it; copy both files together"
    )


def test_saving_inside_leaves_no_weights_of_an_earlier_file(tmp_path: Path) -> None:
    model = onnx.load(write_tower(tmp_path / "plain.onnx", "image"))
    for outside in (True, False):
        (tmp_path / "scratch").mkdir(exist_ok=True)
        onnx_files.save(model, tmp_path / "scratch" / "tower.onnx", outside=outside)
        onnx_files.move(tmp_path / "scratch" / "tower.onnx", tmp_path)
        assert (tmp_path / "tower.onnx.extra_file").exists() == outside
        model = onnx.load(tmp_path / "tower.onnx")


# --- machines and packages


def test_cuda_without_its_provider_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError) as caught:
        OnnxTower(write_tower(tmp_path / "tower.onnx", "image"), "image", device="cuda")
    assert "has no CUDAExecutionProvider, only" in str(caught.value)
    assert str(caught.value).endswith("pip uninstall onnxruntime && pip install onnxruntime-gpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """ONNX Runtime built for CUDA where there is none: it falls back. The providers that are asked for."""
    import onnxruntime

    opened = onnxruntime.InferenceSession
    asked: list[Any] = []

    def fallen_back(place: str, settings: object, *, providers: list[Any]) -> object:
        asked.append(providers)
        print("EP Error: falling back")  # as ONNX Runtime does
        return opened(place, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    return asked


def test_falling_back_from_what_was_asked_for_is_an_error(tmp_path: Path, no_gpu: list[Any]) -> None:
    path = write_tower(tmp_path / "tower.onnx", "image")
    with pytest.raises(ConfigError, match=r'CUDAExecutionProvider was asked for, .* fell back to CPU.*device="cpu"'):
        OnnxTower(path, "image", device="cuda:1")
    # Without the option, products of float32 are those of TF32, which has 11 bits.
    assert no_gpu == [[("CUDAExecutionProvider", {"use_tf32": "0", "device_id": "1"}), "CPUExecutionProvider"]]


@pytest.mark.parametrize("device", [None, "auto"])
def test_without_a_device_named_falling_back_is_said_once(
    tmp_path: Path, no_gpu: list[Any], device: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tower(tmp_path / "tower.onnx", "image", batch="batch")
    onnx_runtime.say_fallen_back.cache_clear()
    towers = [OnnxTower(path, "image", device=device) for _ in range(2)]
    assert [(tower.provider, tower.on_gpu) for tower in towers] == [("CPUExecutionProvider", False)] * 2
    inputs = some_inputs("image", 2)
    np.testing.assert_allclose(backend_of(towers[0]).encode_pixels(inputs), expected_rows("image", inputs), atol=1e-5)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "CUDAExecutionProvider cannot be used here; computing on the CPU" in err


def test_int8_in_onnx_runtime_is_for_the_processor(tmp_path: Path, no_gpu: list[Any]) -> None:
    write_tower(tmp_path / "tiny.img.int8.onnx", "image")
    backend = open_backend(tmp_path / "tiny", backend="onnx", precision="int8")
    assert backend.image.provider == "CPUExecutionProvider"  # type: ignore[attr-defined]
    assert no_gpu == [[("CPUExecutionProvider", {})]]
    with pytest.raises(ConfigError, match="device: the onnx backend computes int8 on cpu, got 'cuda'; use fp16 or cpu"):
        open_backend(tmp_path / "tiny", backend="onnx", precision="int8", device="cuda")


@pytest.mark.parametrize(("flags", "is_set"), [({"avx2", "avx512f"}, True), (set(), True), ({"avx_vnni"}, False)])
def test_int8_products_are_exact_on_processors_without_vnni(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: set[str], is_set: bool
) -> None:
    import onnxruntime

    monkeypatch.setattr("cn_clip.ranks.processor", lambda: ("a processor", flags))
    entries: list[tuple[str, str]] = []
    options = onnxruntime.SessionOptions

    class Recorded(options):  # type: ignore[misc, valid-type]
        def add_session_config_entry(self, key: str, value: str) -> None:
            entries.append((key, value))

    monkeypatch.setattr("onnxruntime.SessionOptions", Recorded)
    OnnxTower(write_tower(tmp_path / "tower.onnx", "image"), "image", device="cpu")
    assert entries == ([("session.x64quantprecision", "1")] if is_set else [])


def test_a_file_that_opens_elsewhere_is_not_exported_again(
    tmp_path: Path, exported_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    opened = onnxruntime.InferenceSession

    def without_gpu_7(place: str, settings: object, *, providers: list[Any]) -> object:
        if providers[0][0] == "CUDAExecutionProvider":
            raise RuntimeError("CUDA failure 101: invalid device ordinal")
        return opened(place, settings, providers=providers)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_gpu_7)
    said: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        open_backend("Emoji-Tiny", backend="onnx", device="cuda:7", download_root=exported_root, say=said.append)
    assert "cannot be opened by ONNX Runtime on cuda:7 (CUDA failure 101: invalid device ordinal)" in str(caught.value)
    assert said == []


def test_lack_of_memory_is_not_damage(exported_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def without_memory(*_: object, **__: object) -> object:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_memory)
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"on cpu \(std::bad_alloc\); close other programs"):
        open_backend("Emoji-Tiny", backend="onnx", device="cpu", download_root=exported_root, say=said.append)
    assert said == []


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True])
def test_threads_that_cannot_be_are_refused_before_anything_is_made(tmp_path: Path, backend: Any, count: Any) -> None:
    with pytest.raises(ConfigError, match="num_threads: expected a whole number of at least 1, got "):
        open_backend("Emoji-Tiny", backend=backend, num_threads=count, download_root=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backend", "device"), [("torch", "gpu"), ("torch", "cuda:x"), ("onnx", "gpu"), ("openvino", "gpu")]
)
def test_devices_that_do_not_exist_are_refused_before_anything_is_made(
    tmp_path: Path, backend: Any, device: str
) -> None:
    with pytest.raises(ConfigError, match=f"device: .*'{device}'"):
        open_backend("Emoji-Tiny", backend=backend, device=device, download_root=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_every_backend_chooses_a_device_by_itself(exported_root: Path, backend: Any) -> None:
    opened = open_backend("Emoji-Tiny", backend=backend, device="auto", download_root=exported_root)
    assert opened.resolution == 64


def test_openvino_may_be_called_by_two_threads(tmp_path: Path) -> None:
    tower = OpenVinoTower(write_tower(tmp_path / "tower.onnx", "image", batch="batch"), "image")
    inputs = some_inputs("image", 64)
    with ThreadPoolExecutor(8) as pool:
        for features in pool.map(tower.run, [inputs] * 200):
            np.testing.assert_allclose(unit_rows(features), expected_rows("image", inputs), atol=1e-5)


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", "mps"])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(
        ConfigError, match=f"device: the onnx backend runs on cpu, cuda, cuda:N or tensorrt, got '{device}'"
    ):
        OnnxTower(write_tower(tmp_path / "tower.onnx", "image"), "image", device=device)


def test_openvino_runs_on_the_processor_alone() -> None:
    with pytest.raises(ConfigError, match="device: the openvino backend runs on cpu, got 'cuda'"):
        open_backend("Emoji-Tiny", backend="openvino", device="cuda")


def test_openvino_refuses_a_precision_that_the_processor_lacks() -> None:
    old = ["FP32", "INT8", "BIN"]
    with pytest.raises(ConfigError) as caught:
        settings_for(old, "bf16")
    assert str(caught.value) == "precision: this processor does not compute in bf16; use auto, or one of fp32, int8"
    assert settings_for(old, "fp32")["INFERENCE_PRECISION_HINT"] == "f32"
    assert settings_for(old, "int8")["INFERENCE_PRECISION_HINT"] == "f32"
    assert settings_for([*old, "BF16"], "int8")["INFERENCE_PRECISION_HINT"] == "bf16"
    assert settings_for([*old, "BF16"], "bf16")["INFERENCE_PRECISION_HINT"] == "bf16"


@pytest.mark.parametrize(
    ("backend", "module", "extra"), [("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, module: str, extra: str
) -> None:
    write_tower(tmp_path / "tiny.img.fp32.onnx", "image")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        open_backend(tmp_path / "tiny", backend=backend)
    assert str(caught.value) == (
        f"the {backend} backend needs the package `{module}`; install it with: pip install 'cn-clip-next[{extra}]'"
    )


# --- files of a prefix


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_prefix_opens_the_files_that_are_there(tmp_path: Path, backend: Any) -> None:
    for kind, middle in (("image", "img"), ("text", "txt")):
        write_tower(tmp_path / f"狗[1].{middle}.fp32.onnx", kind, batch="batch")
    encoder = Encoder(tmp_path / "狗[1]", backend=backend)
    inputs = some_inputs("image", 2)
    np.testing.assert_allclose(encoder.backend.encode_pixels(inputs), expected_rows("image", inputs), atol=1e-5)
    assert encoder.encode_texts(["狗"]).shape == (1, 4)
    (tmp_path / "狗[1].img.fp32.onnx").unlink()
    assert Encoder(tmp_path / "狗[1]", backend=backend).encode_texts(["狗"]).shape == (1, 4)


def test_a_prefix_without_the_precision_says_what_there_is(tmp_path: Path) -> None:
    write_tower(tmp_path / "tiny.img.fp32.onnx", "image")
    with pytest.raises(CheckpointError) as caught:
        open_backend(tmp_path / "tiny", backend="onnx", precision="int8")
    assert str(caught.value) == (
        f"{tmp_path / 'tiny'}: expected tiny.img.int8.onnx or tiny.txt.int8.onnx, found tiny.img.fp32.onnx; "
        "choose another precision, or export this one with deploy/pytorch_to_onnx.py"
    )


def test_a_name_that_is_neither_model_nor_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CnClipError, match="not found; available models = "):
        open_backend(tmp_path / "nothing", backend="onnx", download_root=tmp_path)


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_a_file_in_place_of_its_prefix_is_told_what_to_give(tmp_path: Path, backend: Any) -> None:
    path = write_tower(tmp_path / "tiny.img.fp32.onnx", "image")
    with pytest.raises(ConfigError) as caught:
        open_backend(path, backend=backend, download_root=tmp_path / "root")
    more = ', and use backend="onnx" or backend="openvino"' if backend == "torch" else ""
    assert str(caught.value) == f"{path}: is one exported tower; give the prefix {tmp_path / 'tiny'}{more}"
    assert not (tmp_path / "root").exists()


def test_a_prefix_for_torch_is_told_which_backends_take_it(tmp_path: Path) -> None:
    write_tower(tmp_path / "tiny.img.fp32.onnx", "image")
    with pytest.raises(ConfigError, match='tiny: is the prefix of exported files; use backend="onnx" or'):
        open_backend(tmp_path / "tiny", backend="torch", download_root=tmp_path / "root")


# --- without PyTorch

APART = """
import json, sys
from cn_clip import emoji_pack
from cn_clip.clip import Encoder
chosen = emoji_pack.load("twemoji")[::100]
encoder = Encoder("Emoji-Tiny", backend=sys.argv[1], precision=sys.argv[2], download_root=sys.argv[3])
images = encoder.encode_images([one.picture for one in chosen])
texts = encoder.encode_texts([one.name for one in chosen])
assert "torch" not in sys.modules
print(json.dumps([images.tolist(), texts.tolist()]))
"""


@pytest.fixture(scope="module")
def exported_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A download root where Emoji-Tiny is exported in float32."""
    root = tmp_path_factory.mktemp("root")
    open_backend("Emoji-Tiny", backend="onnx", download_root=root, say=lambda line: None)
    return root


@pytest.mark.parametrize(
    ("backend", "precision", "least"),
    [("onnx", "fp32", 0.99999), ("onnx", "int8", 0.99), ("openvino", "fp32", 0.99999), ("openvino", "bf16", 0.99)],
)
def test_an_exported_model_runs_without_pytorch_and_finds_the_same(
    exported_root: Path, backend: str, precision: str, least: float
) -> None:
    import openvino

    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    from cn_clip import emoji_pack

    chosen = emoji_pack.load("twemoji")[::100]
    run = [sys.executable, "-W", "error", "-c", APART, backend, precision, str(exported_root)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [np.array(rows) for rows in json.loads(done.stdout)]
    encoder = Encoder("Emoji-Tiny", device="cpu")
    exact = [
        encoder.encode_images([one.picture for one in chosen]),
        encoder.encode_texts([one.name for one in chosen]),
    ]
    for rows, expected in zip(found, exact, strict=True):
        assert (rows * expected).sum(axis=1).min() >= least
    scores, expected_scores = ((images @ texts.T) for images, texts in (found, exact))
    best, expected_best = scores.argmax(axis=1), expected_scores.argmax(axis=1)
    runner_up, highest = np.sort(expected_scores, axis=1)[:, -2:].T
    is_clear = highest - runner_up > 2 * np.abs(scores - expected_scores).max()
    assert (best == expected_best)[is_clear].all()
    assert is_clear.sum() > len(best) / 4
    assert len(set(expected_best.tolist())) > 5


# --- files that change, and rows that are no numbers


@BOTH
@pytest.mark.parametrize("outside", [True, False])
def test_an_open_model_gives_the_same_rows_when_its_files_are_written_over(
    tmp_path: Path, opener: Any, outside: bool
) -> None:
    path = tmp_path / "tower.onnx"
    onnx_files.save(onnx.load(write_tower(tmp_path / "plain.onnx", "text", batch="N", width=64)), path, outside=outside)
    tower, inputs = opener(path, "text"), some_inputs("text", 2)
    before = tower.run(inputs)
    for file in (path, onnx_files.extra_path(path)):
        if file.exists():
            file.write_bytes(bytes(file.stat().st_size))  # `cp` over it
    np.testing.assert_array_equal(tower.run(inputs), before)


@BOTH
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("outside", [True, False])
def test_exported_files_of_other_kinds_are_refused_with_the_next_step(
    tmp_path: Path, opener: Any, kind: str, outside: bool
) -> None:
    content, said = OTHER_KINDS[kind]
    path = tmp_path / "tower.onnx"
    onnx_files.save(onnx.load(write_tower(tmp_path / "plain.onnx", "text", width=64)), path, outside=True)
    wrong = onnx_files.extra_path(path) if outside else path
    wrong.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{wrong}: {said}')}"):
        opener(path, "text")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_no_unit_vectors_do_not_leave_a_backend(kind: Kind, bad: float) -> None:
    features = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    features[[1, 3]] = bad

    class Broken:
        facts = TowerFacts(kind, 8, resolution=RESOLUTION)
        place = "broken"

        def run(self, inputs: Any) -> Any:
            return features[: len(inputs)]

    backend = backend_of(Broken())
    with pytest.raises(NotFiniteError, match=r"^row 1 of a batch of 4: the model gives NaN or infinity") as caught:
        encode(backend, kind, some_inputs(kind, 4))
    assert caught.value.positions == [1, 3]
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker hands it over
    assert (str(again), again.positions) == (str(caught.value), [1, 3])
    np.testing.assert_allclose(np.linalg.norm(encode(backend, kind, some_inputs(kind, 1)), axis=1), 1, atol=1e-6)


@BOTH
def test_a_batch_that_a_file_does_not_take_is_one_sentence(tmp_path: Path, opener: Any) -> None:
    tower = opener(write_tower(tmp_path / "t.onnx", "text", batch=2), "text")
    assert len(tower.run(some_inputs("text", 2))) == 2
    with pytest.raises(CheckpointError, match=r"t\.onnx: does not take a batch of int64 \(3, \d+\) \(.*\); export the"):
        tower.run(some_inputs("text", 3))
