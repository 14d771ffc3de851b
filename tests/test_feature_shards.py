"""Features in shards: every input in one, finished ones told by what is there, read back as one; who computes them."""

import errno
import io
import json
import pickle
import tarfile
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from unreadable_files import unreadable

from cn_clip import zoo
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.opening import weights_digest
from cn_clip.command import Speaker
from cn_clip.data.bulk_pictures import open_collection
from cn_clip.data.storage import Storage, StorageError, open_storage
from cn_clip.demo import emoji
from cn_clip.errors import CnClipError, ConfigError, DataError, UnreadableError
from cn_clip.eval import extract_features, make_topk_predictions
from cn_clip.features import ray_extraction, ray_pool
from cn_clip.features.files import read_features
from cn_clip.features.ray_extraction import ShardJob, ShardWorker, Task, TextPart, model_facts
from cn_clip.features.ray_pool import Actors, Node, Pool, plan_actors
from cn_clip.features.ray_weights import Weights, described, placed
from cn_clip.features.store import (
    Finished,
    Manifest,
    Shard,
    ShardFolder,
    Skipped,
    begin_shards,
    confirm_shards,
    write_shard,
)
from cn_clip.index.sources import is_feature_file

MODEL, DATA = {"digest": "aaaa"}, {"digest": "dddd"}
NUM_PICTURES = 10


def manifest(number: int = 10, size: int = 4, **changed: Any) -> Manifest:
    return Manifest(
        **{"field": "image_id", "model": MODEL, "data": DATA, "num_inputs": number, "shard_size": size} | changed
    )


def rows(shard: Shard) -> np.ndarray:
    return np.arange(shard.start, shard.stop, dtype=np.float32)[:, None] + np.float32([0.25, 0.5])


def write(folder: Storage, one: Manifest, shard: Shard) -> Finished:
    return write_shard(folder, one, shard, [f"p{number}" for number in range(shard.start, shard.stop)], rows(shard))


def write_late(folder: Storage, one: Manifest, shard: Shard) -> None:
    """As a run that looked at the manifest before another run replaced it, and wrote after that."""
    file = folder.child("manifest.json")
    now = file.read()
    file.write(one.to_json())
    write(folder, one, shard)
    file.write(now)


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


def test_shards_in_a_store_that_is_no_disk_are_finished_and_gone_on_with() -> None:
    folder = open_storage("memory://bucket/features/images")
    assert begin_shards(folder, manifest(), overwrite=False) == {}
    with folder.alone("busy"):
        write(folder, manifest(), manifest().shards()[1])
    folder.delete_leftovers("part-")
    assert begin_shards(folder, manifest(), overwrite=False) == {1: Finished(4)}
    with pytest.raises(ConfigError, match=r"memory://bucket/features/images: holds the results of another extraction"):
        begin_shards(folder, manifest(5), overwrite=False)
    assert begin_shards(folder, manifest(5), overwrite=True) == {}
    assert [folder.below(file.path) for file in folder.list_files()] == ["manifest.json"]


@pytest.fixture
def filled(folder: Storage) -> Storage:
    """All three shards of `manifest()`."""
    begin_shards(folder, manifest(), overwrite=False)
    for shard in manifest().shards():
        write(folder, manifest(), shard)
    return folder


# --- the plan, and what is done of it


def test_ten_inputs_in_fours_are_three_shards() -> None:
    assert manifest().shards() == [(0, 0, 4), (1, 4, 8), (2, 8, 10)]
    assert [shard.name for shard in manifest().shards()] == [f"part-0000{n}.parquet" for n in range(3)]


@given(st.integers(0, 500), st.integers(1, 60))
def test_every_input_is_in_one_shard(number: int, size: int) -> None:
    shards = manifest(number, size).shards()
    assert [place for shard in shards for place in range(shard.start, shard.stop)] == list(range(number))
    assert all(0 < shard.stop - shard.start <= size for shard in shards)


def test_a_new_folder_has_a_manifest_and_nothing_finished(folder: Storage) -> None:
    assert begin_shards(folder, manifest(), overwrite=False) == {}
    assert json.loads(Path(folder.path, "manifest.json").read_text())["num_shards"] == 3


def test_shards_that_are_there_are_finished_and_damaged_or_foreign_ones_are_not(filled: Storage) -> None:
    begin = begin_shards
    assert begin(filled, manifest(), overwrite=False) == {0: Finished(4), 1: Finished(4), 2: Finished(2)}
    parts = [Path(filled.path, shard.name) for shard in manifest().shards()]
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    write_late(filled, manifest(data={"digest": "other"}), Shard(1, 4, 8))
    assert begin(filled, manifest(), overwrite=False) == {2: Finished(2)}
    parts[2].write_bytes(parts[1].read_bytes())
    assert begin(filled, manifest(), overwrite=False) == {}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": {"digest": "bbbb"}}, "image_id model bbbb data dddd shard-size 4"),
        ({"data": {"digest": "eeee"}}, "image_id model aaaa data eeee shard-size 4"),
        ({"shard_size": 5}, "image_id model aaaa data dddd shard-size 5"),
    ],
)
def test_another_job_is_refused_with_both_fingerprints(filled: Storage, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        begin_shards(filled, manifest(**changed), overwrite=False)
    assert f"[{told}]" in str(raised.value)
    assert "[image_id model aaaa data dddd shard-size 4]" in str(raised.value)
    assert len(list(Path(filled.path).glob("part-*"))) == 3


def test_overwrite_removes_the_shards_and_nothing_else(filled: Storage) -> None:
    Path(filled.path, "notes.txt").write_text("mine")
    other = manifest(model={"digest": "bbbb"})
    assert begin_shards(filled, other, overwrite=True) == {}
    assert sorted(path.name for path in Path(filled.path).iterdir()) == ["manifest.json", "notes.txt"]
    assert begin_shards(filled, other, overwrite=False) == {}


def test_shards_of_nobody_knows_what_are_not_written_over(filled: Storage) -> None:
    Path(filled.path, "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"holds 3 Parquet shards but no manifest\.json"):
        begin_shards(filled, manifest(), overwrite=False)


def test_a_manifest_that_is_none_is_told(filled: Storage) -> None:
    for damaged in (
        "{",
        "[]",
        '{"field": "image_id"}',
        Path(filled.path, "manifest.json").read_text().replace("4", "5"),
    ):
        Path(filled.path, "manifest.json").write_text(damaged)
        with pytest.raises(DataError, match=r"manifest\.json: is no manifest of feature shards"):
            begin_shards(filled, manifest(), overwrite=False)


# --- reading


def test_the_shards_read_as_one_file_in_the_order_of_the_inputs(filled: Storage) -> None:
    features = read_features(filled.path, "image_id")
    assert features.ids == [f"p{number}" for number in range(10)]
    np.testing.assert_array_equal(features.vectors, rows(Shard(0, 0, 10)))
    assert is_feature_file(Path(filled.path))


def test_ids_of_both_types_and_a_shard_without_rows_read_back(folder: Storage) -> None:
    one = manifest(6, 2)
    begin_shards(folder, one, overwrite=False)
    for shard, ids in zip(one.shards(), ([1, 2], [], [3, "004"]), strict=True):
        skipped = [] if ids else [Skipped("x", "x: damaged"), Skipped("y", "y: damaged")]
        write_shard(folder, one, shard, ids, rows(shard)[: len(ids)], skipped=skipped)
    assert read_features(folder.path, "image_id").ids == [1, 2, 3, "004"]
    finished = begin_shards(folder, one, overwrite=False)
    assert finished[1] == Finished(0, (Skipped("x", "x: damaged"), Skipped("y", "y: damaged")))


def test_what_cannot_be_read_is_told(filled: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text_id, only image_id"):
        read_features(filled.path, "text_id")
    with pytest.raises(DataError, match="is a folder without manifest"):
        read_features(tmp_path, "image_id")
    second = Path(filled.path, "part-00001.parquet")
    second.write_bytes(Path(filled.path, "part-00000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"part-00001\.parquet: holds 4 rows of the inputs \[0, 0, 4\]; expected those"):
        read_features(filled.path, "image_id")
    second.write_bytes(b"PAR1")
    with pytest.raises(DataError) as raised:
        read_features(filled.path, "image_id")
    assert str(raised.value).startswith(f"{second}: the end of the file: is no shard of features (")
    assert str(raised.value).endswith("run the extraction again, which makes the shards that are not of manifest.json")
    assert raised.value.path == str(second)
    second.unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards are missing \(part-00001\.parquet\)"):
        read_features(filled.path, "image_id")


def test_shards_of_two_models_are_not_read_as_one(filled: Storage) -> None:
    other = manifest(model={"digest": "bbbb"})
    write_late(filled, other, Shard(1, 4, 8))
    with pytest.raises(DataError) as raised:
        read_features(filled.path, "image_id")
    assert str(raised.value) == (
        f"{filled.path}/part-00001.parquet: is of another extraction, by its key {other.key!r}; that of the manifest "
        f"is {manifest().key!r}; run the extraction again, which makes the shards that are not of manifest.json"
    )
    assert begin_shards(filled, manifest(), overwrite=False).keys() == {0, 2}  # as it says


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_run_that_goes_on_after_another_took_its_folder_changes_nothing(tmp_path: Path, place: str) -> None:
    where = str(tmp_path / "out") if place == "disk" else f"memory://{tmp_path}/out"
    folder, first, second = open_storage(where), manifest(), manifest(model={"digest": "bbbb"})
    begin_shards(folder, first, overwrite=False)
    write(folder, first, first.shards()[0])  # and is paused
    begin_shards(folder, second, overwrite=True)
    for shard in second.shards():
        write(folder, second, shard)
    before = {file.path: folder.at(file.path).read() for file in folder.list_files()}
    told = (
        r"out: another run has taken the folder meanwhile \[image_id model bbbb .*what this run \[image_id model aaaa"
    )
    with pytest.raises(ConfigError, match=told):
        write(folder, first, first.shards()[1])
    with pytest.raises(ConfigError, match=told):
        confirm_shards(folder, first)
    assert {file.path: folder.at(file.path).read() for file in folder.list_files()} == before
    assert confirm_shards(folder, second).keys() == {0, 1, 2}
    write_late(folder, first, Shard(1, 4, 8))
    assert confirm_shards(folder, second).keys() == {0, 2}
    opened = ShardFolder.opened(folder, "image_id")
    for read in (opened.blocks, opened.ids):
        with pytest.raises(DataError, match=r"part-00001\.parquet: is of another extraction, by its key"):
            list(read(Shard(1, 4, 8)))


def test_a_run_looks_again_before_it_says_that_it_is_done(filled: Storage) -> None:
    job = ShardJob("image", filled, manifest())
    finished = begin_shards(filled, manifest(), overwrite=False)
    work = ray_extraction._Progress(job, ray_extraction._Inputs({}, 10, lambda shard: ""), finished)
    ray_extraction._look_again(work)
    write_late(filled, manifest(model={"digest": "bbbb"}), Shard(1, 4, 8))
    with pytest.raises(DataError, match=r"out: 1 shard of this run were written over or removed .* \(part-00001\.par"):
        ray_extraction._look_again(work)


def test_a_folder_that_is_written_again_while_it_is_read_is_refused(filled: Storage) -> None:
    opened = ShardFolder.opened(filled, "image_id")
    assert [finished.num_rows for finished, width in opened.widths() if width == 2] == [4, 4, 2]
    opened.confirm()
    write(filled, manifest(), Shard(1, 4, 8))
    with pytest.raises(DataError, match="changed while it was read"):
        opened.confirm()


def test_a_folder_of_shards_that_cannot_be_read_now_is_not_taken_for_another(filled: Storage) -> None:
    for name in ("manifest.json", "part-00001.parquet"):
        for stat in (True, False):
            with unreadable(errno.EIO, Path(filled.path, name), stat=stat), pytest.raises(UnreadableError, match=name):
                read_features(filled.path, "image_id")
    with unreadable(errno.EIO, Path(filled.path), stat=True), pytest.raises(UnreadableError):
        is_feature_file(Path(filled.path))


def test_topk_takes_folders_of_shards(tmp_path: Path) -> None:
    for field, name in (("image_id", "images"), ("text_id", "texts")):
        one = manifest(4, 3, field=field)
        place = open_storage(str(tmp_path / name))
        begin_shards(place, one, overwrite=False)
        for shard in one.shards():
            write_shard(
                place,
                one,
                shard,
                list(range(shard.start, shard.stop)),
                np.eye(4, dtype=np.float32)[shard.start : shard.stop],
            )
    flags = [f"--image-feats={tmp_path}/images", f"--text-feats={tmp_path}/texts", "--top-k=1"]
    make_topk_predictions.main([*flags, f"--output={tmp_path}/top.jsonl"])
    found = [json.loads(line) for line in (tmp_path / "top.jsonl").read_text().splitlines()]
    assert [(one["text_id"], one["image_ids"]) for one in found] == [(n, [n]) for n in range(4)]


# --- who computes


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([Node(16, 0)], {}, (2, 8, 0, 2)),
        ([Node(2, 0)], {}, (1, 2, 0, 1)),
        ([Node(16, 0), Node(8, 0)], {}, (3, 8, 0, 3)),
        ([Node(16, 0)], {"num_actors": 4}, (4, 4, 0, 4)),
        ([Node(4, 0)], {"num_actors": 8}, (8, 1, 0, 4)),
        ([Node(16, 0)], {"cpus_per_actor": 3}, (5, 3, 0, 5)),
        ([Node(64, 8)], {}, (8, 8, 1, 8)),
        ([Node(64, 8), Node(4, 0)], {}, (8, 8, 1, 8)),
        ([Node(64, 8)], {"gpus_per_actor": 0.5}, (16, 4, 0.5, 16)),
        ([Node(64, 8)], {"device": "cpu"}, (8, 8, 0, 8)),
    ],
)
def test_one_process_a_gpu_or_a_group_of_cores(
    nodes: list[Node], settings: dict[str, Any], expected: tuple[float, ...]
) -> None:
    assert plan_actors(nodes, **settings) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"cpus_per_actor": 9},
            "no machine of the Ray cluster has room for 9 CPUs and 0 GPUs; it has: 8 CPUs and 0 GPUs",
        ),
        ({"gpus_per_actor": 1}, "has room for 1 CPUs and 1 GPUs"),
        ({"device": "cuda"}, "the Ray cluster has no GPU"),
        ({"device": "cuda:1"}, "Ray chooses the GPU of each process"),
    ],
)
def test_what_the_cluster_has_not_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan_actors([Node(8, 0)], **settings)


class Answer:
    """What ray gives at once for a call; as a key, like no other."""

    def __init__(self, worker: "FakeWorker", task: Any) -> None:
        self.worker, self.task = worker, task


class FakeWorker:
    def __init__(self, node: str) -> None:
        self.node, self.is_dead = node, False
        self.ready = SimpleNamespace(remote=lambda: Answer(self, None))


class FakeRay:
    """Answers at once, the last call first, so that some workers never come; `errors`: of a task, one an attempt.

    Workers go to the machines in turn, as many as these hold; others wait.
    """

    class exceptions:  # noqa: N801 - as ray names it
        class RayActorError(Exception):
            pass

    def __init__(self, errors: dict[int, list[Exception]] | None = None, nodes: dict[str, int] | None = None) -> None:
        self.errors = errors or {}
        self.capacity = {"a": 2} if nodes is None else nodes
        self.done: list[int] = []
        self.tried: list[tuple[int, str]] = []
        self.workers: list[FakeWorker] = []
        self.hired = 0
        self.at_wait: list[Callable[[], object]] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": name, "Resources": {"CPU": n}} for name, n in self.capacity.items()]

    def kill(self, worker: FakeWorker) -> None:
        worker.is_dead = True

    def wait(self, waiting: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        if self.at_wait:
            self.at_wait.pop(0)()
        here = [one for one in waiting if one.worker.node]
        return here[-1:], []

    def get(self, answered: Answer) -> Any:
        task, worker = answered.task, answered.worker
        assert not worker.is_dead
        if worker.node not in self.capacity:
            raise self.exceptions.RayActorError("its node has died")
        if task is None:
            return worker.node
        self.tried.append((task, worker.node))
        if self.errors.get(task):
            error = self.errors[task].pop(0)
            if isinstance(error, CnClipError):
                return error
            raise error
        self.done.append(task)
        return f"result of {task}"


class FakeCrew:
    """One CPU a worker; tasks are numbers."""

    def __init__(self, ray: FakeRay) -> None:
        self.ray = ray

    def hire(self, size: Actors, node: str | None) -> FakeWorker:
        living = Counter(worker.node for worker in self.ray.workers if not worker.is_dead)
        free = [name for name, number in self.ray.capacity.items() if living[name] < number]
        worker = FakeWorker(next((one for one in free if node in (None, one)), ""))
        self.ray.workers.append(worker)
        self.ray.hired += 1
        return worker

    def send(self, worker: FakeWorker, task: int) -> Answer:
        return Answer(worker, task)

    def named(self, task: int) -> str:
        return f"shard {task}"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "LOOK_SECONDS", 0.0)


def pool_of(ray: FakeRay, **settings: Any) -> "Pool[int]":
    return Pool(ray, FakeCrew(ray), lambda nodes: plan_actors(nodes, cpus_per_actor=1), Speaker(quiet=True), **settings)


def died() -> Exception:
    return FakeRay.exceptions.RayActorError("gone")


def worked_off(pool: "Pool[int]", number: int = 3) -> list[int]:
    return [task for task, _ in pool.results(deque(range(number)))]


def test_a_shard_whose_process_died_is_done_again_and_each_once() -> None:
    ray = FakeRay({1: [died(), died()]})
    assert sorted(worked_off(pool_of(ray))) == sorted(ray.done) == [0, 1, 2]
    assert ray.hired == 4


def test_a_shard_that_kills_its_process_time_and_again_stops_the_run() -> None:
    with pytest.raises(CnClipError, match=r"shard 1: its process died 3 times"):
        worked_off(pool_of(FakeRay({1: [died()] * 3})))


def test_an_error_in_the_data_is_not_tried_again() -> None:
    ray = FakeRay({1: [DataError("bad picture")]})
    with pytest.raises(DataError, match="bad picture"):
        worked_off(pool_of(ray))
    assert [task for task, _ in ray.tried].count(1) == 1


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no"), TypeError("cannot pickle x")])
def test_any_error_of_a_process_is_tried_again_by_a_new_one(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = FakeRay({1: [error]})
    assert sorted(worked_off(pool_of(ray))) == [0, 1, 2]
    assert "shard 1: failed (" in capsys.readouterr().err


def test_a_shard_that_failed_is_done_on_another_machine() -> None:
    ray = FakeRay({0: [died()]}, {"a": 1, "b": 1})
    assert worked_off(pool_of(ray, num_actors=1), 1) == [0]
    assert [node for _, node in ray.tried] == ["a", "b"]


def test_so_many_shards_may_fail_and_are_named() -> None:
    ray = FakeRay({0: [OSError(5, "Input/output error")] * 3, 2: [DataError("bad picture")]})
    pool = pool_of(ray, max_failed=2)
    assert sorted(worked_off(pool, 5)) == [1, 3, 4]
    assert sorted((one.task, one.reason) for one in pool.failed) == [
        (0, "[Errno 5] Input/output error"),
        (2, "bad picture"),
    ]
    ray = FakeRay({0: [OSError(5, "Input/output error")] * 3, 2: [DataError("bad picture")]})
    with pytest.raises(CnClipError, match=r"bad picture|shard 0: failed 3 times"):
        worked_off(pool_of(ray, max_failed=1), 5)


def test_a_wrong_setting_stops_the_run_whatever_may_fail() -> None:
    with pytest.raises(ConfigError, match="other weights"):
        worked_off(pool_of(FakeRay({1: [ConfigError("other weights")]}), max_failed=5))


def test_machines_that_join_get_processes_and_those_that_leave_keep_none() -> None:
    ray = FakeRay(nodes={"a": 1})
    ray.at_wait = [lambda: None, lambda: None, lambda: ray.capacity.update(b=1), lambda: None, lambda: None]
    ray.at_wait += [lambda: ray.capacity.pop("a")]
    assert sorted(worked_off(pool_of(ray), 12)) == list(range(12))
    nodes = [node for _, node in ray.tried]
    assert nodes[0] == "a"
    assert nodes[-3:] == ["b"] * 3
    assert all(worker.is_dead for worker in ray.workers)


def test_a_cluster_without_room_is_waited_for_and_not_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay(nodes={"head": 0})
    looks = iter(range(100))

    def nodes() -> list[dict[str, Any]]:
        if next(looks) == 2:
            ray.capacity["b"] = 1
        return FakeRay.nodes(ray)

    ray.nodes = nodes  # type: ignore[method-assign]
    assert sorted(worked_off(pool_of(ray, wait_s=60))) == [0, 1, 2]
    assert capsys.readouterr().err.count("no machine of the cluster has room for a process yet") == 1
    with pytest.raises(ConfigError, match=r"no machine with room for a process joined the Ray cluster within 1e-09 s"):
        worked_off(pool_of(FakeRay(nodes={"head": 0}), wait_s=1e-9))
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has room for 1 CPUs and 0 GPUs"):
        worked_off(pool_of(FakeRay(nodes={"head": 0})))


def test_a_cluster_on_which_no_process_starts_stops_the_run() -> None:
    class Broken(FakeRay):
        def get(self, answered: Answer) -> Any:
            raise died()

    with pytest.raises(CnClipError, match="a process, before it had a shard: its process died 3 times"):
        worked_off(pool_of(Broken()))


# --- the work of one process


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for one in emoji.load()[:NUM_PICTURES]:
        (folder / f"{one.number:03d}.png").write_bytes(emoji.png(one))
    return folder


def options(tmp_path: Path, pictures: Path, **settings: Any) -> extract_features.Options:
    chosen = {"model": "Emoji-Tiny", "engine": "ray", "output": str(tmp_path / "out"), "image_data": str(pictures)}
    small = {"extract_image_feats": True, "img_batch_size": 4, "device": "cpu", "num_threads": 1}
    return extract_features.Options(**{**chosen, **small, **settings})


def work_off(chosen: extract_features.Options) -> list[Finished | CnClipError]:
    """What `extract` does, in this process."""
    weights = weights_digest(chosen.chosen)
    collection = open_collection(chosen.image_data)
    of = {"digest": collection.digest}
    one = Manifest("image_id", model_facts(chosen, "image", weights), of, len(collection.ids), 4)
    job = ShardJob("image", open_storage(str(chosen.output)).child("images"), one)
    begin_shards(job.folder, one, overwrite=chosen.overwrite)
    worker = pickle.loads(pickle.dumps(ShardWorker(chosen, ["image"], Weights(weights))))
    tasks = [Task(job, shard, collection.part(shard.start, shard.stop)) for shard in one.shards()]
    return [worker.work(pickle.loads(pickle.dumps(task))) for task in tasks]


def test_shards_with_and_without_tf32_are_not_of_one_run(tmp_path: Path, pictures: Path) -> None:
    plain, strict = (
        model_facts(options(tmp_path, pictures, strict_fp32=strict), "image", "w") for strict in (False, True)
    )
    assert plain["digest"] != strict["digest"]
    assert "strict_fp32" not in plain


@pytest.mark.parametrize(("model", "at_home"), [("exported", False), ("Emoji-Tiny", True)])
def test_workers_in_other_folders_open_the_same_model(
    tmp_path: Path, pictures: Path, model: str, at_home: bool
) -> None:
    def hire(settings: extract_features.Options, *_: object) -> str:
        return str(settings.model)

    fake = SimpleNamespace(remote=lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=hire)))
    crew = ray_extraction._Crew(fake, options(tmp_path, pictures, model=model), ["image"], Weights("w"))
    assert crew.hire(Actors(1, 8, 0, 1), None) == (model if at_home else str(Path.cwd() / model))


def test_a_worker_writes_the_encoders_rows_with_ids_and_paths(tmp_path: Path, pictures: Path) -> None:
    from pyarrow import parquet

    assert work_off(options(tmp_path, pictures)) == [Finished(4), Finished(4), Finished(2)]
    features = read_features(tmp_path / "out" / "images", "image_id")
    files = sorted(pictures.iterdir())
    assert features.ids == [path.name for path in files]
    expected = Encoder("Emoji-Tiny", device="cpu").encode_images(files)
    np.testing.assert_allclose(features.vectors, expected, atol=1e-6)
    table = parquet.read_table(tmp_path / "out" / "images" / "part-00002.parquet")
    assert table.column_names == ["image_id", "feature", "path"]
    assert table["path"].to_pylist() == [str(path) for path in files[8:]]


def test_captions_columns_and_thumbnails_travel_beside_the_rows_into_an_index(tmp_path: Path, pictures: Path) -> None:
    from cn_clip.index import build
    from cn_clip.retrieval.store import open_index

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
            info = tarfile.TarInfo(f"{path.stem}.json")
            data = json.dumps({"author": f"作者 {path.stem}", "year": int(path.stem)}).encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    first, second, third = (path.stem for path in sorted(pictures.iterdir())[:3])
    table = f"image,text,place\ns.tar/{first},第一张,北京\ns.tar/{third},,上海\n"
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    plain = options(tmp_path, pictures, image_data=str(tmp_path / "s.tar"))
    chosen = replace(plain, columns=("author",), metadata=str(tmp_path / "t.csv"), thumbnail_size=16)
    inputs = [ray_extraction._pictures(one) for one in (plain, chosen)]
    assert inputs[0].facts["digest"] == open_collection(plain.image_data).digest  # a run of before goes on
    assert inputs[0].facts["digest"] != inputs[1].facts["digest"]
    weights = weights_digest(chosen.chosen)
    one = Manifest("image_id", model_facts(chosen, "image", weights), inputs[1].facts, inputs[1].number, 4)
    job = ShardJob("image", open_storage(str(chosen.output)).child("images"), one)
    begin_shards(job.folder, one, overwrite=False)
    work = ray_extraction._Progress(job, inputs[1], {})
    worker = ShardWorker(chosen, ["image"], Weights(weights))
    sent = [ray_extraction._task_of(work, shard) for shard in one.shards()]
    assert [worker.work(pickle.loads(pickle.dumps(task))) for task in sent] == [Finished(4), Finished(4), Finished(2)]
    build.main([job.folder.path, "--output", str(tmp_path / "i"), "--json"])
    index = open_index(tmp_path / "i")
    items = dict(index.items())
    assert list(items) == [f"s.tar/{path.stem}" for path in sorted(pictures.iterdir())]
    assert items[f"s.tar/{first}"] == {
        "path": f"{tmp_path}/s.tar/{first}.png",
        "author": f"作者 {first}",
        "caption": "第一张",
        "place": "北京",
        "source": job.folder.path,
    }
    assert items[f"s.tar/{third}"].keys() == {"path", "author", "place", "source"}
    assert items[f"s.tar/{second}"].keys() == {"path", "author", "source"}
    with Image.open(io.BytesIO(index.thumbnail(f"s.tar/{second}"))) as image:
        assert (image.format, max(image.size)) == ("JPEG", 16)


def test_a_worker_gives_equal_texts_equal_rows(tmp_path: Path, pictures: Path) -> None:
    chosen = options(tmp_path, pictures, extract_text_feats=True)
    one = Manifest("text_id", MODEL, DATA, 3, 4)
    job = ShardJob("text", open_storage(str(tmp_path / "texts")), one)
    begin_shards(job.folder, one, overwrite=False)
    task = Task(job, one.shards()[0], TextPart([(7, "CAT 猫"), ("b", "笑脸"), (9, "cat 猫")]))
    assert ShardWorker(chosen, ["text"], Weights(weights_digest(chosen.chosen))).work(task) == Finished(3)
    features = read_features(tmp_path / "texts", "text_id")
    assert features.ids == [7, "b", 9]
    expected = Encoder("Emoji-Tiny", device="cpu").encode_texts(["cat 猫", "笑脸", "cat 猫"])
    np.testing.assert_allclose(features.vectors, expected, atol=1e-6)
    np.testing.assert_array_equal(features.vectors[0], features.vectors[2])


@pytest.fixture
def with_bad(tmp_path: Path, pictures: Path) -> Path:
    folder = tmp_path / "with-bad"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "0035-bad.jpg").write_bytes(b"no picture")
    return folder


def test_a_bad_picture_stops_its_shard_or_is_left_out_and_listed(tmp_path: Path, with_bad: Path) -> None:
    place = f"{with_bad}/0035-bad.jpg"
    first, second, third = work_off(options(tmp_path, with_bad))
    assert (type(first), second, third) == (DataError, Finished(4), Finished(3))
    assert str(first).startswith(f"{place}: the picture of 10 bytes does not decode")
    first, *_ = work_off(options(tmp_path, with_bad, on_error="skip"))
    assert isinstance(first, Finished)
    assert (first.num_rows, [one.id for one in first.skipped]) == (3, ["0035-bad.jpg"])
    ids = read_features(tmp_path / "out" / "images", "image_id").ids
    assert len(ids) == NUM_PICTURES
    assert "0035-bad.jpg" not in ids


def test_a_store_that_fails_is_no_reason_to_leave_a_picture_out(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(place: Storage) -> bytes:
        raise StorageError(f"{place.name}: cannot be read (connection lost)")

    monkeypatch.setattr(Storage, "read", fail)
    with pytest.raises(StorageError, match="connection lost"):  # so that another machine tries
        work_off(options(tmp_path, pictures, on_error="skip"))


def test_a_worker_with_other_weights_refuses(tmp_path: Path, pictures: Path) -> None:
    one = manifest(1)
    task = Task(ShardJob("image", open_storage(str(tmp_path)), one), one.shards()[0], TextPart([(1, "猫")]))
    error = ShardWorker(options(tmp_path, pictures), ["image"], Weights("other")).work(task)
    assert isinstance(error, ConfigError)
    assert "Emoji-Tiny is another file there" in str(error)


def test_a_machine_without_the_weights_keeps_a_copy_of_them_by_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "DOWNLOAD_ROOT", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    (tmp_path / "store").mkdir()
    path = Encoder("Emoji-Tiny", device="cpu").save(tmp_path / "here" / "mine.pt")
    chosen = Choice(str(path), device="cpu")
    there = described(chosen, "auto")
    path.rename(tmp_path / "store" / "mine.pt")
    with pytest.raises(ConfigError, match="copy the same weights to every machine"):
        placed(replace(chosen, model="Emoji-Tiny"), replace(there, source="shared"))
    from_folder = replace(there, source=str(tmp_path / "store"))
    copy = Path(placed(chosen, from_folder).model)
    assert copy == tmp_path / "cache" / "ray-weights" / there.digest / "mine.pt"
    copy.write_bytes(b"damaged")
    assert Path(placed(chosen, from_folder).model).read_bytes() == (tmp_path / "store" / "mine.pt").read_bytes()
    (tmp_path / "store" / "mine.pt").write_bytes(b"another")
    copy.unlink()
    with pytest.raises(StorageError, match=r"what came of mine\.pt is another file"):
        placed(chosen, from_folder)


# --- the flags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--engine=ray"], "--output: expected the folder"),
        (["--output=x"], "--output: is for --engine ray"),
        (["--num-actors=2"], "--num-actors: is for --engine ray"),
        (["--overwrite"], "--overwrite: is for --engine ray"),
        (["--engine=ray", "--output=memory://x"], "--output memory://x: each process has its own memory; use a path"),
        (["--engine=ray", "--output=x", "--shard-size=0"], "--shard-size: expected at least 1, got 0"),
        (["--engine=ray", "--output="], "--output: expected the folder"),
        (["--engine=ray", "--output=x", "--gpus-per-actor=1.5"], "--gpus-per-actor: expected a whole number"),
        (["--engine=ray", "--output=x", "--gpus-per-actor=-1"], "--gpus-per-actor: expected at least 0, got -1"),
        (["--engine=ray", "--output=x", "--gpus-per-actor=nan"], "--gpus-per-actor: expected at least 0, got nan"),
        (["--engine=ray", "--output=x", "--image-feat-output-path=y"], "writes into --output; leave it out"),
        (["--engine=ray", "--output=x", "--output-format=npz"], "--engine ray writes parquet"),
        (["--columns=caption"], "--columns: is for --engine ray"),
        (["--engine=ray", "--output=x", "--image-column=id"], "--image-column: needs --metadata"),
    ],
)
def test_flags_that_the_engine_does_not_take_are_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        extract_features.main(["--extract-image-feats", "--resume=Emoji-Tiny", *flags])
    assert raised.value.code in (1, 2)
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
