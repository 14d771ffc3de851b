"""Programs that deploy with Chinese-CLIP's own helpers: timing, Core ML's encoders, ONNX files, the PyTorch model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper
from onnx_towers import write_tower
from tiny_models import TOKENS, tiny_model, tiny_pixels

from cn_clip import zoo
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.model import CLIP
from cn_clip.deploy import benchmark_utils, pytorch_to_coreml, pytorch_to_onnx, speed_benchmark


def test_timings_are_printed_in_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_utils.print_timings(name="ours", timings=[0.001, 0.003])
    assert capsys.readouterr().out == (
        "[ours] mean=2.00ms, sd=1.00ms, min=1.00ms, max=3.00ms, median=2.00ms, 95p=2.90ms, 99p=2.98ms\n"
    )
    seconds: list[float] = []
    for _ in range(2):
        with speed_benchmark.track_infer_time(seconds):
            pass
    assert len(seconds) == 2
    assert all(one >= 0 for one in seconds)


def test_encoders_are_one_tower_each() -> None:
    model = tiny_model()
    pixels = tiny_pixels(model)
    assert torch.equal(pytorch_to_coreml.ImageEncoder(model)(pixels), model.encode_image(pixels))
    assert torch.equal(pytorch_to_coreml.TextEncoder(clip_model=model)(TOKENS), model.encode_text(TOKENS))


def test_many_files_of_weights_become_one(tmp_path: Path) -> None:
    path = write_tower(tmp_path / "tower.onnx", "image", width=600)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    expected = OnnxTower(path, "image", device="cpu").run(pixels)
    proto = onnx.load(path)
    external_data_helper.convert_model_to_external_data(proto, all_tensors_to_one_file=False, size_threshold=0)
    onnx.save_model(proto, path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["tower.onnx", "weight"]
    pytorch_to_onnx.packing_small_onnx_files(str(path))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["tower.onnx", "tower.onnx.extra_file"]
    np.testing.assert_array_equal(OnnxTower(path, "image", device="cpu").run(pixels), expected)


def test_the_model_of_the_speed_test_is_ready_in_its_precision(tmp_path: Path, full_towers: None) -> None:
    model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    args = SimpleNamespace(model_arch="ViT-Tiny-64", pytorch_ckpt=str(tmp_path / "model.pt"), device="cpu")
    for args.pytorch_precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        opened = speed_benchmark.prepare_pytorch_model(args)
        assert not opened.training
        assert opened.visual.conv1.weight.dtype is dtype
    assert speed_benchmark.onnx_execution_provider_map["cpu"] == "CPUExecutionProvider"
