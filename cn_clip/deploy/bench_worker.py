"""The processes of `cn-clip bench`: one makes the inputs and what float32 gives for them, one measures a combination.

python -m cn_clip.deploy.bench_worker TASK JOB.json RESULT.json
"""

# N samples, B batch, L tokens, D embedding

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cn_clip.clip.backends.base import Backend, Pixels, Rows, TokenIds, facts_of
from cn_clip.clip.backends.names import KINDS, BackendChoice, BackendName, Kind
from cn_clip.deploy.benchmark_utils import call_seconds, summary
from cn_clip.errors import CnClipError
from cn_clip.processes import peak_bytes


@dataclass(frozen=True)
class Job:
    """One combination to measure. folder: where inputs and expected rows lie.

    vision, text: the towers of random weights, which are made in the file `model` if there is none; None for a model
    that exists. text_length: tokens that texts are padded to; None for the longest of a batch. merge_tokens: patches
    merged in each layer; none where the expected rows are made.
    """

    model: str
    folder: str
    kind: Kind = "image"
    backend: BackendChoice = "torch"
    precision: str = "fp32"
    batch_size: int = 1
    repeats: int = 1
    warmup: int = 0
    vision: str | None = None
    text: str | None = None
    download_root: str | None = None
    device: str | None = None
    num_threads: int | None = None
    text_length: int | None = None
    merge_tokens: int = 0

    def save(self, path: Path) -> None:
        """Writes it for a worker."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def reference(job: Job) -> dict[str, Any]:
    """Writes the samples of both towers and the rows that PyTorch computes of them in float32, on the processor."""
    from cn_clip.deploy import towers  # brings PyTorch, which measurements of other backends must not have in memory

    if job.vision is not None and job.text is not None:
        towers.write_random(Path(job.model), job.vision, job.text)
    backend = _open(replace(job, merge_tokens=0), "torch", "fp32", device="cpu", kinds=KINDS)
    expected = towers.reference_rows(backend)
    for kind in KINDS:
        np.save(_inputs_path(job, kind), expected.inputs[kind])
        np.save(_rows_path(job, kind), expected.rows[kind])
    return {}


def prepare(job: Job) -> dict[str, Any]:
    """Exports what is not exported yet, so that no measurement has it in its time or memory.

    auto: of a job whose backend is that, what is taken instead, see `choosing.Decision.values`.
    """
    if job.backend == "auto":
        from cn_clip.clip.backends.choosing import decide

        names = ("vision", "text", "download_root", "num_threads", "merge_tokens")
        settings = {name: getattr(job, name) for name in names}
        decision = decide(job.model, precision=job.precision, device=job.device, kinds=(job.kind,), **settings)
        return {"auto": decision.values()}
    _open(job, job.backend, job.precision, device=job.device, kinds=(job.kind,))
    return {}


def measure(job: Job) -> dict[str, Any]:
    """What one combination takes; this process computes nothing else.

    median_ms, p95_ms: of a batch, from an array in memory to unit rows in memory. load_s: from opening to the first
    result, with the import of the backend. peak_bytes: the largest memory of this process, Python with it.
    cosine_min, cosine_mean: to float32, over all samples, in batches of this size.
    """
    assert job.backend != "auto", "is settled before"
    samples = np.load(_inputs_path(job, job.kind), mmap_mode="r")
    batch: Pixels | TokenIds = samples[np.arange(job.batch_size) % len(samples)]
    if job.kind == "text":
        batch = chosen_texts(samples, job.batch_size, job.text_length)
    start = time.perf_counter()
    backend = _open(job, job.backend, job.precision, device=job.device, kinds=(job.kind,))
    _encode(backend, job.kind, batch)
    load_s = time.perf_counter() - start
    seconds = call_seconds(lambda: _encode(backend, job.kind, batch), repeats=job.repeats, warmup=job.warmup)
    milliseconds = summary(seconds)
    peak = peak_bytes()
    starts = range(0, len(samples), job.batch_size)
    pieces = (np.array(samples[start : start + job.batch_size]) for start in starts)
    found = np.concatenate([_encode(backend, job.kind, piece) for piece in pieces])
    cosines = (np.load(_rows_path(job, job.kind)) * found).sum(axis=1)
    facts = facts_of(backend)
    return {
        "shape": list(batch.shape),
        "median_ms": milliseconds["median"],
        "p95_ms": milliseconds["95p"],
        "per_second": 1e3 * len(batch) / milliseconds["median"],
        "load_s": load_s,
        "peak_bytes": peak,
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "device": facts.device or facts.provider or "cpu",
    }


TASKS: dict[str, Callable[[Job], dict[str, Any]]] = {"reference": reference, "prepare": prepare, "measure": measure}


def chosen_texts(ids_NL: TokenIds, count: int, length: int | None) -> TokenIds:
    """`count` texts from the shortest to the longest, cut or padded to the longest among them, or to `length` tokens.

    They are spread evenly over the samples; a single one is from the middle.
    """
    lengths = (ids_NL != 0).sum(axis=1)
    positions = ((np.arange(count) + 0.5) / count * len(ids_NL)).astype(int)
    chosen = np.argsort(lengths, kind="stable")[positions]
    longest = int(lengths[chosen].max())
    cut: TokenIds = np.ascontiguousarray(ids_NL[chosen, : min(longest, length or longest)])
    return cut if length is None else np.pad(cut, ((0, 0), (0, length - cut.shape[1])))


def _encode(backend: Backend, kind: Kind, inputs: "Pixels | TokenIds") -> Rows:
    if kind == "image":
        return backend.encode_pixels(inputs)  # type: ignore[arg-type]
    return backend.encode_tokens(inputs)  # type: ignore[arg-type]


def _open(job: Job, backend: BackendName, precision: str, *, device: str | None, kinds: tuple[Kind, ...]) -> Backend:
    from cn_clip.clip.backends.opening import open_backend

    return open_backend(
        job.model,
        backend=backend,
        precision=precision,
        device=device,
        vision=job.vision,
        text=job.text,
        download_root=job.download_root,
        num_threads=job.num_threads,
        merge_tokens=job.merge_tokens,
        kinds=kinds,
    )


def _inputs_path(job: Job, kind: Kind) -> Path:
    return Path(job.folder) / f"{kind}.inputs.npy"


def _rows_path(job: Job, kind: Kind) -> Path:
    return Path(job.folder) / f"{kind}.rows.npy"


def main() -> None:
    """Writes the result, or {"error": sentence}, also for errors that were not foreseen."""
    task, job_path, result_path = sys.argv[1:]
    job = Job(**json.loads(Path(job_path).read_text(encoding="utf-8")))
    try:
        result = TASKS[task](job)
    except CnClipError as error:
        result = {"error": str(error)}
    except Exception as error:  # of whatever library
        first = (str(error).strip().splitlines() or [""])[0]
        result = {"error": f"{type(error).__name__}: {first}"}
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
