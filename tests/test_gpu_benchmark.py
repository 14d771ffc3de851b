"""The benchmark for GPUs: its count of operations, its time limit, and everything of it once on the CPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cn_clip import zoo
from cn_clip.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu
import gpu_page
import gpu_work

CPU = torch.device("cpu")
PAGE = "# GPU\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nkept\n<!-- peaks: begin -->\n<!-- peaks: end -->\nend\n"


class Operations(TorchDispatchMode):
    """PyTorch's own counts. Its `FlopCounterMode` hooks into every module, and the towers take no shortcuts then."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


@pytest.mark.parametrize(("resolution", "pairs"), [(64, 3), (32, 5)])
def test_operations_of_a_step_are_those_that_pytorch_counts(resolution: int, pairs: int) -> None:
    config = zoo.at_resolution(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"), resolution)
    run = gpu_work.Run(gpu_work.Bench(CPU, smoke=True, precision="fp32"), config)
    batch = run.pairs(pairs)
    with Operations() as counted, sdpa_kernel(SDPBackend.MATH):
        run.step(batch)
    assert counted.total == gpu_work.step_flops(config, pairs, gpu_work.LONGEST)


def test_what_does_not_fit_into_the_time_is_left_out_and_said() -> None:
    now = [0.0]

    def work(name: str, seconds: float) -> gpu.Measure:
        def do() -> list[dict[str, Any]]:
            now[0] += seconds
            return [{"what": name}]

        return gpu.Measure("step", name, seconds, do)

    measures = [work("first", 40), work("too long", 30), work("short", 20)]
    found = gpu.carried_out(measures, gpu.Budget(60, lambda: now[0]))
    assert [row["what"] for row in found["parts"]["step"]] == ["first", "short"]
    assert found["left_out"] == ["too long: no time"]


def test_a_measure_without_enough_memory_is_said_and_the_others_go_on() -> None:
    def too_large() -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    measures = [
        gpu.Measure("step", "large", 1, too_large),
        gpu.Measure("step", "small", 1, lambda: [{"what": "small"}]),
    ]
    found = gpu.carried_out(measures, gpu.Budget(60))
    assert found == {"parts": {"step": [{"what": "small"}]}, "left_out": ["large: out of memory"]}


def test_numbers_have_three_digits() -> None:
    rows = [{"what": "a", "ms": 1234.5, "share": 0.12345, "none": None, "pairs": 1024}]
    assert gpu_page.table(rows).splitlines()[-1] == "| a | 1234 | 0.123 | — | 1024 |"


@pytest.mark.parametrize("text", ["no marks", "<!-- speed: end --> <!-- speed: begin -->", "<!-- speed: begin -->"])
def test_a_page_without_marks_is_refused_and_stays(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(DataError, match="expected one <!-- speed: begin -->"):
        gpu_page.put(page, "block", kind="speed")
    assert page.read_text() == text


@pytest.mark.parametrize("name", ["gpu.md", "en/gpu.md"])
def test_the_page_has_the_marks_that_the_benchmark_writes_between(name: str, tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text((Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    for kind in ("speed", "peaks"):
        gpu_page.put(page, f"block of {kind}", kind=kind)
        assert f"begin -->\nblock of {kind}\n<!--" in page.read_text(encoding="utf-8")


# Loading the compiler warns of what PyTorch itself still uses.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_everything_runs_once_on_the_cpu_and_fills_the_page(tmp_path: Path) -> None:
    page, english = tmp_path / "gpu.md", tmp_path / "en" / "gpu.md"
    english.parent.mkdir()
    page.write_text(PAGE)
    english.write_text(PAGE)
    gpu.run(gpu.Options(device="cpu", smoke=True, output=page))
    found = json.loads((tmp_path / "gpu-speed.json").read_text(encoding="utf-8"))
    assert found["left_out"] == []
    assert list(found["parts"]) == ["device", "step", "extraction", "texts", "transfer", "parts", "loader"]
    assert [(row["what"], row["pairs"]) for row in found["parts"]["step"]] == [
        ("eager", 4),
        ("compiled", 4),
        ("eager", 2),
        ("compiled", 2),
    ]
    assert all(row["ms a step"] > 0 and row["TFLOP/s"] > 0 for row in found["parts"]["step"])
    assert [row["what"] for row in found["parts"]["extraction"]] == ["fp32", "tf32", "bf16", "fp16"]
    assert [row["bytes a picture"] for row in found["parts"]["transfer"]] == [4 * 768, 768]
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.count("| eager |") == 2
    assert text.endswith("<!-- speed: end -->\nkept\n<!-- peaks: begin -->\n<!-- peaks: end -->\nend\n")
    assert (tmp_path / "gpu-speed.svg").exists()
    gpu.run(gpu.Options(device="cpu", smoke=True, output=page, peaks=True))
    rows = json.loads((tmp_path / "gpu-peaks.json").read_text(encoding="utf-8"))["parts"]["peaks"]
    assert [row["--grad-checkpointing"] for row in rows] == ["no", "yes"]
    for one, title in ((page, "**训练时显存的峰值，GiB**"), (english, "**Peak memory in training, GiB**")):
        text = one.read_text(encoding="utf-8")
        assert text.count("| ViT-Tiny-64 |") == 2
        assert title in text
