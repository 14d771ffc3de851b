"""`--engine ray` on clusters of several nodes: they join and leave, ask for a token, lack the weights, lose shards."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import REPOSITORY

from cn_clip.clip.encoder import Encoder
from cn_clip.demo import emoji
from cn_clip.features.files import read_features

pytestmark = pytest.mark.ray

NUM = 200
TOKEN = "0123456789abcdef0123456789abcdef0123456789abcdef"
PATIENCE_S = 300.0  # on a busy machine a node takes a minute to start


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for one in emoji.load()[:NUM]:
        (folder / f"{one.number:04d}.png").write_bytes(emoji.png(one))
    return folder


@pytest.fixture(scope="module")
def expected(pictures: Path) -> np.ndarray:
    return Encoder("Emoji-Tiny", device="cpu").encode_images(sorted(pictures.iterdir()))


class Node:
    """A node of a cluster, with all its processes in one session, so that all of them can be ended."""

    def __init__(self, folder: Path, *flags: str, wrapper: tuple[str, ...] = (), **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-agent-listen-port=0"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*wrapper, *command, *flags],
                env={**environment_of(), **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self) -> None:
        """Kills it: no process has time for anything."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:
                kill(int(path.parent.name))
        self.process.wait()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes = folder, list[Node]()
        self.port = free_port()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def head(self, num_cpus: int, **environment: str) -> Node:
        flags = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        flags += [f"--ray-client-server-port={free_port()}"]
        node = self._node(num_cpus, *flags, f"--temp-dir={self.folder}", **environment)
        waited_for(lambda: self._is_listening(node))
        return node

    def _is_listening(self, head: Node) -> bool:
        assert head.process.poll() is None, head.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def join(self, num_cpus: int = 1, *, wrapper: tuple[str, ...] = (), **environment: str) -> Node:
        return self._node(num_cpus, f"--address={self.address}", wrapper=wrapper, **environment)

    def _node(self, num_cpus: int, *flags: str, wrapper: tuple[str, ...] = (), **environment: str) -> Node:
        where = self.folder.with_name(f"{self.folder.name}-node{len(self.nodes)}")
        self.nodes.append(Node(where, f"--num-cpus={num_cpus}", *flags, wrapper=wrapper, **environment))
        return self.nodes[-1]

    def end(self) -> None:
        for node in reversed(self.nodes):
            node.end()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # names of sockets are short
        made = Cluster(Path(folder, "t"))
        yield made
        made.end()


def environment_of() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CN_CLIP_LANG": "en"}


def start(pictures: Path, output: Path, *flags: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cn_clip", "features", "--extract-image-feats", f"--image-data={pictures}"]
    command += ["--device=cpu", "--engine=ray", f"--output={output}", "--shard-size=5", "--cpus-per-actor=1", "--json"]
    model = [] if any(one.startswith("--resume") for one in flags) else ["--resume=Emoji-Tiny"]
    return subprocess.Popen(
        [*command, *model, *flags],
        env={**environment_of(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def waited_for(is_so: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE_S
    while not (found := is_so()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def num_parts(output: Path) -> int:
    return len(list((output / "images").glob("part-*.parquet")))


def assert_complete(output: Path, pictures: Path, expected: np.ndarray) -> None:
    found = read_features(output / "images", "image_id")
    assert found.ids == [path.name for path in sorted(pictures.iterdir())]
    np.testing.assert_allclose(found.vectors, expected, atol=1e-6)


def test_a_head_without_cpus_waits_for_nodes_which_may_leave(
    cluster: Cluster, pictures: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    cluster.head(0)
    process = start(pictures, tmp_path / "out", f"--ray-address={cluster.address}", "--shard-size=1")
    assert process.stderr is not None
    assert "no machine of the cluster has room for a process yet" in process.stderr.readline()
    first = cluster.join()
    waited_for(lambda: num_parts(tmp_path / "out") >= 3)
    cluster.join()
    waited_for(lambda: num_parts(tmp_path / "out") >= 20)
    first.end()
    done = ended(process)
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "out", pictures, expected)
    (line,) = done.stdout.splitlines()
    actors = json.loads(line)["actors"]
    assert len(actors) >= 2  # one on each node
    assert sum(one["rows"] for one in actors) == NUM


def test_a_cluster_with_a_token_takes_it_alone_and_nobody_prints_it(
    cluster: Cluster, pictures: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    cluster.head(1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    to = [f"--ray-address={cluster.address}"]
    done = ended(start(pictures, tmp_path / "out", *to, RAY_AUTH_TOKEN=TOKEN))
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "out", pictures, expected)
    (tmp_path / "token").write_text(TOKEN)
    done = ended(start(pictures, tmp_path / "out", *to, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")))
    assert done.returncode == 0, done.stderr
    wrong = ended(start(pictures, tmp_path / "out2", *to, RAY_AUTH_TOKEN=TOKEN[::-1]))
    none = ended(start(pictures, tmp_path / "out2", *to, HOME=str(tmp_path)))
    for failed, told in ((wrong, "refuses the token that is set here"), (none, "asks for a token, and none is set")):
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"error: --ray-address {cluster.address}: the Ray cluster {told}")
        assert failed.stderr.count("\n") == 1
    assert TOKEN not in done.stdout + done.stderr + wrong.stdout + wrong.stderr
    assert TOKEN[::-1] not in wrong.stdout + wrong.stderr


def test_a_cluster_of_another_version_is_told(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    (older / "sitecustomize.py").write_text(
        "import sys\nimport ray._private.utils as utils\nimport ray\nray.__version__ = '2.40.0'\n"
    )
    cluster.head(1, PYTHONPATH=f"{older}:{REPOSITORY}")
    done = ended(start(pictures, tmp_path / "out", f"--ray-address={cluster.address}"))
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: --ray-address \S+: the Ray cluster runs Ray 2\.40\.0 and Python \S+, this process Ray \S+ and Python "
        r"\S+; both must be the same: install ray==2\.40\.0 here, in Python \S+\n",
        done.stderr,
    )


def test_addresses_that_do_not_answer_or_are_of_the_client_server_are_refused(pictures: Path, tmp_path: Path) -> None:
    port = free_port()
    done = ended(start(pictures, tmp_path / "out", RAY_ADDRESS=f"127.0.0.1:{port}"))
    assert done.stderr == (
        f"error: --ray-address 127.0.0.1:{port}: no Ray cluster answers (Connection refused); start one with ray "
        "start\n"
    )
    done = ended(start(pictures, tmp_path / "out", "--ray-address=ray://127.0.0.1:10001"))
    assert "is the address of Ray's client server" in done.stderr


def test_shards_that_fail_are_named_and_made_by_the_next_run(
    cluster: Cluster, pictures: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    mine = tmp_path / "pictures"
    mine.mkdir()
    for path in pictures.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    bad, whole = mine / "0007.png", (mine / "0007.png").read_bytes()
    bad.write_bytes(whole[:40] + bytes(len(whole) - 40))
    facts = bad.stat()
    cluster.head(1)
    cluster.join()
    flags = [f"--ray-address={cluster.address}", "--max-failed-shards=1"]
    done = ended(start(mine, tmp_path / "out", *flags))
    assert done.returncode == 1
    assert "1 shard failed" in done.stderr
    (failed,) = json.loads(done.stdout)["failed_shards"]
    assert "0007.png" in failed["reason"]
    assert num_parts(tmp_path / "out") == NUM // 5 - 1
    bad.write_bytes(whole)
    os.utime(bad, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the same data, by size and time
    done = ended(start(mine, tmp_path / "out", *flags))
    assert done.returncode == 0, done.stderr
    assert sum(one["shards"] for one in json.loads(done.stdout)["actors"]) == 1
    assert_complete(tmp_path / "out", mine, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_its_shards_kept(
    cluster: Cluster, pictures: Path, expected: np.ndarray, tmp_path: Path, number: signal.Signals
) -> None:
    cluster.head(1)
    flags = [f"--ray-address={cluster.address}", "--shard-size=1"]
    process = start(pictures, tmp_path / "out", *flags)
    waited_for(lambda: num_parts(tmp_path / "out") >= 3)
    process.send_signal(number)
    done = ended(process)
    assert done.returncode == 128 + number
    assert re.fullmatch(r"interrupted; \d+ finished shards stay\. Run the same command again to go on\n", done.stderr)
    assert 3 <= num_parts(tmp_path / "out") < NUM
    done = ended(start(pictures, tmp_path / "out", *flags))
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "out", pictures, expected)


def test_weights_reach_a_node_that_does_not_see_them(
    cluster: Cluster, pictures: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """The node has a mount of its own over the folder, as a machine without the disk."""
    folder, elsewhere, home = tmp_path / "weights", tmp_path / "bucket", tmp_path / "home"
    for one in (folder, elsewhere, home):
        one.mkdir()
    path = Encoder("Emoji-Tiny", device="cpu").save(folder / "mine.pt")
    (elsewhere / "mine.pt").write_bytes(path.read_bytes())
    hidden = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh")
    cluster.head(0)
    cluster.join(wrapper=hidden, HOME=str(home))
    flags = [f"--resume={path}", f"--ray-address={cluster.address}"]
    refused = ended(start(pictures, tmp_path / "out", *flags, "--weights-from=shared"))
    assert refused.returncode == 1
    assert str(path) in refused.stderr
    done = ended(start(pictures, tmp_path / "out", *flags))
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "out", pictures, expected)
    (copy,) = (home / ".cache/clip/ray-weights").glob("*/mine.pt")
    assert copy.read_bytes() == path.read_bytes()
    copy.write_bytes(b"damaged")
    done = ended(start(pictures, tmp_path / "out2", *flags, f"--weights-from={elsewhere}"))
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == path.read_bytes()
    assert_complete(tmp_path / "out2", pictures, expected)


def test_shards_say_how_they_were_made_and_prometheus_reads_it(
    cluster: Cluster, pictures: Path, tmp_path: Path
) -> None:
    from pyarrow import parquet

    port = free_port()
    cluster.head(0)
    cluster._node(1, f"--address={cluster.address}", f"--metrics-export-port={port}")
    done = ended(start(pictures, tmp_path / "out", f"--ray-address={cluster.address}", "--shard-size=100"))
    assert done.returncode == 0, done.stderr
    metadata = parquet.read_metadata(tmp_path / "out" / "images" / "part-00000.parquet").metadata
    stats = next(json.loads(value)["stats"] for value in metadata.values() if b'"stats"' in value)
    assert (stats["rows"], stats["host"], stats["batch"]) == (100, socket.gethostname(), 64)
    assert stats["versions"].keys() >= {"cn_clip", "python", "torch", "ray"}
    assert stats["rows_a_second"] > 0

    def scraped() -> str | None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = str(answer.read().decode())
        return text if "cn_clip_rows" in text else None

    values = {name: float(value) for name, value in re.findall(r"^(\w+)\{.*\} (\S+)$", waited_for(scraped), re.M)}
    assert next(value for name, value in values.items() if re.fullmatch(r"(ray_)?cn_clip_rows(_total)?", name)) == NUM
