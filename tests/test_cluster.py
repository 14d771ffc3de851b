"""After any kill, of whichever process, the same command makes what it makes without one: `make test-cluster`."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cluster
import numpy as np
import postgres_server
import pytest
from cluster import Chaos, Command, Contents, Machines, Milvus, away, client, restarted, run
from object_store import CREDENTIALS, ObjectStore, object_store
from PIL import Image

from cn_clip.demo import emoji
from cn_clip.features.files import Features, read_features
from cn_clip.retrieval.schemes import address_of

pytestmark = pytest.mark.cluster

NUM = 60
# One picture a batch: the last bits of a row depend on what is computed beside it.
ALONE = ("--batch-size", 1, "--commit-every", 5, "--num-threads", 1, "--num-workers", 1)
WHERES = (None, "width>=64", "path~7")
QUERIES = np.random.default_rng(7).normal(size=(3, 256)).astype(np.float32)
QUERIES /= np.linalg.norm(QUERIES, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pictures: `now` as it is first, `then` with some gone, changed and new; `more` beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("first", "second", "more"):
        (folder / name).mkdir()
    for number, one in enumerate(emoji.load()[: NUM + 10]):
        for name, chosen in (("first", number < NUM), ("second", number >= 10), ("more", number < 10)):
            if chosen:
                (folder / name / f"{number:02d}.png").write_bytes(emoji.png(one))
    for number in range(20, 25):
        Image.open(folder / "second" / f"{number:02d}.png").rotate(90).save(folder / "second" / f"{number:02d}.png")
    return folder


class Steps:
    """What is done to an index, step by step, and the folder that no kill ever met, as it is after each."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self._folder, self._now = folder, folder / "now"
        self._pictures, self.after = pictures, list[Contents]()
        for number, step in enumerate(self.commands):
            self.prepare(number)
            run(*step(folder / "index"))
            self.after.append(Contents.read(folder / "index", QUERIES, WHERES))

    def prepare(self, number: int) -> None:
        """The pictures as they are before a step."""
        if number in (0, 1):
            shutil.rmtree(self._now, ignore_errors=True)
            shutil.copytree(self._pictures / ("first", "second")[number], self._now)

    @property
    def commands(self) -> list[Callable[[object], list[object]]]:
        return [
            lambda at: ["index", "build", self._now, "--output", at, "--model", "Emoji-Tiny", *ALONE],
            lambda at: ["index", "build", self._now, "--output", at, *ALONE],
            lambda at: ["index", "add", at, self._pictures / "more", "--id-prefix", "more/", *ALONE],
            lambda at: ["index", "remove", at, *(f"{number}.png" for number in range(30, 40))],
        ]

    def whole(self, at: str) -> list[float]:
        """All steps on a store without a kill: the seconds of each."""
        seconds = []
        for number, step in enumerate(self.commands):
            self.prepare(number)
            seconds.append(run(*step(at)).seconds)
            told = Contents.read(address_of(at), QUERIES, WHERES).differences(self.after[number])
            assert not told, f"step {number}: {told}"
        return seconds

    def killed(
        self, at: str, victim: str, kill: Callable[[Any], bool], chaos: Chaos, *, within: Sequence[float]
    ) -> None:
        """All steps, each with a kill of `victim`; the index is as the folder after each."""
        for number, step in enumerate(self.commands):
            self.prepare(number)
            chaos.kill(victim, kill, step(at), within=within[number])
            told = Contents.read(address_of(at), QUERIES, WHERES).differences(self.after[number])
            assert not told, f"{chaos}\nstep {number}: {told}"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Steps:
    return Steps(tmp_path_factory.mktemp("steps"), pictures)


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Milvus]:
    with cluster.milvus_that_comes_back(tmp_path_factory.mktemp("milvus")) as one:
        yield one


@pytest.fixture
def told(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Chaos]:
    """Prints the kills at the end, whatever pytest captures."""
    chaos = Chaos(request.node.name)
    yield chaos
    with capsys.disabled():
        print(f"\n{chaos}")


@pytest.fixture(scope="module")
def on_milvus(milvus: Milvus, steps: Steps) -> list[float]:
    """The seconds of each step on that server."""
    return steps.whole(f"{milvus.address}/whole?timeout=60")


@pytest.mark.parametrize("round_", range(3))
def test_a_killed_client_of_milvus(
    milvus: Milvus, steps: Steps, on_milvus: list[float], told: Chaos, round_: int
) -> None:
    steps.killed(f"{milvus.address}/client_{round_}?timeout=60", "client", client, told, within=on_milvus)


@pytest.mark.parametrize("round_", range(2))
def test_a_killed_milvus_comes_back_with_all_it_had(
    milvus: Milvus, steps: Steps, on_milvus: list[float], told: Chaos, round_: int
) -> None:
    steps.killed(f"{milvus.address}/server_{round_}?timeout=60", "Milvus server", milvus.kill, told, within=on_milvus)


@pytest.mark.parametrize("round_", range(2))
def test_a_killed_client_of_milvus_lite_which_is_in_its_process(
    steps: Steps, told: Chaos, tmp_path: Path, round_: int
) -> None:
    within = steps.whole(str(tmp_path / "whole.db"))
    steps.killed(str(tmp_path / "killed.db"), "client", client, told, within=within)


# --- Postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[postgres_server.Server]:
    """A server of its own, since it is killed."""
    with postgres_server.own() as server, server.login():
        yield server


@pytest.fixture(scope="module")
def on_postgres(postgres: postgres_server.Server, steps: Steps) -> list[float]:
    """The seconds of each step on that server."""
    return steps.whole(f"{postgres.address('whole')}?timeout=60")


@pytest.mark.parametrize("round_", range(2))
def test_a_killed_client_of_postgres(
    postgres: postgres_server.Server, steps: Steps, on_postgres: list[float], told: Chaos, round_: int
) -> None:
    at = f"{postgres.address(f'client_{round_}')}?timeout=60"
    steps.killed(at, "client", client, told, within=on_postgres)


@pytest.mark.parametrize("round_", range(2))
def test_a_killed_postgres_comes_back_with_all_it_had(
    postgres: postgres_server.Server, steps: Steps, on_postgres: list[float], told: Chaos, round_: int
) -> None:
    def kill(process: Any) -> bool:
        postgres.kill()
        postgres.start()
        return True

    at = f"{postgres.address(f'server_{round_}')}?timeout=60"
    steps.killed(at, "Postgres", kill, told, within=on_postgres)


# --- Ray and an object store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[ObjectStore]:
    """A store with the pictures; the environment has what opens it."""
    with object_store(tmp_path_factory.mktemp("store")) as one, pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for path in sorted((pictures / "first").iterdir()):
            one.put(f"pictures/{path.name}", path.read_bytes())
        yield one


@pytest.fixture(scope="module", params=[(1, 1), (2, 0)], ids=["two machines", "three machines, a head without CPUs"])
def machines(request: pytest.FixtureRequest, store: ObjectStore) -> Iterator[Machines]:
    nodes, head_cpus = request.param
    with cluster.machines(nodes, head_cpus=head_cpus) as one:
        yield one


def features(machines: Machines, store: ObjectStore, output: str) -> Command:
    """A shard of three pictures; the last bits of a row depend on what is computed beside it."""
    where = ["--ray-address", machines.address, "--image-data", store.uri("pictures"), "--output", store.uri(output)]
    actors = ["--num-actors", 2, "--cpus-per-actor", 1, "--shard-size", 3, "--resume", "Emoji-Tiny", "--device", "cpu"]
    return ["features", "--engine", "ray", "--extract-image-feats", *where, *actors]


def rows(store: ObjectStore, output: str, folder: Path) -> Features:
    """What a run has written; nothing else is there but the manifest."""
    folder.mkdir()
    for name in store.names(f"{output}/images/"):
        shutil.copyfile(store.path(name), folder / name.rpartition("/")[2])
    assert {path.suffix for path in folder.iterdir()} == {".json", ".parquet"}
    return read_features(folder, "image_id")


def test_killed_features_on_a_cluster(machines: Machines, store: ObjectStore, told: Chaos, tmp_path: Path) -> None:
    name = f"whole-{machines.address.rpartition(':')[2]}"
    whole = run(*features(machines, store, name))
    expected = rows(store, name, tmp_path / "whole")
    assert len(expected.ids) == NUM
    kills: dict[str, Callable[[Any], bool]] = {
        "driver": client,
        "store, away": lambda process: away(store, process),
        "worker": lambda process: machines.kill_worker(process, told),
        "machine": lambda process: machines.kill_machine(process, told),
        "store": lambda process: restarted(store, process),
    }
    for number, victim in enumerate([*kills, "worker", "machine"]):
        outputs = (f"{name}-{number}-{draw}" for draw in range(cluster.DRAWS))
        last = told.kill(
            victim,
            kills[victim],
            lambda outputs=outputs: features(machines, store, next(outputs)),  # type: ignore[misc]
            within=whole.seconds,
            mend=store.start if victim == "store, away" else lambda: None,
        )
        output = next(one for one in last if str(one).startswith(f"s3://bucket/{name}-"))
        found = rows(store, str(output).partition("?")[0].removeprefix("s3://bucket/"), tmp_path / str(number))
        assert found.ids == expected.ids, told
        assert np.array_equal(found.vectors, expected.vectors), told


@pytest.fixture(scope="module")
def shards(machines: Machines, store: ObjectStore) -> str:
    """The URI of feature shards."""
    name = f"shards-{machines.address.rpartition(':')[2]}"
    run(*features(machines, store, name))
    return store.uri(f"{name}/images")


@pytest.mark.parametrize("kind", ["folder", "milvus"])
def test_killed_indexes_from_shards_in_a_store(
    shards: str, store: ObjectStore, milvus: Milvus, told: Chaos, tmp_path: Path, kind: str
) -> None:
    numbers = itertools.count()
    unique = shards.partition("?")[0].removesuffix("/images").rpartition("-")[2]

    def build() -> Command:
        name = f"shards_{unique}_{next(numbers)}"
        place = tmp_path / name if kind == "folder" else f"{milvus.address}/{name}?timeout=60"
        return ["index", "build", shards, "--output", place, "--model", "Emoji-Tiny"]

    run("index", "build", shards, "--output", tmp_path / "whole", "--model", "Emoji-Tiny")
    expected = Contents.read(tmp_path / "whole", QUERIES, (None,))
    seconds = run(*build()).seconds
    victims = {"client": client, "store": lambda process: restarted(store, process)}
    for victim in (*victims, *victims):
        last = told.kill(victim, victims[victim], build, within=seconds)
        found = Contents.read(address_of(str(last[4])), QUERIES, (None,))
        assert not found.differences(expected), told
