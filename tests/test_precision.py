"""`precision="auto"`: the fastest that the device multiplies in hardware; what it lacks is refused before any work."""

import dataclasses
import importlib
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cn_clip import ranks
from cn_clip.cli import COMMANDS
from cn_clip.clip import Encoder
from cn_clip.clip.backends import open_vino
from cn_clip.clip.backends.names import torch_precisions
from cn_clip.clip.backends.opening import open_backend, settle_precision
from cn_clip.errors import ConfigError

OLD = ["FP32", "INT8", "BIN"]
NEW = [*OLD, "BF16"]
# Processors by their flags in /proc/cpuinfo, and what OpenVINO says of each.
DESKTOP = ({"avx2", "fma"}, OLD)
SKYLAKE_SERVER = ({"avx2", "avx512f", "avx512_vnni"}, NEW)  # OpenVINO computes bf16 there by way of float32
ZEN_4 = ({"avx2", "avx512f", "avx512_bf16"}, NEW)
SAPPHIRE_RAPIDS = ({"avx2", "avx512f", "amx_bf16", "amx_tile"}, NEW)
NO_CPUINFO: Any = (set(), NEW)  # Windows: OpenVINO alone knows


def fake(monkeypatch: pytest.MonkeyPatch, machine: tuple[set[str], list[str]]) -> None:
    flags, capabilities = machine
    monkeypatch.setattr(ranks, "processor", lambda: ("a processor", flags))
    monkeypatch.setattr(open_vino, "capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (DESKTOP, {"torch": "fp32", "onnx": "fp32", "openvino": "fp32"}),
        (SKYLAKE_SERVER, {"torch": "fp32", "onnx": "fp32", "openvino": "fp32"}),
        (ZEN_4, {"torch": "bf16", "onnx": "fp32", "openvino": "bf16"}),
        (SAPPHIRE_RAPIDS, {"torch": "bf16", "onnx": "fp32", "openvino": "bf16"}),
        (NO_CPUINFO, {"openvino": "bf16"}),
    ],
    ids=["desktop", "skylake", "zen4", "amx", "windows"],
)
def test_auto_takes_the_fastest_that_a_processor_multiplies_in_hardware(
    monkeypatch: pytest.MonkeyPatch, machine: Any, expected: dict[Any, str]
) -> None:
    fake(monkeypatch, machine)
    assert {backend: settle_precision(backend, "auto", "cpu") for backend in expected} == expected


def test_auto_on_a_gpu_is_float16_and_on_an_apple_gpu_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, ZEN_4)
    assert torch_precisions("cuda")[0] == "fp16"
    assert torch_precisions("mps")[0] == "fp32"
    assert settle_precision("tensorrt", "auto") == "fp16"


def test_what_is_named_is_taken_where_it_can_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, DESKTOP)
    assert settle_precision("torch", "bf16", "cpu") == "bf16"
    assert settle_precision("openvino", "int8") == "int8"


@pytest.mark.parametrize("model", ["Emoji-Tiny", "no-such-model-file.pt"])
def test_a_precision_that_the_processor_lacks_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    fake(monkeypatch, DESKTOP)
    with pytest.raises(ConfigError) as caught:
        open_backend(model, backend="openvino", precision="bf16", download_root=tmp_path)
    assert str(caught.value) == "precision: this processor does not compute in bf16; use auto, or one of fp32, int8"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("machine", [DESKTOP, ZEN_4], ids=["desktop", "zen4"])
def test_an_encoder_says_what_auto_took_and_gives_the_rows_of_it(monkeypatch: pytest.MonkeyPatch, machine: Any) -> None:
    fake(monkeypatch, machine)
    auto = Encoder("Emoji-Tiny", device="cpu", precision="auto")
    taken: Any = auto.backend
    assert taken.precision == ("bf16" if machine is ZEN_4 else "fp32")
    named = Encoder("Emoji-Tiny", device="cpu", precision=taken.precision)
    np.testing.assert_array_equal(auto.encode_texts(["猫", "生日蛋糕"]), named.encode_texts(["猫", "生日蛋糕"]))
    exact = Encoder("Emoji-Tiny", device="cpu").encode_texts(["猫", "生日蛋糕"])
    assert (auto.encode_texts(["猫", "生日蛋糕"]) * exact).sum(axis=1).min() >= 0.999


def test_an_exported_encoder_says_what_it_computes_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, DESKTOP)
    opened: Any = open_backend("Emoji-Tiny", backend="openvino", precision="auto", download_root=tmp_path)
    assert opened.precision == "fp32"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_runs_a_backend_takes_auto(name: str) -> None:
    options = importlib.import_module(COMMANDS[name].module).Options
    if {"backend", "precision"} <= {one.name for one in dataclasses.fields(options)}:
        assert "auto" in typing.get_args(typing.get_type_hints(options)["precision"])


def test_a_command_prints_what_auto_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cn_clip.index import build

    fake(monkeypatch, DESKTOP)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "a.png")
    arguments = [str(tmp_path / "pictures"), "--output", str(tmp_path / "index"), "--model", "Emoji-Tiny"]
    build.main([*arguments, "--precision", "auto", "--device", "cpu"])
    assert "precision: auto -> fp32" in capsys.readouterr().out
