"""`--engine ray` on a local cluster: the rows of the local engine, after kills too, each once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dataset_files import REPOSITORY, jsonl_line, tsv_line, write_split

from cn_clip.demo import emoji
from cn_clip.features.files import Features, IdField, read_features
from cn_clip.preprocess import build_lmdb_dataset

pytestmark = pytest.mark.ray

NUM = 60
SHARD_SIZE = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures as an LMDB and as files, with their names, and the features of the local engine."""
    folder = tmp_path_factory.mktemp("ray")
    chosen = emoji.load()[:NUM]
    emoji_texts = [jsonl_line(one.number, one.name, [one.number]) for one in chosen]
    write_split(folder, [tsv_line(one.number, emoji.png(one)) for one in chosen], emoji_texts, split="valid")
    build_lmdb_dataset.main(["--data_dir", str(folder), "--splits", "valid"])
    (folder / "pictures").mkdir()
    for one in chosen:
        (folder / "pictures" / f"{one.number:04d}.png").write_bytes(emoji.png(one))
    done = features(folder, "--extract-text-feats")
    assert done.returncode == 0, done.stderr
    return folder


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    sources = [f"--image-data={folder}/lmdb/valid/imgs", f"--text-data={folder}/valid_texts.jsonl"]
    command = [sys.executable, "-m", "cn_clip", "features", "--extract-image-feats", *sources]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--resume=Emoji-Tiny", "--device=cpu", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def features(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return ended(start(folder, *flags))


def on_ray(output: Path, *more: str) -> list[str]:
    workers = ["--num-actors=2", "--cpus-per-actor=1", f"--shard-size={SHARD_SIZE}"]
    return ["--engine=ray", f"--output={output}", *workers, "--json", *more]


def assert_complete(data: Path, output: Path, *kinds: str) -> None:
    local: dict[str, tuple[str, IdField]] = {
        "images": ("valid_imgs.img_feat.jsonl", "image_id"),
        "texts": ("valid_texts.txt_feat.jsonl", "text_id"),
    }
    for kind in kinds or ("images",):
        name, field = local[kind]
        found, expected = read_features(output / kind, field), read_features(data / name, field)
        assert found.ids == expected.ids
        assert len(found.ids) == NUM
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)
        assert not [path for path in (output / kind).iterdir() if path.name.startswith(".")]


def parts(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((output / "images").glob("part-*.parquet"))}


def wait_for_parts(output: Path, process: "subprocess.Popen[str]", number: int) -> None:
    while len(parts(output)) < number:
        assert process.poll() is None, "it ended before"
        time.sleep(0.005)


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """The processes of the actors of a run: descendants whose title ray has set to the name of the class."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "stat").read_text()
            titles[int(path.name)] = (path / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        parents[int(path.name)] = int(status.rpartition(")")[2].split()[1])

    def is_below(pid: int) -> bool:
        return pid == process.pid or (pid in parents and is_below(parents[pid]))

    return sorted(pid for pid, title in titles.items() if title.startswith("ray::ShardWorker") and is_below(pid))


def test_two_workers_write_the_rows_of_the_local_engine(data: Path, tmp_path: Path) -> None:
    done = features(data, *on_ray(tmp_path / "out", "--extract-text-feats"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_images"], result["num_texts"], result["num_image_shards"]) == (NUM, NUM, NUM // SHARD_SIZE)
    assert_complete(data, tmp_path / "out", "images", "texts")


def test_the_shard_of_a_killed_worker_is_done_again(data: Path, tmp_path: Path) -> None:
    process = start(data, *on_ray(tmp_path / "out", "--shard-size=1"))
    wait_for_parts(tmp_path / "out", process, 2)
    (victim, *_) = workers_of(process)
    os.kill(victim, signal.SIGKILL)
    done = ended(process)
    assert done.returncode == 0, done.stderr
    assert "its process died; doing it again" in done.stderr
    assert_complete(data, tmp_path / "out")


def test_a_killed_run_goes_on_and_leaves_finished_shards_alone(data: Path, tmp_path: Path) -> None:
    process = start(data, *on_ray(tmp_path / "out", "--shard-size=1"))
    wait_for_parts(tmp_path / "out", process, 3)
    workers = workers_of(process)
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they end with the driver
        time.sleep(0.05)
    before = parts(tmp_path / "out")
    assert 3 <= len(before) < NUM
    done = features(data, *on_ray(tmp_path / "out", "--shard-size=1"))
    assert done.returncode == 0, done.stderr
    assert f"{len(before)}/{NUM}" in done.stderr
    assert before.items() <= parts(tmp_path / "out").items()
    assert_complete(data, tmp_path / "out")
    again = features(data, *on_ray(tmp_path / "out", "--shard-size=1", "--precision=bf16"))
    assert again.returncode == 1
    assert again.stderr.count("image_id model ") == 2
    assert "Traceback" not in again.stderr


def test_a_bad_picture_stops_the_run_or_is_listed(data: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in sorted((data / "pictures").iterdir())[:10]:
        (pictures / path.name).symlink_to(path)
    (pictures / "0003-bad.jpg").write_bytes(b"no picture")
    flags = [f"--image-data={pictures}", *on_ray(tmp_path / "out")]
    done = features(data, *flags)
    assert done.returncode == 1
    assert f"{pictures}/0003-bad.jpg: the picture of 10 bytes does not decode" in done.stderr
    assert "Traceback" not in done.stderr
    done = features(data, *flags, "--on-error=skip")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_images"], result["num_skipped"]) == (10, 1)
    assert result["skipped"][0]["id"] == "0003-bad.jpg"
    found: Features = read_features(tmp_path / "out" / "images", "image_id")
    assert found.ids == [path.name for path in sorted(pictures.glob("*.png"))]


def test_a_cluster_that_does_not_answer_is_told(data: Path, tmp_path: Path) -> None:
    done = features(data, *on_ray(tmp_path / "out", "--ray-address=auto"))
    assert done.returncode == 1
    assert "--ray-address auto: no Ray cluster answers" in done.stderr
    assert "Traceback" not in done.stderr
