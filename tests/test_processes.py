"""Processes of one run: children of a fork, workers without shared memory, stuck workers, other start methods."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_process_runs import BATCH, NUM_PAIRS, checkpoint, emoji_split, options, run

from cn_clip import processes
from cn_clip.data import datasets
from cn_clip.data.datasets import PairDataset, make_loader
from cn_clip.training import main as training
from cn_clip.training.inputs import EpochSampler

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # only for a child that hangs

PROGRAM = """
import os, sys, threading
import numpy as np
from pathlib import Path
sys.path.insert(0, "tests")
kind, folder, end = sys.argv[1:]

def open_and_compute():
    if kind == "torch":
        from cn_clip.clip import Encoder
        from cn_clip.demo import emoji
        encoder = Encoder("Emoji-Tiny", num_threads=2)
        pictures = [one.picture for one in emoji.load()[:16]]
        return lambda: encoder.encode_images(pictures)
    from onnx_towers import some_inputs, write_tower
    from cn_clip.clip.backends.onnx_runtime import OnnxTower as Tower
    path = Path(folder, "tower.onnx")
    if not path.exists():
        write_tower(path, "image", batch="batch", width=256)
    tower, inputs = Tower(path, "image", num_threads=2), some_inputs("image", 512)
    return lambda: tower.run(inputs)

compute = open_and_compute()
expected = compute()
pid = os.fork()
if pid == 0:
    assert np.abs(compute() - expected).max() < 1e-5
    compute = open_and_compute()  # frees what the parent opened
    assert np.abs(compute() - expected).max() < 1e-5
    if end == "exit":
        sys.exit()
    os._exit(0)
threading.Timer(100, lambda: os.kill(pid, 9)).start()
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("child:", status, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
@pytest.mark.parametrize(("kind", "end"), [("torch", "exit"), ("onnx", "_exit")])
def test_what_a_parent_opened_computes_and_is_freed_in_a_forked_child(kind: str, end: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROGRAM, kind, str(tmp_path), end],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.stdout == "child: 0\n", done.stderr
    assert ("num_threads 2: this process was forked" in done.stderr) == (kind == "torch")


FORKED_AFTER_OPENVINO = """
import os, sys
sys.path.insert(0, "tests")
from onnx_towers import some_inputs, write_tower
from cn_clip.clip.backends.open_vino import OpenVinoTower
from cn_clip.errors import ConfigError
tower = OpenVinoTower(write_tower(sys.argv[1] + "/tower.onnx", "image"), "image", num_threads=2)
inputs = some_inputs("image", 1)
assert tower.run(inputs).shape[0] == 1
pid = os.fork()
if pid == 0:
    for use in (lambda: tower.run(inputs), lambda: OpenVinoTower(tower.path, "image")):
        try:
            use()
        except ConfigError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
assert tower.run(inputs).shape[0] == 1
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
def test_openvino_is_refused_in_a_forked_child_where_it_may_wait_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED_AFTER_OPENVINO, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    refused = "openvino: this process was forked from one that has used OpenVINO, which may wait for ever here; start"
    assert [line.startswith(refused) for line in done.stdout.splitlines()] == [True, True], done.stdout


# --- shared memory


class Rows:
    """Items of a tensor and an id."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> "tuple[torch.Tensor, int]":
        return torch.full((1000,), float(index)), index


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers would not see what the test patches")


@needs_fork
@pytest.mark.parametrize("free", [0.0, 8000.0 * 4, 8000.0 * 4 + 1, float("inf")])
def test_batches_go_through_pipes_when_shared_memory_has_no_room_for_all_workers(
    free: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A batch of 2 rows is 8000 bytes; 2 workers may hand over 2 each at once.
    datasets._say_small_shared_memory.cache_clear()
    monkeypatch.setattr(datasets, "free_shared_memory", lambda: free)
    shared = []
    monkeypatch.setattr(datasets, "_with_tensors", lambda batch: shared.append(batch) or with_tensors(batch))
    batches = list(make_loader(Rows(), 2, 2, multiprocessing_context="fork"))
    assert [isinstance(rows, torch.Tensor) for rows, _ in shared] == [free > 8000 * 4] * 4
    assert torch.equal(torch.cat([rows for rows, _ in batches])[:, 0], torch.arange(8.0))
    assert [number for _, numbers in batches for number in numbers] == list(range(8))
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (free <= 8000 * 4)  # once, not for every batch
    assert all("docker run --shm-size" in warning and "--num-workers" in warning for warning in warnings)


with_tensors = datasets._with_tensors


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_worker_stacks_its_batch_in_shared_memory(num_workers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = num_workers and SimpleNamespace(num_workers=num_workers)
    monkeypatch.setattr(datasets, "get_worker_info", lambda: worker)
    pixels = [torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4) + number for number in range(3)]
    tokens = [torch.tensor([101, number, 0]) for number in range(3)]
    scores = [torch.tensor(number / 4) for number in range(3)]
    batch = datasets.collate(list(zip(pixels, tokens, scores, "abc", strict=True)))
    assert [part.is_shared() for part in batch[:3]] == [worker is not None] * 3  # else it would be copied there
    assert all(
        torch.equal(part, torch.stack(items)) for part, items in zip(batch, (pixels, tokens, scores), strict=False)
    )
    assert batch[3] == ["a", "b", "c"]


class Readers:
    """Items that say which process read them, and their number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, int]:
        return os.getpid(), index


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_live_on_from_epoch_to_epoch_and_read_what_the_sampler_then_names(num_workers: int) -> None:
    sampler = EpochSampler(10, 2, seed=1)
    loaders = [make_loader(Readers(), 2, num_workers, sampler=sampler)]

    def batches(epoch: int, start: int, most: int = 5) -> list[tuple[list[int], list[int]]]:
        sampler.epoch, sampler.start = epoch, start
        return list(itertools.islice(loaders[0], most))

    expected = {}
    for epoch in range(4):
        sampler.epoch, sampler.start = epoch, 0
        expected[epoch] = sampler.batches()
    assert len({str(order) for order in expected.values()}) == 4
    left = batches(1, 0, most=2)  # left in the middle, while workers had read on
    seen = [(left, expected[1][:2]), (batches(0, 0), expected[0]), (batches(2, 3), expected[2][3:])]
    seen += [(batches(3, 0), expected[3])]
    assert [[numbers for _, numbers in found] for found, _ in seen] == [wanted for _, wanted in seen]
    readers = {
        (place % (num_workers or 1), pid) for found, _ in seen for place, (pids, _) in enumerate(found) for pid in pids
    }
    assert len(readers) == (num_workers or 1)  # as `ShardSampler` counts on: batch b is read by worker b % num_workers
    loaders.clear()
    assert not multiprocessing.active_children()


@needs_fork
def test_training_without_shared_memory_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "free_shared_memory", lambda: 0.0)
    datasets._say_small_shared_memory.cache_clear()
    split = emoji_split(tmp_path / "data")
    assert "/dev/shm has only 0 MB free" in run(split, tmp_path / "a", num_workers=1, valid_num_workers=1, max_steps=2)
    run(split, tmp_path / "b", max_steps=2)
    pipes, alone = (checkpoint(tmp_path / name)["state_dict"] for name in ("a", "b"))
    assert all(torch.equal(value, alone[name]) for name, value in pipes.items())


# --- signals


@needs_fork
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_whose_loader_waits_for_ever_and_the_run_is_saved(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, sign, load = emoji_split(tmp_path / "data"), tmp_path / "stuck", PairDataset.__getitem__
    first_epoch = tmp_path / "x" / "checkpoints" / "epoch1.pt"
    has_ended = threading.Event()

    def stuck(dataset: PairDataset, index: int) -> object:
        if index < NUM_PAIRS:
            return load(dataset, index)
        sign.touch()  # in the second epoch a disk hangs
        time.sleep(1000)
        raise AssertionError("the test has ended long ago")

    def end() -> None:
        # Workers load ahead: however slow the steps are, those of the first epoch are done before the signal.
        while not (sign.exists() and first_epoch.exists()):
            time.sleep(0.05)
        time.sleep(0.5)
        if not has_ended.is_set():  # else it would end the tests
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def give_up(*_: object) -> None:
        raise AssertionError("the run waits for its loader for ever")

    monkeypatch.setattr(PairDataset, "__getitem__", stuck)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(400)
    try:
        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(SystemExit) as left:
            training.run(options(split, tmp_path, num_workers=workers, max_epochs=3, val_data=None))
    finally:
        has_ended.set()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert left.value.code == 128 + signal.SIGTERM
    saved = checkpoint(tmp_path)
    assert saved["step"] == NUM_PAIRS // BATCH
    del left  # its traceback holds the loader
    gc.collect()
    assert not multiprocessing.active_children()  # killed: they ignore SIGTERM


# --- start methods

START = """
import multiprocessing, sys
from pathlib import Path
sys.path.insert(0, "tests")

def main():
    multiprocessing.set_start_method(sys.argv[1])
    from in_process_runs import emoji_split, run
    folder = Path(sys.argv[2])
    split = emoji_split(folder / "data")
    run(split, folder, num_workers=1, valid_num_workers=1, max_steps=1, use_augment=True)
    from cn_clip import cli
    saved = folder / "x" / "checkpoints" / "epoch_latest.pt"
    output = folder / "rows.jsonl"
    cli.main(["features", "--extract-image-feats", f"--image-data={split}/imgs", f"--image-feat-output-path={output}",
              f"--resume={saved}", "--vision-model=ViT-Tiny-64", "--text-model=BERT-Tiny-chinese", "--device=cpu"])
    print("rows:", len(output.read_text().splitlines()))

if __name__ == "__main__":
    main()
"""


@pytest.mark.long
def test_training_and_extraction_run_under_the_start_method_of_python_3_14(tmp_path: Path) -> None:
    """forkserver, as spawn of macOS and Windows, pickles all that workers are given."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    program = tmp_path / "program.py"
    program.write_text(START, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program), method, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"rows: {NUM_PAIRS}" in done.stdout


def test_the_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 6}, raising=False)
    assert processes.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert processes.usable_cores() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processes.usable_cores() == 1
