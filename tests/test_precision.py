"""`precision="auto"`: the fastest that the device multiplies in hardware; what it lacks is refused before any work."""

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cn_clip import ranks
from cn_clip.cli import COMMANDS
from cn_clip.clip import Encoder
from cn_clip.clip.backends import open_vino
from cn_clip.clip.backends.names import settled, torch_precisions
from cn_clip.clip.backends.opening import open_backend, settle_precision
from cn_clip.clip.choice import Choice, ModelSettings, check
from cn_clip.clip.opening import float32_on_gpu, open_quietly
from cn_clip.command import Speaker
from cn_clip.errors import ConfigError

GPU = torch.device("cuda", 0)
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


@pytest.mark.parametrize(("has_bf16", "taken"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_bfloat16_where_it_has_that_and_on_an_apple_gpu_float32(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, taken: str
) -> None:
    fake(monkeypatch, ZEN_4)
    monkeypatch.setattr(ranks, "gpu_has_bf16", lambda _: has_bf16)
    assert settled("torch", "auto", torch_precisions(GPU)) == taken
    assert torch_precisions(torch.device("mps"))[0] == "fp32"
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


# --- float32 on a GPU


@pytest.fixture
def products() -> Iterator[None]:
    """PyTorch's settings of float32 products are those of the process: they are put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("products")
def test_float32_products_are_tf32_on_cuda_unless_strict_and_left_alone_elsewhere() -> None:
    for is_strict, expected in ((False, ("high", True)), (True, ("highest", False))):
        ranks.set_float32_products(GPU, is_strict=is_strict)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
        ranks.set_float32_products(torch.device("cpu"), is_strict=not is_strict)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected


@pytest.mark.usefixtures("products")
def test_products_that_must_be_exact_are_so_until_the_last_thread_that_asks_has_left() -> None:
    ranks.set_float32_products(GPU, is_strict=False)
    first, second = ranks.full_float32(torch.device("cpu")), ranks.full_float32(torch.device("cpu"))
    seen = []
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        seen.append(torch.get_float32_matmul_precision())
    second.__exit__(None, None, None)
    assert (seen, torch.get_float32_matmul_precision()) == (["highest"] * 3, "high")


def test_commands_choose_the_products_and_the_library_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, bool]] = []
    monkeypatch.setattr(ranks, "set_float32_products", lambda one, is_strict: chosen.append((one.type, is_strict)))
    Encoder("Emoji-Tiny", device="cpu").encode_texts(["猫"])
    assert chosen == []
    for strict in (False, True):
        open_quietly(Choice("Emoji-Tiny", device="cpu", strict_fp32=strict), Speaker(quiet=True))
    assert chosen == [("cpu", False), ("cpu", True)]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"precision": "bf16"}, "--strict-fp32 and --precision bf16: it is for float32 in PyTorch; leave one out"),
        ({"precision": "auto"}, "--strict-fp32 and --precision auto: it is for float32 in PyTorch; leave one out"),
        ({"backend": "onnx"}, "--strict-fp32 and --backend onnx: it is for float32 in PyTorch; leave one out"),
    ],
)
def test_strict_float32_is_refused_where_nothing_is_in_float32(settings: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ModelSettings(strict_fp32=True, **settings).chosen)
    assert str(caught.value) == told
    check(ModelSettings(strict_fp32=True).chosen)


def test_a_command_says_what_float32_is_on_a_gpu_and_what_auto_would_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float32_on_gpu(Choice("m", device="cpu")) is None
    monkeypatch.setattr(ranks, "choose_device", lambda _: GPU)
    assert float32_on_gpu(Choice("m", strict_fp32=True)) == "precision: fp32 (--strict-fp32)"
    for is_new, words in (
        (True, ("fp32 (TF32); ", "would use bf16: at most 2 times as fast", "about 0.9998 to fp32")),
        (False, ("fp32; ", "would use fp16: several times as fast", "about 0.999 to fp32")),
    ):
        monkeypatch.setattr(ranks, "gpu_has_bf16", lambda _, is_new=is_new: is_new)
        monkeypatch.setattr(ranks, "computes_in_tf32", lambda _, is_strict, is_new=is_new: is_new and not is_strict)
        line = float32_on_gpu(Choice("m")) or ""
        assert [one for one in words if one not in line] == []
        assert "\n" not in line


def test_tf32_is_that_of_gpus_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert ranks.computes_in_tf32(GPU, is_strict=False) is expected
        assert not ranks.computes_in_tf32(GPU, is_strict=True)
    assert not ranks.computes_in_tf32(torch.device("cpu"), is_strict=False)
