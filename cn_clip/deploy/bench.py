"""Measures towers, backends, precisions and batch sizes on this machine: `cn-clip bench --model ViT-B-16`."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cn_clip import command, settings, zoo
from cn_clip.clip.backends.names import BackendChoice, Kind, PrecisionChoice, check_precision
from cn_clip.deploy.model_arch import ArchName, vision_name
from cn_clip.errors import ConfigError, DataError
from cn_clip.language import both, counted
from cn_clip.option_types import Json, MergeTokens
from cn_clip.settings import Range

if TYPE_CHECKING:
    from cn_clip.deploy.bench_worker import Job

TINY_TEXT, BASE_TEXT = "BERT-Tiny-chinese", "RoBERTa-wwm-ext-base-chinese"
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """Times every combination in a process of its own and compares its rows with float32 PyTorch.

    Measured is a batch from an array in memory to unit rows in memory: pictures are decoded and scaled before, texts
    are cut into tokens before. A batch of texts holds captions of mixed lengths, padded to the longest. Peak memory is
    the largest of the whole process: Python, libraries, opening the model and computing.
    """

    model: str | None = None
    """A published or bundled name, a checkpoint, or a transformers folder"""
    random: ArchName | None = None
    """Instead of --model: random weights of an architecture, which need no download and take as long"""
    towers: tuple[Kind, ...] = ("image", "text")
    """Towers"""
    backends: tuple[BackendChoice, ...] = ("torch", "onnx", "openvino")
    """What runs them; auto: what --backend auto takes, and why"""
    precisions: tuple[PrecisionChoice, ...] = ("fp32", "bf16", "int8")
    """Arithmetic; what a backend does not have is shown as —. auto: what --precision auto takes"""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Pictures or texts of a batch"""
    repeats: Annotated[int, Range(least=1)] = 10
    """Timed batches"""
    warmup: Annotated[int, Range(least=0)] = 2
    """Batches before them"""
    device: str = "auto"
    """auto (CUDA where a backend has it), cpu, cuda or cuda:N"""
    num_threads: Annotated[int | None, Range(least=1)] = None
    """Threads of a backend; default: its own choice, one a core as a rule"""
    merge_tokens: MergeTokens = None
    text_length: Annotated[int | None, Range(least=3)] = None
    """Pad every text to so many tokens; default: the longest of its batch"""
    download_root: str | None = None
    """Where checkpoints and exports are kept; default: ~/.cache/clip"""
    output: str | None = None
    """Folder for bench.json, bench.md and bench.png"""
    json: Json = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.random is None):
            raise ConfigError("give either --model, such as ViT-B-16, or --random with an architecture")
        for name in ("towers", "backends", "precisions", "batch_sizes"):
            if not getattr(self, name):
                raise ConfigError(f"{settings.flag(name)}: expected at least one")
        settings.check(self)
        if min(self.batch_sizes) < 1:
            raise ConfigError(f"--batch-sizes: expected at least 1, got {min(self.batch_sizes)}")


def run(options: Options) -> int:
    """Measures, prints the table and writes the files; interrupted, it does so with what there is and returns 130.

    Returns 1 when nothing could be measured.

    Raises CnClipError when there is no such model, or the output folder cannot be made.
    """
    from cn_clip.deploy import bench_report

    output = None if options.output is None else _checked(Path(options.output))
    rows: list[dict[str, Any]] = []
    status = 0
    try:
        with tempfile.TemporaryDirectory(prefix="cn_clip_bench_") as folder:
            for row in measured(options, _first_job(options, folder)):
                rows.append(row)
    except KeyboardInterrupt:
        _say(
            both(
                f"已中断，保留已测的 {len(rows)} 项",
                f"interrupted; keeping {counted(len(rows), 'measurement')}",
            )
        )
        status = INTERRUPTED
    names = ("repeats", "warmup", "device", "num_threads", "text_length", "merge_tokens")
    result: dict[str, Any] = {
        "model": options.model or f"random {options.random}",
        "machine": bench_report.machine_facts(),
        "settings": {name: getattr(options, name) for name in names},
        "rows": rows,
    }
    if not options.json:
        print("\n".join(bench_report.table(rows)))
    if status == 0 and all("error" in row for row in rows):
        _say(both("一项也没有测成", "nothing could be measured"))
        status = 1
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        bench_report.write(result, output, say=_say)
    command.Speaker(quiet=options.json).result(result)
    return status


def measured(options: Options, base: "Job") -> Iterator[dict[str, Any]]:
    """The row of each combination, in order; raises CnClipError when PyTorch itself cannot run the model."""
    _say(both(f"以 PyTorch float32 为基准：{base.model}", f"reference: PyTorch in float32, {base.model}"))
    reference = _in_process("reference", base)
    if "error" in reference:
        raise ConfigError(reference["error"])
    towers_and_sizes = itertools.product(dict.fromkeys(options.towers), dict.fromkeys(options.batch_sizes))
    jobs = [
        replace(base, kind=kind, batch_size=batch_size, backend=backend, precision=precision)
        for kind, batch_size in towers_and_sizes
        for backend, precision in itertools.product(dict.fromkeys(options.backends), dict.fromkeys(options.precisions))
    ]
    prepared: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, job in enumerate(jobs, start=1):
        name = {"tower": job.kind, "backend": job.backend, "precision": job.precision}
        key = (job.kind, job.backend, job.precision)
        if key not in prepared:  # why this tower cannot run so, if it cannot; exported if need be
            prepared[key] = {}
            try:
                check_precision(job.backend, job.precision)
            except ConfigError as error:
                prepared[key] = {"error": str(error)}
            else:
                if job.backend != "torch":
                    _say(both(f"准备 {' '.join(key)}", f"preparing {' '.join(key)}"))
                    prepared[key] = _in_process("prepare", job)
        found = prepared[key]
        row = {**name, "batch_size": job.batch_size}
        if "error" in found:
            row["error"] = found["error"]
        else:
            if taken := found.get("auto"):
                job = replace(job, backend=taken["backend"], precision=taken["precision"])
                row["auto"] = taken
            row |= _in_process("measure", job)
        shown = "—" if "error" in row else f"{row['median_ms']:.2f} ms, {row['per_second']:.1f}/s"
        _say(f"[{number}/{len(jobs)}] {' '.join(name.values())} ×{job.batch_size}: {shown}")
        yield row


def _first_job(options: Options, folder: str) -> "Job":
    from cn_clip.deploy.bench_worker import Job

    device = None if options.device == "auto" else options.device
    base = Job(
        model=options.model or "",
        folder=folder,
        repeats=options.repeats,
        warmup=options.warmup,
        download_root=options.download_root,
        device=device,
        num_threads=options.num_threads,
        text_length=options.text_length,
        merge_tokens=options.merge_tokens or 0,
    )
    if options.random is None:
        return base
    root = Path(options.download_root or zoo.DOWNLOAD_ROOT).expanduser()
    entry = zoo.named(options.random)
    text = entry.text if entry else BASE_TEXT if options.random == "ViT-B-32" else TINY_TEXT
    path = root / "random" / f"{options.random}.pt"
    return replace(base, model=str(path), vision=vision_name(options.random), text=text)


def _in_process(task: Literal["reference", "prepare", "measure"], job: "Job") -> dict[str, Any]:
    """What the worker gives; {"error": sentence} when it fails or dies."""
    folder = Path(job.folder)
    job.save(folder / "job.json")
    answer = folder / "result.json"
    answer.unlink(missing_ok=True)
    worker = [sys.executable, "-m", "cn_clip.deploy.bench_worker", task, str(folder / "job.json"), str(answer)]
    # Its last line is read here, whatever the encoding of this process's own output.
    done = subprocess.run(
        worker,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    with contextlib.suppress(OSError, ValueError):
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result
    if done.returncode < 0:
        return {"error": f"its process was killed by signal {-done.returncode}; perhaps memory ran out"}
    last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return {"error": f"its process ended with status {done.returncode}: {last}"}


def _checked(folder: Path) -> Path:
    """A folder, there or not yet; raises DataError where it cannot be made or written."""
    above = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))
    if not above.is_dir():
        raise DataError(f"--output {folder}: cannot be made a folder, {above} is a file; choose another")
    if not os.access(above, os.W_OK):
        raise DataError(f"--output {folder}: cannot be written; choose another folder")
    return folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
