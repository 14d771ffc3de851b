"""Processes of a Ray cluster that work off tasks, one at a time each; `features` uses it.

Actors and `ray.wait` are enough: a process that dies is noticed, and another one does its task again.
"""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from cn_clip.command import Speaker
from cn_clip.errors import CnClipError, ConfigError
from cn_clip.language import both

TaskT = TypeVar("TaskT")

# How often a task may end its process, or a process fail to start, before the run stops.
ATTEMPTS = 3
CORES_A_GROUP = 8


# --- who computes


class Node(NamedTuple):
    """A machine of the cluster."""

    cpus: int
    gpus: int


class Actors(NamedTuple):
    """How many processes, what each has, and how many there is room for now."""

    number: int
    cpus: int
    gpus: float
    room: int


def plan_actors(
    nodes: Sequence[Node],
    *,
    num_actors: int | None = None,
    cpus_per_actor: int | None = None,
    gpus_per_actor: float | None = None,
    device: str = "auto",
) -> Actors:
    """One process a GPU, its cores shared between them; without GPUs one for each group of cores.

    Raises ConfigError for a device that the cluster has not, or when no machine has room for one process.
    """
    has_gpus = any(node.gpus for node in nodes)
    if device.startswith("cuda:"):
        raise ConfigError(f"--device {device}: Ray chooses the GPU of each process; use --device cuda")
    if device == "cuda" and not has_gpus:
        raise ConfigError("--device cuda: the Ray cluster has no GPU; use --device cpu")
    gpus = gpus_per_actor if gpus_per_actor is not None else float(has_gpus and device in ("auto", "cuda"))
    largest = max((node.cpus for node in nodes), default=0)
    cpus = cpus_per_actor or max(1, min(_share(nodes, num_actors, gpus), largest))
    room = sum(min(node.cpus // cpus, int(node.gpus / gpus) if gpus else node.cpus) for node in nodes)
    if not room:
        sizes = ", ".join(f"{node.cpus} CPUs and {node.gpus} GPUs" for node in nodes)
        raise ConfigError(f"no machine of the Ray cluster has room for {cpus} CPUs and {gpus:g} GPUs; it has: {sizes}")
    return Actors(num_actors or room, cpus, gpus, room)


def _share(nodes: Sequence[Node], num_actors: int | None, gpus: float) -> int:
    """The cores of one process."""
    if num_actors:
        return sum(node.cpus for node in nodes) // num_actors
    if gpus:
        return min((int(node.cpus // (node.gpus / gpus)) for node in nodes if node.gpus >= gpus), default=1)
    return CORES_A_GROUP


# --- the cluster


@contextlib.contextmanager
def cluster(ray: Any, address: str | None) -> Iterator[list[Node]]:
    """The machines of a running cluster, or this one; raises ConfigError when the cluster does not answer."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster answers ({reason}); start one with ray start"
        ) from error
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [Node(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in resources]
    finally:
        ray.shutdown()


class Pool(Generic[TaskT]):
    """So many processes, and what they are asked.

    hire: starts an actor, which has a method `ready`. send: gives it a task, and returns Ray's promise of the result,
    which is a CnClipError if another attempt would meet it again. named: a task in a message.
    """

    def __init__(
        self,
        ray: Any,
        hire: Callable[[], Any],
        send: Callable[[Any, TaskT], Any],
        named: Callable[[TaskT], str],
        count: int,
    ) -> None:
        self._ray, self._hire, self._send, self._named, self._count = ray, hire, send, named, count
        self._attempts: Counter[str] = Counter()

    def results(self, tasks: deque[TaskT], say: Speaker) -> Iterator[tuple[TaskT, Any]]:
        """The tasks with their results, in the order in which they end.

        A process gets a task when it answers, so none waits for one that has no room.
        Raises CnClipError for a task that ended its process time and again, and the one that a process returned.
        """
        ray = self._ray
        waiting: dict[Any, tuple[Any, TaskT | None]] = {}

        def start() -> None:
            worker = self._hire()
            waiting[worker.ready.remote()] = worker, None

        for _ in range(self._count):
            start()
        while tasks or any(task is not None for _, task in waiting.values()):
            (answered,), _ = ray.wait(list(waiting), num_returns=1)
            worker, task = waiting.pop(answered)
            try:
                result = ray.get(answered)
            except ray.exceptions.RayActorError as error:
                self._died(task, error, say)
                if task is not None:
                    tasks.appendleft(task)
                start()
                continue
            if isinstance(result, CnClipError):
                raise result
            if task is not None:
                yield task, result
            if tasks:
                task = tasks.popleft()
                waiting[self._send(worker, task)] = worker, task

    def _died(self, task: TaskT | None, error: Exception, say: Speaker) -> None:
        """Counts a process that died; raises CnClipError when it was the last attempt."""
        what = "a process, before it had a shard" if task is None else self._named(task)
        self._attempts[what] += 1
        reason = " ".join(str(error).split())[:300]
        if self._attempts[what] >= ATTEMPTS:
            raise CnClipError(
                f"{what}: its process died {ATTEMPTS} times; is there memory enough, and cn_clip on every machine? "
                f"The finished shards stay. {reason}"
            ) from error
        say.note(both(f"{what}: 计算它的进程死了，重做", f"{what}: its process died; doing it again"))
