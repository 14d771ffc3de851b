"""`cn-clip bench` and Chinese-CLIP's speed test: what they measure, write and refuse, and that a failure is one row."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_python

from cn_clip.deploy import bench, bench_report, bench_worker, benchmark_utils, speed_benchmark, towers
from cn_clip.deploy.bench_worker import Job
from cn_clip.errors import ConfigError, DataError, MissingExtraError

ROOT = Path(__file__).parents[1]
MEASURED = {
    "median_ms": 12.5,
    "p95_ms": 13.25,
    "per_second": 1280.0,
    "load_s": 0.5,
    "peak_bytes": 300 * 2**20,
    "cosine_min": 0.9995,
    "cosine_mean": 0.99999,
    "shape": [16, 3, 64, 64],
    "device": "cpu",
}
ROWS: list[dict[str, Any]] = [
    {"tower": "image", "backend": "torch", "precision": "fp32", "batch_size": 16, **MEASURED},
    {"tower": "image", "backend": "torch", "precision": "int8", "batch_size": 16, "error": "no such precision"},
    {"tower": "text", "backend": "torch", "precision": "int8", "batch_size": 16, "error": "no such precision"},
]
MACHINE = {
    "processor": "A Processor",
    "cores": 2,
    "instructions": ["avx2"],
    "omp_num_threads": None,
    "system": "Linux x86_64",
    "python": "3.11.7",
    "versions": {"torch": "2.9.0"},
    "date": "2025-01-02 03:04 UTC",
}
RESULT: dict[str, Any] = {
    "model": "Emoji-Tiny",
    "machine": MACHINE,
    "settings": {"repeats": 10, "warmup": 2, "device": "auto", "num_threads": None, "text_length": None},
    "rows": ROWS,
}


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cn_clip'}"}
    return subprocess.run([warm_python.program(), *args], env=env, capture_output=True, text=True)


# --- times


def test_summary_is_that_of_chinese_clip_worked_by_hand() -> None:
    values = benchmark_utils.summary([0.001, 0.002, 0.003, 0.004])
    assert values == pytest.approx(
        {"mean": 2.5, "sd": 1.25**0.5, "min": 1, "max": 4, "median": 2.5, "95p": 3.85, "99p": 3.97}
    )
    assert benchmark_utils.summary_line("Pytorch text inference speed (batch-size: 1):", values) == (
        "[Pytorch text inference speed (batch-size: 1):] mean=2.50ms, sd=1.12ms, min=1.00ms, max=4.00ms, "
        "median=2.50ms, 95p=3.85ms, 99p=3.97ms"
    )


def test_warm_up_is_called_and_not_timed() -> None:
    calls: list[None] = []
    assert len(benchmark_utils.call_seconds(lambda: calls.append(None), repeats=3, warmup=2)) == 3
    assert len(calls) == 5


# --- what is measured


def test_texts_of_a_batch_go_from_short_to_long_and_are_padded_to_the_longest() -> None:
    ids = np.array([[2, 7, 7, 7, 3], [2, 3, 0, 0, 0], [2, 8, 3, 0, 0], [2, 9, 9, 3, 0]])
    assert bench_worker.chosen_texts(ids, 1, None).tolist() == [[2, 9, 9, 3]]
    assert bench_worker.chosen_texts(ids, 2, None).tolist() == [[2, 8, 3, 0, 0], [2, 7, 7, 7, 3]]
    assert bench_worker.chosen_texts(ids, 1, 6).tolist() == [[2, 9, 9, 3, 0, 0]]
    assert bench_worker.chosen_texts(ids, 8, 3).shape == (8, 3)


def test_peak_memory_is_that_of_the_process_alone() -> None:
    heavy = np.ones(2**25)  # 256 MiB here must not count there
    code = (
        "import numpy; from cn_clip.deploy.bench_worker import peak_bytes; before = peak_bytes(); "
        "numpy.ones(2**23); print(before, peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert heavy.nbytes == 2**28
    assert before < 2**28
    assert 60 * 2**20 < after - before < 80 * 2**20


def test_random_weights_are_made_once_and_are_the_same_every_time(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        job = Job(
            model=str(folder / "random" / "x.pt"), folder=str(folder), vision="RN-Tiny-64", text="BERT-Tiny-chinese"
        )
        bench_worker.reference(job)
        written = Path(job.model).stat().st_mtime_ns
        bench_worker.reference(job)
        assert Path(job.model).stat().st_mtime_ns == written
        rows.append(np.load(folder / "image.rows.npy"))
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_allclose(np.linalg.norm(rows[0], axis=1), 1, atol=1e-5)


def test_random_job_names_the_towers_of_the_architecture(tmp_path: Path) -> None:
    options = bench.Options(random="RN50", download_root=str(tmp_path), device="cpu")
    job = bench._first_job(options, "x")
    assert (job.model, job.vision, job.text, job.device) == (
        str(tmp_path / "random" / "RN50.pt"),
        "RN50",
        "RBT3-chinese",
        "cpu",
    )


def test_combinations_come_by_tower_and_batch_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_in_process", lambda *_: {"median_ms": 1.0, "per_second": 1.0})
    options = bench.Options(model="x", backends=("onnx", "torch", "onnx"), precisions=("fp32",), batch_sizes=(4, 1))
    rows = bench.measured(options, Job(model="x", folder="x"))
    assert [(row["tower"], row["batch_size"], row["backend"]) for row in rows] == [
        (kind, batch_size, backend)
        for kind in ("image", "text")
        for batch_size in (4, 1)
        for backend in ("onnx", "torch")
    ]


def test_auto_is_measured_as_what_it_takes_and_the_table_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def worker(task: str, job: Job) -> dict[str, Any]:
        seen.append((task, job.backend, job.precision))
        if task == "prepare":
            taken = "int8" if job.precision == "auto" else job.precision
            return {"auto": {"backend": "onnx", "precision": taken, "why": f"backend: auto -> onnx {taken}; …"}}
        return {"error": "not measured"} if task == "measure" else {}

    monkeypatch.setattr(bench, "_in_process", worker)
    options = bench.Options(
        model="x", towers=("text",), backends=("auto",), precisions=("auto", "fp32"), batch_sizes=(4, 1)
    )
    rows = list(bench.measured(options, Job(model="x", folder="x")))
    assert [one for one in seen if one[0] == "measure"] == [("measure", "onnx", one) for one in ("int8", "fp32")] * 2
    assert [(row["backend"], row["precision"]) for row in rows] == [("auto", one) for one in ("auto", "fp32")] * 2
    assert bench_report.reasons(rows)[:2] == [
        "text auto, backend: auto -> onnx int8; …",
        "text fp32, backend: auto -> onnx fp32; …",
    ]


# --- processes


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (-9, "", "its process was killed by signal 9; perhaps memory ran out"),
        (1, "Traceback …\nMemoryError: 3 GiB\n", "its process ended with status 1: MemoryError: 3 GiB"),
        (1, "", "its process ended with status 1: it says nothing"),
    ],
)
def test_worker_that_dies_is_a_reason(
    status: int, said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], status, stderr=said))
    (tmp_path / "result.json").write_text('{"median_ms": 1}', encoding="utf-8")  # of the combination before
    assert bench._in_process("measure", Job(model="x", folder=str(tmp_path))) == {"error": reason}


def test_error_nobody_foresaw_is_a_reason(tmp_path: Path) -> None:
    unforeseen = bench._in_process("measure", Job(model="x", folder=str(tmp_path)))
    assert unforeseen["error"].startswith("FileNotFoundError: ")


def test_interrupted_it_writes_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(task: str, job: Job) -> dict[str, Any]:
        if (task, job.batch_size) == ("measure", 3):
            raise KeyboardInterrupt
        return dict(MEASURED) if task == "measure" else {}

    monkeypatch.setattr(bench, "_in_process", answer)
    options = bench.Options(
        model="x",
        towers=("image",),
        backends=("torch",),
        precisions=("fp32", "int8"),
        batch_sizes=(1, 2, 3, 4),
        output=str(tmp_path / "new" / "out"),
    )
    assert bench.run(options) == 130
    done = json.loads((tmp_path / "new" / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [(row["batch_size"], row["precision"], "error" in row) for row in done["rows"]] == [
        (1, "fp32", False),
        (1, "int8", True),
        (2, "fp32", False),
        (2, "int8", True),
    ]
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 6  # header, rows, one reason
    assert "interrupted; keeping 4 measurements" in captured.err


def test_model_that_cannot_be_opened_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Model nothing-here not found"):
        bench.run(bench.Options(model="nothing-here", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_run_that_measured_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_in_process", lambda task, job: {"error": "no"} if task != "reference" else {})
    options = bench.Options(model="x", backends=("torch",), precisions=("fp32", "int8"), output=str(tmp_path / "out"))
    assert bench.run(options) == 1
    assert "nothing could be measured" in capsys.readouterr().err
    assert (tmp_path / "out" / "bench.json").exists()


def test_output_that_is_a_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made a folder"):
        bench.run(bench.Options(model="x", output=str(tmp_path / "file")))


def test_models_of_other_families_are_refused_as_such() -> None:
    with pytest.raises(ConfigError, match="hf:somewhere: only Chinese-CLIP is taken here"):
        bench.run(bench.Options(model="hf:somewhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either --model, such as ViT-B-16, or --random"),
        ({"model": "x", "random": "RN50"}, "give either --model"),
        ({"model": "x", "batch_sizes": ()}, "--batch-sizes: expected at least one"),
        ({"model": "x", "batch_sizes": (4, 0)}, "--batch-sizes: expected at least 1, got 0"),
        ({"model": "x", "repeats": 0}, "--repeats: expected at least 1, got 0"),
        ({"model": "x", "text_length": 2}, "--text-length: expected at least 3, got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench.Options(**settings)


# --- what is shown


def test_table_has_dashes_and_each_reason_once() -> None:
    assert bench_report.table(ROWS) == [
        "tower  backend  precision  batch  median ms  p95 ms   per s  load s  peak MiB  cos min     mean",
        "image  torch    fp32          16      12.50   13.25  1280.0    0.50       300  0.99950  0.99999",
        "image  torch    int8          16          —       —       —       —         —        —        —",
        "text   torch    int8          16          —       —       —       —         —        —        —",
        "— torch int8 (image ×16, text ×16): no such precision",
    ]


def test_markdown_tells_the_machine_and_holds_the_table() -> None:
    lines = bench_report.markdown(RESULT).splitlines()
    assert lines[:9] == [
        "# Emoji-Tiny: speed of its towers",
        "",
        "- A Processor, 2 cores (avx2)",
        "- threads: default; devices: cpu",
        "- Python 3.11.7, torch 2.9.0",
        "- 10 batches timed after 2; 2025-01-02 03:04 UTC",
        "- shapes: image 16×3×64×64",
        "",
        "| tower | backend | precision | batch | median ms | p95 ms | per s | load s | peak MiB | cos min | mean |",
    ]
    assert "| image | torch | fp32 | 16 | 12.50 | 13.25 | 1280.0 | 0.50 | 300 | 0.99950 | 0.99999 |" in lines
    assert lines.count("— torch int8 (image ×16, text ×16): no such precision  ") == 1


def test_picture_has_a_bar_for_what_was_measured(tmp_path: Path, drawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    # Of the texts one precision failed; the other was not tried.
    rows = [*ROWS[:2], {**ROWS[0], "precision": "bf16", "per_second": 12.34}, {**ROWS[2], "precision": "fp32"}]
    bench_report.draw({**RESULT, "rows": rows}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pictures, sentences = figures[0].axes
    assert [bar.get_width() for bar in pictures.patches] == [1280.0, 12.34]
    assert [text.get_text() for text in pictures.texts] == ["1,280", "12.3"]
    assert [bar.get_width() for bar in sentences.patches] == [0.0, 0.0]
    assert [text.get_text() for text in sentences.texts] == ["—", "—"]


def test_without_matplotlib_the_numbers_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MissingExtraError("no matplotlib")

    monkeypatch.setattr(bench_report, "draw", fail)
    said: list[str] = []
    bench_report.write(RESULT, tmp_path, say=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    assert said[0] == "no bench.png: no matplotlib"


def test_machine_facts_name_the_versions() -> None:
    facts = bench_report.machine_facts()
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["cores"] >= 1
    assert facts["processor"]


# --- the commands


# What is measured has a process of its own; what makes inputs and exports begins with PyTorch imported.
WORKER = """#!/bin/sh
case "$*" in
*" measure "*) exec "{python}" "$@" ;;
*) exec "{warm}" "$@" ;;
esac
"""


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a small run of the command (exports in `root`), its JSON, and what it said on the way."""
    folder = tmp_path_factory.mktemp("bench")
    worker = folder / "python"
    worker.write_text(WORKER.format(python=sys.executable, warm=warm_python.program()), encoding="utf-8")
    worker.chmod(0o755)
    begin = f"import sys; sys.executable = {str(worker)!r}; from cn_clip.cli import main; main()"
    done = run_python(
        *("-c", begin, "bench", "--model", "Emoji-Tiny", "--towers", "text", "--backends", "torch", "onnx"),
        *("--precisions", "fp32", "bf16", "--batch-sizes", "2", "--repeats", "2", "--warmup", "0"),
        *("--device", "cpu", "--download-root", str(folder / "root"), "--output", str(folder / "out"), "--json"),
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


@pytest.mark.long
def test_command_measures_what_it_can_and_says_what_it_does(measured: tuple[Path, dict[str, Any], str]) -> None:
    _, result, said = measured
    assert [(row["tower"], row["backend"], row["precision"]) for row in result["rows"]] == [
        ("text", backend, precision) for backend in ("torch", "onnx") for precision in ("fp32", "bf16")
    ]
    done = [row for row in result["rows"] if "error" not in row]
    assert len(done) == 3
    for row in done:
        assert row.keys() == {"tower", "backend", "precision", "batch_size", *MEASURED}
        assert 0.999 < row["cosine_min"] <= row["cosine_mean"] < 1.00001
        assert row["per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["median_ms"] <= row["p95_ms"]
        assert 30 * 2**20 < row["peak_bytes"] < 4 * 2**30
        assert row["load_s"] > 0
        assert row["shape"][0] == 2
    assert {row["error"] for row in result["rows"] if "error" in row} == {
        "precision: the onnx backend computes in fp32 or fp16 or int8 or auto, got 'bf16'"
    }
    assert "[4/4] text onnx bf16 ×2: —" in said
    assert re.search(r"\[1/4\] text torch fp32 ×2: \d+\.\d\d ms, ", said)


@pytest.mark.long
def test_command_writes_json_page_and_picture(measured: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = measured
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert json.loads((folder / "out" / "bench.json").read_text(encoding="utf-8")) == result
    assert (folder / "out" / "bench.md").read_text(encoding="utf-8") == bench_report.markdown(result)


@pytest.mark.long
def test_onnx_process_needs_less_memory_than_the_one_with_pytorch(measured: tuple[Path, dict[str, Any], str]) -> None:
    peaks = {
        row["backend"]: row["peak_bytes"]
        for row in measured[1]["rows"]
        if "error" not in row and row["tower"] == "text"
    }
    assert peaks["onnx"] < peaks["torch"]


def speed_test(*args: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "cn_clip" / "deploy" / "speed_benchmark.py"), *args)


@pytest.mark.long
def test_speed_test_prints_the_lines_of_chinese_clip(measured: tuple[Path, dict[str, Any], str]) -> None:
    (text,) = (measured[0] / "root" / "exported").glob("*/model.txt.fp32.onnx")
    done = speed_test(
        *("--model-arch", "Emoji-Tiny", "--pytorch-ckpt", "Emoji-Tiny", "--pytorch-precision", "fp32"),
        *("--onnx-text-model", str(text)),
        *("--batch-size", "2", "--n", "3", "--warmup", "1", "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    lines = re.sub(r"\d+\.\d\dms", "…ms", done.stdout).splitlines()
    times = "mean=…ms, sd=…ms, min=…ms, max=…ms, median=…ms, 95p=…ms, 99p=…ms"
    assert lines[0] == "Params:"
    assert "  n: 3" in lines
    assert lines[lines.index("Begin the image feature extraction speed test...") :] == [
        "Begin the image feature extraction speed test...",
        "Prepare the Pytorch model from Emoji-Tiny",
        "Device: cpu",
        "Forward the Pytorch image model...",
        f"[Pytorch image inference speed (batch-size: 2):] {times}",
        "Begin the text feature extraction speed test...",
        "Prepare the Pytorch model from Emoji-Tiny",
        "Device: cpu",
        "Forward the Pytorch text model...",
        f"[Pytorch text inference speed (batch-size: 2):] {times}",
        f"Prepare the ONNX text model from {text}",
        "Device: CPUExecutionProvider",
        "Forward the ONNX text model...",
        f"[ONNX text inference speed (batch-size: 2):] {times}",
        "Done!",
    ]


def test_speed_test_takes_the_picture_and_text_of_chinese_clip() -> None:
    class Recorded:
        def encode_pixels(self, pixels: Any) -> None:
            seen.append(pixels)

        encode_tokens = encode_pixels

    seen: list[Any] = []
    shape = {"batch_size": 2, "context_length": 7, "repeats": 1, "warmup": 0}
    for kind in ("image", "text"):
        towers.time_tower(Recorded(), kind, arch="Emoji-Tiny", **shape)  # type: ignore[arg-type]
    pixels, token_ids = seen
    assert pixels.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert token_ids.tolist() == 2 * [[101, 3345, 2225, 7991, 102, 0, 0]]


def test_speed_test_on_cuda_without_one_names_the_flag_to_change() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    options = speed_benchmark.Options(model_arch="Emoji-Tiny", pytorch_ckpt="Emoji-Tiny", device="cuda")
    with pytest.raises(ConfigError, match="PyTorch finds none here; use --device cpu"):
        speed_benchmark.run(options)


@pytest.mark.long
def test_speed_test_of_another_architecture_than_the_file_is_refused(
    measured: tuple[Path, dict[str, Any], str],
) -> None:
    (text,) = (measured[0] / "root" / "exported").glob("*/model.txt.fp32.onnx")
    options = speed_benchmark.Options(model_arch="ViT-B-16", onnx_text_model=str(text), device="cpu", json=True)
    with pytest.raises(ConfigError, match=r"--model-arch ViT-B-16: .* is of RN-Small-64@BERT-Tiny-chinese; give"):
        speed_benchmark.run(options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_arch": None, "pytorch_ckpt": "x"}, "--model-arch: expected the architecture"),
        ({}, "nothing to measure; give one or more of --pytorch-ckpt, --onnx-image-model"),
        ({"onnx_text_model": "gone.onnx"}, "--onnx-text-model: gone.onnx is no file"),
        ({"tensorrt_text_model": __file__, "device": "cpu"}, "--tensorrt-text-model: TensorRT runs on NVIDIA GPUs"),
        ({"pytorch_ckpt": "x", "n": 0}, "--n: expected at least 1, got 0"),
    ],
)
def test_speed_test_refuses_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(speed_benchmark.Options(model_arch="RN50", pytorch_ckpt="x"), **{"pytorch_ckpt": None, **settings})
