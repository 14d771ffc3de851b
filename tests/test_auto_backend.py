"""`backend="auto"`: what is taken on each kind of processor, why, and what is passed over; on real small models."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cn_clip import ranks
from cn_clip.clip import Encoder
from cn_clip.clip.backends import choosing, exported, onnx_runtime, open_vino, opening, parity, speeds
from cn_clip.clip.backends.choosing import Decision, decide
from cn_clip.clip.backends.exported import Source, kept_losses
from cn_clip.clip.backends.speeds import Mode
from cn_clip.clip.choice import ModelSettings, check
from cn_clip.clip.opening import identity, open_quietly
from cn_clip.command import Speaker
from cn_clip.errors import CheckpointError, ConfigError, MissingExtraError
from cn_clip.features.options import EngineSettings

OLD = ["FP32", "INT8", "BIN"]
NEW = [*OLD, "BF16"]
# Flags of /proc/cpuinfo, and what OpenVINO says of the processor.
AVX2 = ({"avx2", "fma"}, OLD)
ALDER_LAKE = ({"avx2", "avx_vnni"}, OLD)
SKYLAKE = ({"avx2", "avx512f"}, NEW)
ICE_LAKE = ({"avx2", "avx512f", "avx512_vnni"}, NEW)
ZEN_4 = ({"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}, NEW)
SAPPHIRE_RAPIDS = ({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}, NEW)
GRAVITON = ({"asimd", "asimddp", "bf16"}, ["FP32", "INT8"])
OLD_X86 = ({"sse4_2"}, OLD)


def fake(monkeypatch: pytest.MonkeyPatch, machine: Any) -> None:
    monkeypatch.setattr(ranks, "processor", lambda: ("a processor", machine[0]))
    monkeypatch.setattr(open_vino, "capabilities", lambda: machine[1])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is exported or measured: every form is close enough. Gives the forms that would have been exported."""
    asked: list[str] = []

    def files(*_: Any, backend: str, precision: str, **__: Any) -> dict[str, Path]:
        asked.append(f"{backend} {precision}")
        return {}

    monkeypatch.setattr(choosing, "ready_files", files)
    monkeypatch.setattr(choosing, "losses", lambda *_: {"image": 0.9995, "text": 0.9993})
    return asked


@pytest.mark.parametrize(
    ("machine", "kind", "taken"),
    [
        (AVX2, "avx2", "onnx int8"),
        (ALDER_LAKE, "avx2-vnni", "onnx int8"),
        (SKYLAKE, "avx512", "onnx int8"),
        (ICE_LAKE, "avx512-vnni", "openvino int8"),
        (ZEN_4, "avx512-bf16", "openvino int8"),
        (SAPPHIRE_RAPIDS, "amx", "openvino int8"),
        (GRAVITON, "arm64", "onnx int8"),
        (OLD_X86, "other", "openvino fp32"),
    ],
    ids=["avx2", "alder-lake", "skylake", "ice-lake", "zen4", "amx", "graviton", "old"],
)
def test_each_kind_of_processor_takes_the_fastest_that_it_has(
    monkeypatch: pytest.MonkeyPatch, no_work: list[str], machine: Any, kind: str, taken: str
) -> None:
    fake(monkeypatch, machine)
    assert ranks.processor_kind() == kind
    decision = decide("Emoji-Tiny", device="cpu")
    assert (str(decision.mode), decision.kind, decision.passed_over) == (taken, kind, ())
    assert no_work == [taken]


def test_apples_processors_multiply_int8_and_unknown_ones_are_asked_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "processor", lambda: ("arm", set()))
    monkeypatch.setattr(ranks.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(ranks.platform, "system", lambda: "Darwin")
    assert ranks.processor_kind() == "arm64"
    monkeypatch.setattr(ranks.platform, "system", lambda: "Windows")
    assert ranks.processor_kind() == "other"
    monkeypatch.setattr(ranks.platform, "machine", lambda: "AMD64")
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_avx512_supported")
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True, raising=False)
    assert ranks.processor_kind() == "avx2"
    assert not ranks.cpu_has_bf16()


def test_a_gpu_takes_pytorch_in_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "losses", lambda *_: {"image": 0.9995, "text": 0.9993})
    monkeypatch.setattr(ranks, "choose_device", lambda *_: torch.device("cuda", 0))
    for has_bf16, taken in ((True, "torch bf16"), (False, "torch fp16")):
        monkeypatch.setattr(ranks, "gpu_has_bf16", lambda _, has_bf16=has_bf16: has_bf16)
        assert str(decide("Emoji-Tiny", device="cuda").mode) == taken
    monkeypatch.setattr(ranks, "choose_device", lambda *_: torch.device("mps"))
    assert str(decide("Emoji-Tiny", device="mps").mode) == "torch fp32"


@pytest.mark.parametrize(
    ("machine", "precision", "taken"),
    [(AVX2, "fp32", "openvino fp32"), (ZEN_4, "bf16", "openvino bf16"), (AVX2, "int8", "onnx int8")],
)
def test_a_precision_that_is_named_leaves_the_backend_to_auto(
    monkeypatch: pytest.MonkeyPatch, no_work: list[str], machine: Any, precision: str, taken: str
) -> None:
    fake(monkeypatch, machine)
    monkeypatch.setattr(choosing, "losses", lambda *_: {"image": 0.5})
    assert str(decide("Emoji-Tiny", device="cpu", precision=precision).mode) == taken  # no bound was asked for
    assert no_work == [taken]


def test_bf16_that_a_processor_would_compute_slowly_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, AVX2)
    with pytest.raises(
        ConfigError, match=r"precision: this machine has no hardware for bf16 \(AVX2\); use auto or fp32"
    ):
        decide("Emoji-Tiny", device="cpu", precision="bf16", download_root=tmp_path)
    # OpenVINO would, by way of float32, on AVX-512 without BF16.
    fake(monkeypatch, SKYLAKE)
    with pytest.raises(ConfigError, match="no hardware for bf16"):
        decide("Emoji-Tiny", device="cpu", precision="bf16", download_root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch, no_work: list[str]) -> None:
    fake(monkeypatch, ZEN_4)

    def missing(*_: Any) -> Any:
        raise MissingExtraError("the openvino backend needs the package `openvino`")

    monkeypatch.setattr(open_vino, "capabilities", missing)
    decision = decide("Emoji-Tiny", device="cpu")
    assert str(decision.mode) == "torch bf16"
    assert [str(mode) for mode, _ in decision.passed_over] == ["openvino int8", "openvino bf16"]
    assert "not openvino int8 (the openvino backend needs the package `openvino`)" in str(decision)
    fake(monkeypatch, AVX2)
    monkeypatch.setattr(onnx_runtime, "check_device", missing)
    monkeypatch.setattr(open_vino, "capabilities", missing)
    monkeypatch.setattr(choosing, "ready_files", opening.ready_files)
    assert str(decide("Emoji-Tiny", device="cpu").mode) == "torch fp32"


def test_a_folder_that_cannot_be_written_leaves_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, AVX2)
    (tmp_path / "exported").write_text("in the way", encoding="utf-8")
    said: list[str] = []
    decision = decide("Emoji-Tiny", device="cpu", download_root=tmp_path, say=said.append)
    assert str(decision.mode) == "torch fp32"
    assert {reason.partition("(")[0] for _, reason in decision.passed_over} == {
        f"{Source('Emoji-Tiny', download_root=tmp_path).folder()}: exported models cannot be kept there "
    }
    assert said == []  # nothing was begun
    rows = Encoder("Emoji-Tiny", backend="auto", precision="auto", device="cpu", download_root=tmp_path)
    np.testing.assert_array_equal(rows.encode_texts(["猫"]), Encoder("Emoji-Tiny", device="cpu").encode_texts(["猫"]))


def test_weights_that_are_not_there_are_an_error_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such"):
        decide("no-such.pt", device="cpu", download_root=tmp_path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Emoji-Tiny is exported for the tests of this file."""
    return tmp_path_factory.mktemp("root")


def test_the_fastest_that_is_close_enough_is_taken_measured_once_and_said(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    fake(monkeypatch, AVX2)
    encoder = Encoder("Emoji-Tiny", backend="auto", precision="auto", device="cpu", download_root=root)
    decision = encoder.decision
    assert decision is not None
    assert (encoder.backend_name, encoder.facts.precision, str(decision.mode)) == ("onnx", "int8", "onnx int8")
    exact = Encoder("Emoji-Tiny", device="cpu")
    samples = parity.embedded_samples()
    for kind, found, expected in (
        ("image", encoder.encode_images(samples.pictures), exact.encode_images(samples.pictures)),
        ("text", encoder.encode_texts(samples.captions), exact.encode_texts(samples.captions)),
    ):
        assert decision.cosines[kind] == pytest.approx((found * expected).sum(axis=1).min(), abs=2e-4)  # type: ignore[index]
        assert decision.cosines[kind] >= 0.999  # type: ignore[index]
    smallest = min(decision.cosines.values())
    assert str(decision) == (
        "backend: auto -> onnx int8; on AVX2 measured at 2.03 times Chinese-CLIP on pictures, 8.4 on texts; "
        f"smallest cosine to float32 {smallest:.5f} (wanted: 0.999)"
    )
    assert decision.values()["cosine_min"] == decision.cosines
    # The second time nothing is measured, nor exported.
    monkeypatch.setattr(parity, "reference", lambda *_: pytest.fail("measured again"))
    said: list[str] = []
    assert decide("Emoji-Tiny", device="cpu", download_root=root, say=said.append) == decision
    assert said == []


def test_int8_over_the_bound_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    fake(monkeypatch, AVX2)
    decision = decide("Emoji-Tiny", device="cpu", download_root=root, min_cosine=0.999999)
    assert str(decision.mode) == "openvino fp32"
    ((mode, reason),) = decision.passed_over
    assert mode == Mode("onnx", "int8")
    assert reason.startswith("smallest cosine to float32 0.99")
    assert reason.endswith(", wanted 0.999999")
    assert f"not onnx int8 ({reason})" in str(decision)
    # One that is asked for by its name is bound as well, once a bound is given.
    with pytest.raises(ConfigError, match=r"backend: nothing here runs Emoji-Tiny in int8: onnx int8: smallest cosine"):
        decide("Emoji-Tiny", device="cpu", download_root=root, precision="int8", min_cosine=0.999999)


def test_what_was_measured_on_another_processor_is_measured_here(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    source = Source("Emoji-Tiny", download_root=root)
    counted: list[str] = []
    measure = parity.smallest_cosine
    monkeypatch.setattr(parity, "smallest_cosine", lambda *some: counted.append("measured") or measure(*some))
    for machine in (ALDER_LAKE, GRAVITON, ALDER_LAKE):
        fake(monkeypatch, machine)
        said: list[str] = []
        assert str(decide("Emoji-Tiny", device="cpu", download_root=root, say=said.append).mode) == "onnx int8"
    assert said == []  # the export is the same file everywhere
    assert len(counted) == 4  # both towers, on two processors
    assert {"avx2-vnni", "arm64"} <= {name.split()[-1] for name in kept_losses(source)}
    (source.folder() / exported.LOSSES).write_text('{"a": [1], "b": 2', encoding="utf-8")
    assert kept_losses(source) == {}
    huge = "1" + "0" * 400
    (source.folder() / exported.LOSSES).write_text(f'{{"a": {{"image": {huge}}}}}', encoding="utf-8")
    assert kept_losses(source) == {}
    # What is no cosine was not measured.
    kept = '{"a": {"image": 0.9999, "text": NaN}, "b": {"image": Infinity, "text": 5}}'
    (source.folder() / exported.LOSSES).write_text(kept, encoding="utf-8")
    assert kept_losses(source) == {"a": {"image": 0.9999}, "b": {}}


def test_rows_that_are_not_finite_are_no_precision_to_take(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    fake(monkeypatch, OLD_X86)
    monkeypatch.setitem(speeds.EXPECTED, "other", (Mode("onnx", "int8"), Mode("onnx", "fp32")))
    monkeypatch.setattr(parity, "smallest_cosine", lambda *_: float("nan"))
    decision = decide("Emoji-Tiny", device="cpu", download_root=root)
    assert str(decision.mode) == "onnx fp32"


def test_an_encoder_in_another_process_computes_as_this_one_does(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    fake(monkeypatch, AVX2)
    encoder = Encoder("Emoji-Tiny", backend="auto", precision="auto", device="cpu", download_root=root)
    assert encoder.opened is not None
    assert (encoder.opened.settings["backend"], encoder.opened.settings["precision"]) == ("onnx", "int8")
    fake(monkeypatch, ZEN_4)  # where auto would take another
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.encode_texts(["猫"]), encoder.encode_texts(["猫"]))


def test_models_in_memory_and_of_other_families_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, AVX2)
    model: Any = Encoder("Emoji-Tiny", device="cpu").backend
    encoder = Encoder(model.model, backend="auto", precision="auto", device="cpu")
    assert encoder.decision is not None
    assert str(encoder.decision) == "backend: auto -> torch fp32; PyTorch alone runs models in memory"
    with pytest.raises(
        ConfigError, match="min_cosine: PyTorch alone runs models in memory, and its loss is not measured"
    ):
        Encoder(model.model, backend="auto", device="cpu", min_cosine=0.99)
    with pytest.raises(CheckpointError, match="hf:nowhere"):
        Encoder("hf:nowhere/at/all/x", backend="auto", device="cpu")


def test_the_prefix_of_exported_files_is_opened_by_what_has_them(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    fake(monkeypatch, AVX2)
    prefix = Source("Emoji-Tiny", download_root=root).folder() / exported.STEM
    decision = decide(prefix, device="cpu", download_root=root / "unused")
    assert str(decision.mode) == "onnx int8"
    assert not (root / "unused").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"backend": "onnx", "min_cosine": 0.99},
            "--min-cosine and --backend onnx: it is for --backend auto; leave one out",
        ),
        ({"backend": "auto", "min_cosine": 1.5}, "--min-cosine: expected a cosine above 0 and at most 1, got 1.5"),
        (
            {"backend": "auto", "strict_fp32": True},
            "--strict-fp32 and --backend auto: it is for float32 in PyTorch; leave one out",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ModelSettings(**settings).chosen)
    assert str(caught.value) == told
    check(ModelSettings(backend="auto", precision="auto", min_cosine=0.9).chosen)
    with pytest.raises(ConfigError, match="--backend auto and --engine ray"):
        EngineSettings(model="m", backend="auto", engine="ray", output="o", extract_text_feats=True)


def test_a_command_says_what_auto_took_in_its_lines_and_in_its_json(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cn_clip.index import build, search

    fake(monkeypatch, AVX2)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "a.png")
    model = ["--model", "Emoji-Tiny", "--backend", "auto", "--precision", "auto", "--device", "cpu"]
    model += ["--download-root", str(root)]
    build.main([str(tmp_path / "pictures"), "--output", str(tmp_path / "index"), *model])
    assert "backend: auto -> onnx int8; on AVX2 measured at 2.03 times" in capsys.readouterr().out
    search.main([str(tmp_path / "index"), "红色", *model, "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["auto"]["backend"], result["auto"]["precision"]) == ("onnx", "int8")
    assert result["auto"]["why"] in printed.err


def test_rows_of_auto_are_known_by_what_computed_them(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    fake(monkeypatch, AVX2)
    settings = {"model": "Emoji-Tiny", "device": "cpu", "download_root": str(root)}
    auto = ModelSettings(backend="auto", precision="auto", **settings).chosen  # type: ignore[arg-type]
    named = ModelSettings(backend="onnx", precision="int8", **settings).chosen  # type: ignore[arg-type]
    facts = [identity(one, open_quietly(one, Speaker(quiet=True)))("text") for one in (auto, named)]
    assert facts[0] == facts[1]


def test_the_table_names_modes_that_exist_and_ends_with_float32_in_pytorch() -> None:
    from cn_clip.clip.backends.names import PRECISIONS

    kinds = [*ranks.PROCESSOR_KINDS, "gpu"]
    assert speeds.NAMES.keys() == set(kinds) == speeds.MEASURED.keys() | speeds.EXPECTED.keys()
    for kind in kinds:
        modes = speeds.order(kind)  # type: ignore[arg-type]
        assert [str(mode) for mode in modes if mode.precision not in PRECISIONS[mode.backend]] == []
        assert (modes[-1], len(set(modes))) == (Mode("torch", "fp32"), len(modes))


def test_a_decision_is_told_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = Decision(
        Mode("onnx", "fp32"),
        "avx2",
        {},
        0.999,
        ((Mode("onnx", "int8"), "smallest cosine to float32 0.99710, wanted 0.999"),),
    )
    monkeypatch.setattr("cn_clip.language.language", lambda: "zh")
    assert str(decision) == (
        "后端：auto -> onnx fp32；AVX2 上实测是 Chinese-CLIP 的图片 1.44 倍、文本 5.8 倍；"
        "没有取 onnx int8（与 float32 的最小余弦 0.99710，要求 0.999）"
    )
