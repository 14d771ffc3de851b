"""Commands, servers and machines that are killed at random moments: the harness of `make test-cluster`.

A `Chaos` starts commands, kills what it is told to, notes each kill with its moment, and runs the command again until
it ends well; `Contents` are what two indexes must have alike. The same seed draws the same moments:
CLUSTER_SEED=7 pytest -m cluster.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import milvus_server
import numpy as np
import warm_python
from dataset_files import REPOSITORY
from object_store import CREDENTIALS, ObjectStore

from cn_clip.errors import StoreError
from cn_clip.retrieval.addresses import open_index, open_writer
from cn_clip.retrieval.milvus_address import Address, parse_address
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.schemes import IndexAddress
from cn_clip.retrieval.segments import ItemId

SEED = int(os.environ.get("CLUSTER_SEED", "0"))
PATIENCE_S = 180.0
# How often a moment is drawn again, each time from half the time, when the command had ended before it.
DRAWS = 6
# How often a command may say that its server is away before it ends well.
RUNS = 6
Command = Sequence[object]


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str
    seconds: float


class Kill(NamedTuple):
    """What was killed, so many seconds after the start of what; how the command ended, and how often it ran after."""

    victim: str
    command: str
    moment_s: float
    status: int
    runs: int

    def __str__(self) -> str:
        ended = "died" if self.status < 0 else f"ended with {self.status}"
        return f"{self.victim:14} {self.moment_s:6.2f} s  {self.command}: {ended}, ran {self.runs} times more"


class Chaos:
    """Kills of one campaign; all numbers that it draws come from its seed."""

    def __init__(self, name: str) -> None:
        self.name, self.kills = name, list[Kill]()
        self._random = random.Random(f"{SEED} {name}")

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.name}: {len(self.kills)} kills, CLUSTER_SEED={SEED}", *(f"  {one}" for one in self.kills)]
        )

    def chosen(self, some: Sequence[Any]) -> Any:
        """One of them."""
        return self._random.choice(some)

    def kill(
        self,
        victim: str,
        kill: Callable[["subprocess.Popen[str]"], bool],
        command: Command | Callable[[], Command],
        *,
        within: float,
        mend: Callable[[], object] = lambda: None,
    ) -> Command:
        """Starts a command, kills `victim` while it runs, and runs it again until it ends well; returns the command.

        kill: ends the victim, and says whether there was one. command: a function makes another one, where it would
        begin anew, each time that one ended before the kill. within: seconds from which the moment is drawn.
        mend: brings back what was killed, once the command has ended.
        Prints all kills so far, and the seed, when an assertion fails.
        """
        for _ in range(DRAWS):
            chosen = command() if callable(command) else command
            process, began = start(chosen), time.monotonic()
            time.sleep(self._random.uniform(within / 10, within))
            moment = time.monotonic() - began
            is_hit = process.poll() is None and kill(process)
            done = ended(process, began)
            if is_hit:
                break
            assert self._is_done(done), f"{self}\n{done}"
            within /= 2
        else:
            raise AssertionError(f"{self}\n{victim}: {chosen} always ended before")
        runs, first = 0, done.status
        self._judge(done, is_victim=victim in ("client", "driver"))
        mend()
        while not self._is_done(done) and runs < RUNS:
            done, runs = ended(start(chosen)), runs + 1
            self._judge(done)
        self.kills.append(Kill(victim, self._key(chosen), moment, first, runs))
        assert self._is_done(done), f"{self}\n{done}"
        return chosen

    def _judge(self, done: Ended, *, is_victim: bool = False) -> None:
        """Whether a command ended well, or by the kill, or with one sentence."""
        is_fine = done.status == 0 or (is_victim and done.status < 0)
        is_told = done.status == 1 and done.err.splitlines()[-1].startswith("error: ")
        assert is_fine or is_told, f"{self}\n{done}"
        for secret in (CREDENTIALS["AWS_SECRET_ACCESS_KEY"], "Traceback"):
            assert secret not in done.err + done.out, f"{self}\n{done}"

    @staticmethod
    def _is_done(done: Ended) -> bool:
        """What was removed before the kill is not there to be removed again; that is said, as of any index."""
        return done.status == 0 or (done.status == 1 and "nothing was removed" in done.err)

    @staticmethod
    def _key(command: Command) -> str:
        return " ".join(str(one) for one in command[:2])


def start(command: Command) -> "subprocess.Popen[str]":
    """cn-clip, with one thread, in English."""
    return subprocess.Popen(
        [warm_python.program(), "-m", "cn_clip", *map(str, command)],
        env={**os.environ, **CREDENTIALS, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CN_CLIP_LANG": "en"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]", began: float | None = None) -> Ended:
    """Waits for its end; raises AssertionError after a while."""
    began = time.monotonic() if began is None else began
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise AssertionError(f"no end within {PATIENCE_S:g} s: {process.args}") from error
    return Ended(process.returncode, out, err, time.monotonic() - began)


def run(*command: object) -> Ended:
    """A command that must end well."""
    done = ended(start(command))
    assert done.status == 0, done
    return done


def client(process: "subprocess.Popen[str]") -> bool:
    """Kills the command itself."""
    process.kill()
    return True


def away(store: ObjectStore, process: "subprocess.Popen[str]") -> bool:
    """Kills a store; whoever calls `Chaos.kill` starts it again."""
    store.kill()
    return True


def restarted(store: ObjectStore, process: "subprocess.Popen[str]") -> bool:
    """Kills a store, which comes back at once."""
    store.kill()
    store.start()
    return True


# --- two indexes


class Contents(NamedTuple):
    """All that an index says: the items in their order, and the answers to some searches."""

    ids: list[ItemId]
    metadata: dict[ItemId, Any]
    vectors: dict[ItemId, bytes]
    thumbnails: dict[ItemId, bytes]
    answers: list[list[list[tuple[ItemId, float]]]]

    @classmethod
    def read(cls, address: IndexAddress, queries_QD: Any, wheres: Sequence[str | None]) -> "Contents":
        """What is at an address now."""
        index = open_index(address)
        items = dict(index.items())
        with open_writer(address) as writer:
            stored = writer.stored(items)
        answers = [
            [[(hit.id, hit.score) for hit in hits] for hits in index.search(queries_QD, k, where=where)]
            for where in wheres
            for k in (7, 1000)
        ]
        if isinstance(address, Address) and address.lite is not None:
            milvus_server.release(address)
        vectors = {one: np.float32(item.vector_D).tobytes() for one, item in stored.items()}
        return cls([*items], items, vectors, {one: item.thumbnail for one, item in stored.items()}, answers)

    def differences(self, expected: "Contents") -> list[str]:
        """In what it differs from another: ids and their order, metadata, vectors (bits), thumbnails, answers."""
        return [
            f"{name}: {found!r:.2000} instead of {wanted!r:.2000}"
            for name, found, wanted in zip(self._fields, self, expected, strict=True)
            if found != wanted
        ]


# --- a cluster of Ray


class Machines:
    """A Ray cluster on this machine: a head, and nodes of one processor each."""

    MEMORY = 100_000_000

    def __init__(self, nodes: int, *, head_cpus: int) -> None:
        # Ray reads these when it is imported; a busy machine takes its time.
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        settings = {"num_cpus": head_cpus, "object_store_memory": self.MEMORY, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=settings)
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """A node more."""
        self._cluster.add_node(num_cpus=1, object_store_memory=self.MEMORY)

    def raylets(self) -> list[int]:
        """The processes of the nodes but the head that have one."""
        nodes = [node for node in self._cluster.list_all_nodes() if node is not self._cluster.head_node]
        return [node.all_processes["raylet"][0].process.pid for node in nodes if "raylet" in node.all_processes]

    def workers(self) -> list[int]:
        """The processes that compute shards, on whichever node."""
        return [pid for pid, title in _titles() if title.startswith("ray::ShardWorker")]

    def kill_worker(self, process: "subprocess.Popen[str]", chaos: Chaos) -> bool:
        """SIGKILL to one of them, if there is one by now or soon."""
        while not (found := self.workers()):
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        time.sleep(chaos.chosen([0, 0.1, 0.3]))
        return _kill(chaos.chosen(found))

    def kill_machine(self, process: "subprocess.Popen[str]", chaos: Chaos) -> bool:
        """SIGKILL to the raylet of a node; a new node joins, as an autoscaler would see to."""
        while not self.workers():
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        node = chaos.chosen([one for one in self._cluster.list_all_nodes() if one is not self._cluster.head_node])
        is_hit = _kill(node.all_processes["raylet"][0].process.pid)
        self._cluster.remove_node(node, allow_graceful=False)
        self.add()
        return is_hit

    def stop(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def machines(nodes: int, *, head_cpus: int) -> Iterator[Machines]:
    """A cluster while the block runs."""
    one = Machines(nodes, head_cpus=head_cpus)
    try:
        yield one
    finally:
        one.stop()


def _titles() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield int(path.name), (path / "cmdline").read_text(encoding="utf-8")


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# --- a Milvus server that comes back


class Milvus:
    """Its address without a collection, and its process."""

    def __init__(self, port: int, pid_file: Path) -> None:
        self._pid_file, self.address = pid_file, f"milvus://127.0.0.1:{port}"

    def kill(self, process: "subprocess.Popen[str]") -> bool:
        """SIGKILL; the supervisor starts it again, and after about ten seconds it answers."""
        return _kill(int(self._pid_file.read_text(encoding="utf-8")))


@contextlib.contextmanager
def milvus_that_comes_back(folder: Path) -> Iterator[Milvus]:
    """A server while the block runs."""
    pid_file = folder / "milvus.pid"
    with milvus_server.own("--pid-file", str(pid_file), runner=[sys.executable, __file__]) as port:
        one = Milvus(port, pid_file)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(StoreError):
                Collection(parse_address(f"{one.address}/absent?timeout=5")).call("has_collection")
                break
        yield one


def _supervise(data: Path, pid_file: Path) -> None:
    """Runs Milvus, again and again, as a supervisor does; a file tells the process of the moment.

    The package's own launcher asks for free ports at every start. After a kill the old ones linger in TIME_WAIT, so it
    takes others, and clients find nobody: that is why the server seemed not to come back. With the settings of the
    first start it does, after its session in etcd has ended (30 s by default, 3 s here).
    """
    import milvus  # type: ignore[import-not-found, unused-ignore]

    settings = milvus.MilvusServerConfig(data_dir=str(data), proxy_port=19530)
    settings.set("common.session.ttl", "3")
    settings.resolve()
    milvus._initialize_data_files(str(data))
    folders = {"MILVUSCONF": data / "configs", "LD_LIBRARY_PATH": data / "bin", "MILVUS_RUN_DIR": data / "run"}
    environment = {**os.environ, "DEPLOY_MODE": "STANDALONE"} | {name: str(path) for name, path in folders.items()}
    (data / "run").mkdir(exist_ok=True)
    while True:
        with open(data / "log", "ab") as log:
            server = subprocess.Popen(
                [data / "bin" / "milvus", "run", "standalone"], env=environment, stdout=log, stderr=log, cwd=data
            )
        pid_file.write_text(str(server.pid), encoding="utf-8")
        server.wait()


if __name__ == "__main__":
    _supervise(*(Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--data", "--pid-file")))
