"""Rows of an unfinished extraction: gone on with, cut back to what is whole, never mixed with those of another job."""

import contextlib
import doctest
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cn_clip.data.storage import open_storage
from cn_clip.errors import CheckpointError, ConfigError, DataError
from cn_clip.features import store as feature_store
from cn_clip.features.files import read_features
from cn_clip.features.store import Finished, Manifest, RowStore, Shard, Skipped, begin_shards, write_shard
from cn_clip.files import Lock, lock_file

JOB = {"model": [["m.pt", 7, 8]], "batch_size": 2}


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


ROWS = unit_rows(6)


class Log(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output of which four rows were computed before the run was killed."""
    with RowStore(tmp_path / "x.npz", JOB, 3, Log()) as store:
        store.put(0, ROWS[:2])
        store.put(2, ROWS[2:4])
    return tmp_path / "x.npz"


def reopened(output: Path, job: dict[str, object] = JOB, embed_dim: int = 3) -> tuple[np.ndarray, Log]:
    log = Log()
    with RowStore(output, job, embed_dim, log) as store:
        return store.rows().copy(), log


def change(output: Path, edit: Callable[[bytes], bytes]) -> None:
    path = Path(f"{output}.partial")
    path.write_bytes(edit(path.read_bytes()))


def test_rows_are_there_again_bit_for_bit_and_the_next_one_is_named(output: Path) -> None:
    rows, log = reopened(output)
    assert rows.tobytes() == ROWS[:4].tobytes()
    assert log == [f"{output}.partial: 4 rows done, continuing at row 5"]


@pytest.mark.parametrize("torn", [1, 4, 11])
def test_a_torn_row_is_dropped_and_written_over(output: Path, torn: int) -> None:
    change(output, lambda data: data[:-torn])
    with RowStore(output, JOB, 3, Log()) as store:
        assert store.num_rows == 3
        store.put(2, ROWS[2:4])  # the whole batch again
        store.put(4, ROWS[4:])
        assert store.rows().tobytes() == ROWS.tobytes()


@pytest.mark.parametrize("lost", [bytes(12), b"\xff" * 12, b"\x00\x00\x80\x3f" * 3], ids=["zeros", "nan", "too long"])
def test_rows_that_a_power_failure_lost_are_dropped_with_all_behind_them(output: Path, lost: bytes) -> None:
    change(output, lambda data: data[:-24] + lost + data[-12:])
    assert reopened(output)[0].tobytes() == ROWS[:2].tobytes()


def test_rows_written_anew_replace_those_behind_them(output: Path) -> None:
    with RowStore(output, JOB, 3, Log()) as store:
        store.put(1, ROWS[5:])
        assert store.rows().tobytes() == ROWS[[0, 5]].tobytes()


@pytest.mark.parametrize(
    ("job", "embed_dim", "named"),
    [
        ({**JOB, "batch_size": 4}, 3, "batch_size"),
        ({**JOB, "model": [["m.pt", 7, 9]]}, 3, "model"),
        ({**JOB, "precision": "bf16"}, 3, "precision"),
        ({"model": JOB["model"]}, 3, "batch_size"),
        (JOB, 4, "embed_dim"),
    ],
)
def test_rows_of_another_job_are_dropped_and_what_differs_is_named(
    output: Path, job: dict[str, object], embed_dim: int, named: str
) -> None:
    rows, (line,) = reopened(output, job, embed_dim)
    assert len(rows) == 0
    assert f"belongs to another extraction (other {named}); starting from the beginning" in line


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data[:20],
        lambda data: data[:5],
        lambda data: bytes(300),
        lambda data: b'{"embed_dim": 3, "job": 5}\n',
    ],
)
def test_a_file_that_does_not_say_what_it_is_of_is_begun_again(output: Path, edit: Callable[[bytes], bytes]) -> None:
    change(output, edit)
    rows, (line,) = reopened(output)
    assert (len(rows), "does not say which extraction it belongs to" in line) == (0, True)


@pytest.mark.parametrize("content", [b"[]\n", b"\n# notes", b"my notes", b'{"text_id": 1}\n', b"\x80" * 300])
def test_a_file_of_something_else_is_left_alone(output: Path, content: bytes) -> None:
    change(output, lambda data: content)
    with pytest.raises(DataError, match=r"x\.npz\.partial: is no file of computed rows; move it away"):
        reopened(output)
    assert Path(f"{output}.partial").read_bytes() == content


def test_a_file_is_removed_while_it_is_locked_and_once(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, locked = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith(".partial"):
            assert not Lock(lock_file(output)).acquire()
            locked.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    with RowStore(output, JOB, 3, Log()) as store:
        store.remove()
        Path(f"{output}.partial").write_bytes(b"another process's")
    assert locked == [Path(f"{output}.partial")]
    assert Path(f"{output}.partial").exists()


def test_rows_are_kept_when_the_model_is_at_fault(output: Path) -> None:
    with pytest.raises(CheckpointError), RowStore(output, JOB, 3, Log()) as store, store.computing():
        raise CheckpointError("NaN")
    assert len(reopened(output)[0]) == 4


def test_a_file_without_rows_is_not_left_behind(tmp_path: Path) -> None:
    assert reopened(tmp_path / "x.jsonl")[1] == []
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_input_removes_the_rows_and_an_interruption_keeps_them(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RowStore(output, JOB, 3, Log()) as store, store.computing():
        raise KeyboardInterrupt
    assert Path(f"{output}.partial").exists()
    with pytest.raises(DataError), RowStore(output, JOB, 3, Log()) as store, store.computing():
        raise DataError("a picture")
    assert not Path(f"{output}.partial").exists()


def test_written_rows_go_with_the_end_of_the_run_and_stay_when_it_is_interrupted(output: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), RowStore(output, JOB, 3, Log()) as store:
        store.is_written = True
        raise KeyboardInterrupt
    assert len(reopened(output)[0]) == 4
    with RowStore(output, JOB, 3, Log()) as store:
        store.is_written = True
    assert list(output.parent.iterdir()) == []


def test_a_full_disk_is_told_and_the_rows_are_kept(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> object:
            return getattr(self.stream, name)

    with RowStore(output, JOB, 3, Log()) as store:
        monkeypatch.setattr(store, "_stream", Full(store._stream))
        with pytest.raises(DataError, match=r"x\.npz\.partial: cannot be written \(No space left"), store.computing():
            store.put(4, ROWS[4:])
    assert reopened(output)[0].tobytes() == ROWS[:4].tobytes()


def test_two_processes_do_not_extract_into_one_file(output: Path) -> None:
    busy = "another process is extracting into this file"
    with RowStore(output, JOB, 3, Log()), pytest.raises(ConfigError, match=busy):
        reopened(output)
    assert len(reopened(output)[0]) == 4


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/new/x.npz: the folder {tmp_path}/new does not exist"):
        reopened(tmp_path / "new" / "x.npz")


def test_an_output_that_ends_in_a_slash_is_that_file(output: Path) -> None:
    with RowStore(f"{output}/", JOB, 3, Log()) as store:
        assert (store.path, store.num_rows) == (Path(f"{output}.partial"), 4)


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    for path in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(DataError, match=f"{path}: is a folder; expected the path of a file to write"):
            RowStore(path, JOB, 3, Log())
    assert not list(tmp_path.iterdir())


def test_the_worked_example_of_the_module_is_true() -> None:
    assert doctest.testmod(feature_store) == (0, 6)


# --- half-done extractions written by version 2.0.0 before the row store had its name

HALF_DONE = Path(__file__).parent / "golden" / "half_done"
OLD_JOB = {
    "data": "5f1e2c3b4a596877",
    "batch_size": 2,
    "backend": "torch",
    "precision": "fp32",
    "num_threads": None,
    "vision_model": None,
    "text_model": None,
    "model": [["/models/clip_cn_vit-b-16.pt", 753000000, 1700000000000000000]],
    "device": "cpu",
    "version": "2.0.0",
    "decode": "exact",
}


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HALF_DONE, tmp_path / "half_done"))


def test_rows_of_an_older_run_are_gone_on_with(half_done: Path) -> None:
    rows, log = reopened(half_done / "pictures.npz", OLD_JOB, embed_dim=4)
    assert rows.tobytes() == np.eye(4, dtype=np.float32)[:3].tobytes()
    assert log == [f"{half_done}/pictures.npz.partial: 3 rows done, continuing at row 4"]


def test_rows_of_an_older_run_with_other_settings_are_computed_again_and_the_setting_is_named(half_done: Path) -> None:
    rows, (line,) = reopened(half_done / "pictures.npz", {**OLD_JOB, "precision": "bf16"}, embed_dim=4)
    assert len(rows) == 0
    assert line.endswith("belongs to another extraction (other precision); starting from the beginning")


def test_shards_of_an_older_run_are_gone_on_with(half_done: Path) -> None:
    folder = open_storage(str(half_done / "shards"))
    manifest = Manifest("image_id", {"digest": "aaaa"}, {"digest": "dddd"}, 10, 4)
    finished = begin_shards(folder, manifest, overwrite=False)
    assert finished == {0: Finished(4), 1: Finished(3, (Skipped("p5", "p5: damaged"),))}
    write_shard(folder, manifest, Shard(2, 8, 10), ["p8", "p9"], np.float32([[8.25, 0.5], [9.25, 0.5]]))
    features = read_features(folder.path, "image_id")
    assert features.ids == [f"p{number}" for number in range(10) if number != 5]
    assert features.vectors[:, 0].tolist() == [number + 0.25 for number in range(10) if number != 5]
