"""Processes of a Ray cluster that work off tasks, one at a time each; `features` uses it.

Actors and `ray.wait` are enough: whatever ends a task is noticed, and another process does it again. A user of a pool
gives a `Crew`: which actor is started, how it is asked, and how a task is called in messages.
"""

import contextlib
import math
import os
import re
import secrets
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, Protocol, TypeVar

from cn_clip.command import Speaker
from cn_clip.digests import is_file
from cn_clip.errors import CnClipError, ConfigError, first_sentence
from cn_clip.extras import require
from cn_clip.language import both, counted

TaskT = TypeVar("TaskT")
GivenT = TypeVar("GivenT", contravariant=True)

# How often a task may fail, or a process fail to start, before it is given up.
ATTEMPTS = 3
CORES_A_GROUP = 8
# Between two looks at the machines of the cluster.
LOOK_SECONDS = 2.0
_LONGEST_REASON = 300
_CONNECTING_SECONDS = 10.0
# Where Ray keeps a token that no variable names.
_TOKEN_FILE = Path("~/.ray/auth_token")


# --- who computes


class NoRoomError(ConfigError):
    """No machine of the cluster has room for one process; another one may come."""


class Node(NamedTuple):
    """A machine of the cluster."""

    cpus: int
    gpus: int
    id: str = ""


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
        raise NoRoomError("--device cuda: the Ray cluster has no GPU; use --device cpu")
    gpus = gpus_per_actor if gpus_per_actor is not None else float(has_gpus and device in ("auto", "cuda"))
    largest = max((node.cpus for node in nodes), default=0)
    cpus = cpus_per_actor or max(1, min(_share(nodes, num_actors, gpus), largest))
    room = room_for(nodes, Actors(1, cpus, gpus, 1))
    if not room:
        sizes = ", ".join(f"{node.cpus} CPUs and {node.gpus} GPUs" for node in nodes)
        raise NoRoomError(f"no machine of the Ray cluster has room for {cpus} CPUs and {gpus:g} GPUs; it has: {sizes}")
    return Actors(num_actors or room, cpus, gpus, room)


def room_for(nodes: Sequence[Node], size: Actors) -> int:
    """How many processes of a size the machines hold."""
    cpus, gpus = size.cpus, size.gpus
    return sum(min(node.cpus // cpus, int(node.gpus / gpus) if gpus else node.cpus) for node in nodes)


def _share(nodes: Sequence[Node], num_actors: int | None, gpus: float) -> int:
    """The cores of one process."""
    if num_actors:
        return sum(node.cpus for node in nodes) // num_actors
    if gpus:
        return min((int(node.cpus // (node.gpus / gpus)) for node in nodes if node.gpus >= gpus), default=1)
    return CORES_A_GROUP


# --- the cluster


def require_ray() -> Any:
    """The package, told to send the token that the user has; raises MissingExtraError.

    Ray reads its settings when it is imported, and sends a token only with RAY_AUTH_MODE=token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return require("ray", extra="ray", purpose="--engine ray")


def is_in_ray() -> bool:
    """Whether this process belongs to a Ray cluster; imports nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _has_token() -> bool:
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return any(os.environ.get(name) for name in names) or is_file(_TOKEN_FILE.expanduser())


def address_of(given: str | None) -> str | None:
    """The address of the running cluster that is meant; None: one for this run is."""
    return given or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Inside, this process is the driver of a running cluster, or without an address of one for this run.

    As everywhere in Ray, RAY_ADDRESS stands for an address that is not given; `ray job submit` sets it.
    Raises ConfigError when the cluster does not answer, refuses the token, or is of another version.
    """
    address = address_of(address)
    _check_listening(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with tempfile.TemporaryFile("w+b") as said, _token_of_its_own(when=address is None):
        try:
            with _errors_into(said):
                if address is None:
                    ray.init(address="local", include_dashboard=False, **quiet)
                else:
                    ray.init(address=address, **quiet)
        except Exception as error:
            said.seek(0)
            raise _refusal(address, error, said.read().decode(errors="replace")) from error
        try:
            yield
        finally:
            ray.shutdown()


def _check_listening(address: str | None) -> None:
    """Raises ConfigError when nothing listens at HOST:PORT, which Ray itself would try again for minutes.

    Also for an address of Ray's client server: the driver would run there, and our lists travel twice.
    """
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}: is the address of Ray's client server; run this on a machine of the cluster "
            "with --ray-address auto, or send it there with `ray job submit`"
        )
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECTING_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _refusal(address, error, "") from error


@contextlib.contextmanager
def _token_of_its_own(*, when: bool) -> Iterator[None]:
    """A cluster for one run has a token that only its processes know; Ray would write one into the home folder."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not when or any(name in os.environ for name in names):
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _errors_into(file: IO[bytes]) -> Iterator[None]:
    """What Ray's C++ prints goes to a file, not among our lines: it says several times a second that it tries again."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _refusal(address: str | None, error: Exception, said: str) -> CnClipError:
    """Why there is no cluster, from what Ray raised and printed."""
    where = "--engine ray" if address is None else f"--ray-address {address}"
    words = f"{type(error).__name__} {error} {said}"
    if "InvalidAuthToken" in words or "AuthenticationError" in words:
        if _has_token():
            return ConfigError(
                f"{where}: the Ray cluster refuses the token that is set here; set RAY_AUTH_TOKEN or "
                f"RAY_AUTH_TOKEN_PATH to that of its head ({_TOKEN_FILE} there)"
            )
        return ConfigError(
            f"{where}: the Ray cluster asks for a token, and none is set here; set RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH to that of its head ({_TOKEN_FILE} there)"
        )
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(versions) == 2:
        (theirs, their_python), (ours, our_python) = versions
        return ConfigError(
            f"{where}: the Ray cluster runs Ray {theirs} and Python {their_python}, this process Ray {ours} and Python "
            f"{our_python}; both must be the same: install ray=={theirs} here, in Python {their_python}"
        )
    reason = first_sentence(error)
    return ConfigError(f"{where}: no Ray cluster answers ({reason}); start one with ray start")


# --- the processes


@dataclass(frozen=True)
class Failed(Generic[TaskT]):
    """A task that was given up, and why."""

    task: TaskT
    reason: str


class Worker:
    """The actor of a pool: what every one answers."""

    def ready(self) -> str:
        """The id of its node, once it has started."""
        node: str = require("ray", extra="ray", purpose="--engine ray").get_runtime_context().get_node_id()
        return node


def started(ray: Any, worker: type[Worker], size: Actors, node: str | None) -> Any:
    """The class of an actor of a size; `remote` starts one, on that node if one is named and it is still there."""
    settings: dict[str, Any] = {"num_cpus": size.cpus, "num_gpus": size.gpus, "max_restarts": 0}
    if node is not None:
        strategies = require("ray.util.scheduling_strategies", extra="ray", purpose="--engine ray")
        settings["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(node, soft=True)
    return ray.remote(worker).options(**settings)


class Crew(Protocol[GivenT]):
    """What a pool does not know of its workers and their tasks."""

    def hire(self, size: Actors, node: str | None) -> Any:
        """Starts an actor, a `Worker`, of that size; on that node if one is named."""
        ...

    def send(self, worker: Any, task: GivenT) -> Any:
        """Gives an actor a task; returns Ray's promise of the result.

        The result is a CnClipError if another attempt would meet the error again; any other error is raised there.
        """
        ...

    def named(self, task: GivenT) -> str:
        """A task in a message."""
        ...


@dataclass(eq=False)
class _Member:
    """An actor; node: None until it has answered; task: what it is doing."""

    worker: Any
    node: str | None = None
    task: Any = None


class Pool(Generic[TaskT]):
    """As many processes as the cluster has room for at any time, and tasks for them.

    Machines that join get processes, those of a machine that leaves are forgotten, and a process without a task ends. A
    task that fails by anything but a returned CnClipError is tried ATTEMPTS times, by a new process, on another machine
    if there is one. `failed` holds those that were given up, at most `max_failed` of them.
    """

    def __init__(
        self,
        ray: Any,
        crew: Crew[TaskT],
        plan: Callable[[Sequence[Node]], Actors],
        say: Speaker,
        *,
        num_actors: int | None = None,
        max_failed: int = 0,
        wait_s: float = 0,
    ) -> None:
        """plan: sizes for the machines there; raises NoRoomError. num_actors: keeps that many, room or not.

        wait_s: how long a cluster without room for one process is waited for.
        """
        self._ray, self._crew, self._plan, self._say = ray, crew, plan, say
        self._num_actors, self._max_failed, self._wait_s = num_actors, max_failed, wait_s
        self.failed: list[Failed[TaskT]] = []
        self._members: dict[Any, _Member] = {}
        self._failures: dict[str, list[str | None]] = {}  # by the name of a task, the nodes where it failed
        self._num_not_started = 0
        self._nodes: list[Node] = []
        self._looked_at = -math.inf
        self._without_room_since: float | None = None
        self.size: Actors | None = None

    def results(self, tasks: deque[TaskT]) -> Iterator[tuple[TaskT, Any]]:
        """The tasks with their results, in the order in which they end.

        A process gets a task when it answers, so none waits for one that has no room.
        Raises CnClipError for the failed task that is one too many, and for a cluster without room.
        """
        while tasks or self._num_busy:
            self._staff(tasks)
            if not self._members:
                time.sleep(LOOK_SECONDS)
                continue
            answered, _ = self._ray.wait(list(self._members), num_returns=1, timeout=LOOK_SECONDS)
            for promise in answered:
                member = self._members.pop(promise)
                try:
                    result = self._ray.get(promise)
                except Exception as error:
                    self._lost(member, error, tasks)
                    continue
                task = member.task
                if task is None:
                    member.node, self._num_not_started = result, 0
                elif isinstance(result, CnClipError):
                    self._give_up(task, result, str(result))
                self._occupy(member, tasks)
                if task is not None and not isinstance(result, CnClipError):
                    yield task, result

    @property
    def _num_busy(self) -> int:
        return sum(member.task is not None for member in self._members.values())

    # --- who is there

    def _staff(self, tasks: deque[TaskT]) -> None:
        """Starts and ends processes until they fit the machines and the tasks that are there."""
        now = time.monotonic()
        if self._members and now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        nodes = nodes_of(self._ray)
        if {node.id for node in nodes} - {node.id for node in self._nodes}:
            self._num_not_started = 0
        self._nodes = nodes
        if self.size is None:
            self._settle()
        room = 0 if self.size is None else room_for(nodes, self.size)
        self._await_room(room, now)
        if self.size is None:
            return
        wanted = min(self._num_actors or room, len(tasks) + self._num_busy)
        if self._num_not_started >= ATTEMPTS:  # on some machine none starts; those that did go on
            wanted = min(wanted, len(self._members))
        starting = [promise for promise, member in self._members.items() if member.node is None]
        while starting and len(self._members) > wanted:
            self._end(self._members.pop(starting.pop()))
        while len(self._members) < wanted:
            worker = self._crew.hire(self.size, self._elsewhere(tasks))
            self._members[worker.ready.remote()] = _Member(worker)

    def _settle(self) -> None:
        """Chooses the size of the processes, once there is a machine for one."""
        try:
            self.size = self._plan(self._nodes)
        except NoRoomError:
            if not self._wait_s:
                raise
            return
        number = self._num_actors or self.size.room
        cpus, gpus = self.size.cpus, self.size.gpus
        self._say(
            both(
                f"Ray：{number} 个进程，各 {cpus} 个 CPU、{gpus:g} 块 GPU",
                f"Ray: {counted(number, 'actor')} of {cpus} CPUs and {gpus:g} GPUs",
            )
        )
        if number > self.size.room:
            self._say.note(
                both(
                    f"Ray：现在的资源只够 {self.size.room} 个，其余等待",
                    f"Ray: resources for {self.size.room} now, the others wait",
                )
            )

    def _await_room(self, room: int, now: float) -> None:
        """Says once that there is no machine for a process, asks the autoscaler for one; raises NoRoomError in time."""
        if room or self._num_busy:
            if self._without_room_since is not None and room:
                self._without_room_since = None
                ask_autoscaler(None)
            return
        if self._without_room_since is None:
            self._without_room_since = now
            self._say.note(
                both(
                    f"Ray：集群里还没有放得下一个进程的机器，等待（最多 {self._wait_s:g} 秒）",
                    f"Ray: no machine of the cluster has room for a process yet; waiting, at most {self._wait_s:g} s",
                )
            )
            ask_autoscaler(self.size or Actors(1, 1, 0, 0))
        if now - self._without_room_since >= self._wait_s:
            raise NoRoomError(
                f"no machine with room for a process joined the Ray cluster within {self._wait_s:g} s; start one "
                "with `ray start`, or wait longer with --ray-wait. The finished shards stay"
            )

    def _fits(self, node: Node) -> bool:
        return self.size is not None and room_for([node], self.size) > 0

    def _elsewhere(self, tasks: deque[TaskT]) -> str | None:
        """A machine where the first task has not failed, if it has on another."""
        if not tasks or not (failures := self._failures.get(self._crew.named(tasks[0]))):
            return None
        return next((node.id for node in self._nodes if node.id not in failures and self._fits(node)), None)

    def _occupy(self, member: _Member, tasks: deque[TaskT]) -> None:
        """Gives a process its next task, one that has not failed on its machine; without one, it ends."""
        for number, task in enumerate(tasks):
            failures = self._failures.get(self._crew.named(task), [])
            others = [node for node in self._nodes if node.id not in failures and self._fits(node)]
            if member.node not in failures or not others:
                del tasks[number]
                member.task = task
                self._members[self._crew.send(member.worker, task)] = member
                return
        self._end(member)

    def _end(self, member: _Member) -> None:
        """Ends a process at once; its machine may be gone."""
        with contextlib.suppress(Exception):
            self._ray.kill(member.worker)

    # --- what failed

    def _lost(self, member: _Member, error: Exception, tasks: deque[TaskT]) -> None:
        """After an error of a process: its task is to be done again, unless that was its last attempt."""
        self._end(member)
        self._looked_at = -math.inf  # its machine may be gone
        has_died = isinstance(error, self._ray.exceptions.RayActorError)
        reason = reason_of(error)
        task = member.task
        if task is None:
            self._num_not_started += 1
            if self._num_not_started >= ATTEMPTS and not any(one.node for one in self._members.values()):
                raise CnClipError(
                    f"a process, before it had a shard: its process died {ATTEMPTS} times; is there memory enough, and "
                    f"cn_clip on every machine? The finished shards stay. {reason}"
                ) from error
            return
        what = self._crew.named(task)
        failures = self._failures.setdefault(what, [])
        if not getattr(error, "preempted", False):  # by no fault of the task
            failures.append(member.node)
        if len(failures) >= ATTEMPTS:
            told = CnClipError(f"{what}: failed {ATTEMPTS} times; the finished shards stay. {reason}")
            if has_died:
                told = CnClipError(
                    f"{what}: its process died {ATTEMPTS} times; is there memory enough, and cn_clip on every machine? "
                    f"The finished shards stay. {reason}"
                )
            self._give_up(task, told, reason)
            return
        tasks.appendleft(task)
        if has_died:
            self._say.note(both(f"{what}: 计算它的进程死了，重做", f"{what}: its process died; doing it again"))
        else:
            self._say.note(both(f"{what}: 出错（{reason}），重做", f"{what}: failed ({reason}); doing it again"))

    def _give_up(self, task: TaskT, error: CnClipError, reason: str) -> None:
        """Keeps a task as failed; raises `error` if it is one too many, or every task would meet it."""
        if isinstance(error, ConfigError) or len(self.failed) >= self._max_failed:
            raise error
        self.failed.append(Failed(task, reason))
        what = self._crew.named(task)
        self._say.note(both(f"{what}: 放弃（{reason}）", f"{what}: given up ({reason})"))


def reason_of(error: BaseException) -> str:
    """What ended a task, in one line."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, BaseException):
        return " ".join(str(error).split())[:_LONGEST_REASON]
    if isinstance(cause, CnClipError):
        return str(cause)
    return f"{type(cause).__name__}: {first_sentence(cause)}"


def nodes_of(ray: Any) -> list[Node]:
    """The machines that are there."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(int(one["Resources"].get("CPU", 0)), int(one["Resources"].get("GPU", 0)), one["NodeID"]) for one in alive
    ]


def ask_autoscaler(size: Actors | None) -> None:
    """Asks for a machine for one process, or takes that back; nothing happens where no autoscaler runs."""
    with contextlib.suppress(Exception):
        bundle = {} if size is None else {"CPU": size.cpus, **({"GPU": size.gpus} if size.gpus else {})}
        require("ray.autoscaler.sdk", extra="ray", purpose="--ray-wait").request_resources(
            bundles=[bundle] if bundle else []
        )
