"""Extraction by processes of a Ray cluster: `cn-clip features --engine ray --output FOLDER …`.

The driver lists the inputs, cuts them into shards and hands these to actors, one at a time each; an actor writes its
shard itself. Ray Data is not used: its writers choose file names and rows by themselves, so that what is finished could
not be told, shard by shard, after the driver was killed. Actors and `ray.wait` give just what is needed: a process that
dies is noticed, its shard is done again by another, and no shard has two names.
"""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tqdm import tqdm

from cn_clip.clip.backends.base import Kind
from cn_clip.clip.families.names import absolute, is_foreign
from cn_clip.command import Speaker
from cn_clip.data.bulk_pictures import Collection, open_collection
from cn_clip.data.records import digest_of
from cn_clip.data.storage import open_storage, shown
from cn_clip.data.texts import read_texts
from cn_clip.errors import CnClipError, ConfigError
from cn_clip.extras import require
from cn_clip.features.ray_settings import Settings
from cn_clip.features.rows import IdField
from cn_clip.features.shard_worker import Job, ShardWorker, Task, TextPart, model_facts, weights_digest
from cn_clip.features.shards import PREFIX, Finished, Manifest, Shard, Skipped, begin
from cn_clip.features.tables import require_parquet

# How often a shard may end its process, or a process fail to start, before the run stops.
ATTEMPTS = 3
CORES_A_GROUP = 8
_SHOWN = 20
_FIELDS: dict[Kind, IdField] = {"image": "image_id", "text": "text_id"}
_FOLDERS: dict[Kind, str] = {"image": "images", "text": "texts"}


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


# --- what is computed


class _Inputs(NamedTuple):
    """The inputs of one kind: what tells them from others, how many, and those of a shard."""

    facts: Mapping[str, object]
    number: int
    part: Callable[[Shard], Any]


def _open_inputs(options: Settings) -> dict[Kind, _Inputs]:
    opened: dict[Kind, _Inputs] = {}
    if options.extract_text_feats:
        texts = read_texts(options.text_data)
        facts = {"digest": digest_of(texts), "location": options.text_data}
        opened["text"] = _Inputs(facts, len(texts), lambda shard: TextPart(texts[shard.start : shard.stop]))
    if options.extract_image_feats:
        pictures: Collection = open_collection(options.image_data)
        facts = {"digest": pictures.digest, "location": shown(options.image_data)}
        opened["image"] = _Inputs(facts, len(pictures.ids), lambda shard: pictures.part(shard.start, shard.stop))
    return opened


class _Progress:
    """The shards of one job: those that are there, and those to do."""

    def __init__(self, job: Job, inputs: _Inputs, finished: Mapping[int, Finished]) -> None:
        self.job, self.inputs, self.finished = job, inputs, dict(finished)

    def todo(self) -> list[Shard]:
        return [shard for shard in self.job.manifest.shards() if shard.number not in self.finished]

    @property
    def num_done(self) -> int:
        return sum(one.num_rows + len(one.skipped) for one in self.finished.values())

    @property
    def skipped(self) -> list[Skipped]:
        return [skipped for number in sorted(self.finished) for skipped in self.finished[number].skipped]


def extract(options: Settings, say: Speaker) -> None:
    """Extracts what is asked for into shards, passing over those that are finished.

    Raises CnClipError naming what cannot be read, a folder of another job, a cluster that is not there, or a shard that
    ended its process time and again; MissingExtraError without ray or pyarrow.
    """
    ray = require("ray", extra="ray", purpose="--engine ray")
    require_parquet()
    inputs = _open_inputs(options)
    weights = weights_digest(options)
    with open_storage(options.output or "").alone("another process is extracting into this folder"):
        works = [_begin(options, kind, one, weights, say) for kind, one in inputs.items()]
        tasks = deque((work, shard) for work in works for shard in work.todo())
        if tasks:
            with _cluster(ray, options.ray_address) as nodes:
                _run(ray, options, weights, nodes, tasks, works, say)
        _tell(works, say)


def _begin(options: Settings, kind: Kind, inputs: _Inputs, weights: str, say: Speaker) -> _Progress:
    folder = open_storage(options.output or "").child(_FOLDERS[kind])
    model = model_facts(options, kind, weights)
    manifest = Manifest(_FIELDS[kind], model, inputs.facts, inputs.number, options.shard_size)
    finished = begin(folder, manifest, overwrite=options.overwrite)
    if options.on_error == "stop":  # what an earlier run skipped stops this one
        finished = {number: one for number, one in finished.items() if not one.skipped}
    if finished:
        total = len(manifest.shards())
        say.note(f"{folder.name}: {len(finished)}/{total} 个分片已完成，跳过 / shards are finished, passed over")
    return _Progress(Job(kind, folder, manifest), inputs, finished)


# --- the cluster


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[list[Node]]:
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


def _run(
    ray: Any,
    options: Settings,
    weights: str,
    nodes: Sequence[Node],
    tasks: "deque[tuple[_Progress, Shard]]",
    works: Sequence[_Progress],
    say: Speaker,
) -> None:
    plan = plan_actors(
        nodes,
        num_actors=options.num_actors,
        cpus_per_actor=options.cpus_per_actor,
        gpus_per_actor=options.gpus_per_actor,
        device=options.device,
    )
    count = min(plan.number, len(tasks))
    say(f"Ray: {count} actors of {plan.cpus} CPUs and {plan.gpus:g} GPUs, {len(tasks)} shards to do.")
    if count > plan.room:
        say.note(f"Ray: 现在只有 {plan.room} 个的位置，其余等待 / there is room for {plan.room} now, the others wait")
    actor = ray.remote(ShardWorker).options(num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0)
    settings = _for_workers(options, plan)
    kinds = [work.job.kind for work in works]
    total, done = (
        sum(numbers) for numbers in zip(*((work.inputs.number, work.num_done) for work in works), strict=True)
    )
    with tqdm(total=total, initial=done, unit="row") as bar:
        for work, shard, finished in _finish(ray, lambda: actor.remote(settings, kinds, weights), count, tasks, say):
            work.finished[shard.number] = finished
            bar.update(shard.stop - shard.start)


def _for_workers(options: Settings, plan: Actors) -> Settings:
    """The settings as they hold in the processes, which run in other folders."""
    return replace(
        options,
        resume=_from_the_root(options.resume or ""),
        download_root=options.download_root and os.path.abspath(os.path.expanduser(options.download_root)),
        num_threads=options.num_threads or (None if options.backend == "tensorrt" else plan.cpus),
        device="cpu" if options.device == "auto" and not plan.gpus else options.device,
    )


def _from_the_root(model: str) -> str:
    if is_foreign(model):
        return absolute(model)
    return os.path.abspath(model) if os.path.dirname(model) or os.path.exists(model) else model


def _finish(
    ray: Any, hire: Callable[[], Any], count: int, tasks: "deque[tuple[_Progress, Shard]]", say: Speaker
) -> Iterator[tuple[_Progress, Shard, Finished]]:
    """The shards as they are finished. A process gets one when it answers, so none waits for one that has no room."""
    waiting: dict[Any, tuple[Any, tuple[_Progress, Shard] | None]] = {}
    attempts: Counter[object] = Counter()

    def start() -> None:
        worker = hire()
        waiting[worker.ready.remote()] = worker, None

    for _ in range(count):
        start()
    while tasks or any(task is not None for _, task in waiting.values()):
        (answered,), _ = ray.wait(list(waiting), num_returns=1)
        worker, task = waiting.pop(answered)
        try:
            result = ray.get(answered)
        except ray.exceptions.RayActorError as error:
            _count(attempts, task, error, say)
            if task is not None:
                tasks.appendleft(task)
            start()
            continue
        if isinstance(result, CnClipError):
            raise result
        if task is not None:
            yield *task, result
        if tasks:
            work, shard = task = tasks.popleft()
            waiting[worker.work.remote(Task(work.job, shard, work.inputs.part(shard)))] = worker, task


def _count(attempts: "Counter[object]", task: tuple[_Progress, Shard] | None, error: Exception, say: Speaker) -> None:
    """Counts a process that died; raises CnClipError when it was the last attempt."""
    what = "a process, before it had a shard" if task is None else f"{task[0].job.folder.child(task[1].name).name}"
    attempts[what] += 1
    reason = " ".join(str(error).split())[:300]
    if attempts[what] >= ATTEMPTS:
        inputs = "" if task is None else f" (inputs {task[1].start} to {task[1].stop - 1})"
        raise CnClipError(
            f"{what}{inputs}: its process died {ATTEMPTS} times; is there memory enough, and cn_clip on every machine? "
            f"The finished shards stay. {reason}"
        ) from error
    say.note(f"{what}: 计算它的进程没了，重做 / its process died, done again")


# --- what is told


def _tell(works: Iterable[_Progress], say: Speaker) -> None:
    result: dict[str, object] = {}
    for work in works:
        kind, folder, skipped = work.job.kind, work.job.folder, work.skipped
        folder.delete_leftovers(PREFIX)
        num_rows = sum(one.num_rows for one in work.finished.values())
        assert num_rows + len(skipped) == work.inputs.number, "every input is in one shard"
        for one in skipped[:_SHOWN]:
            say.note(f"跳过 / skipped: {one.reason}")
        if skipped:
            say.note(f"共跳过 {len(skipped)} 张图片 / skipped {len(skipped)} pictures in all")
        say(f"{num_rows} {kind} features are stored in {folder.name}")
        result |= {f"num_{kind}s": num_rows, f"{kind}_features": folder.name, f"num_{kind}_shards": len(work.finished)}
        if kind == "image":
            result |= {
                "num_skipped": len(skipped),
                "skipped": [{"id": one.id, "reason": one.reason} for one in skipped],
            }
    say("Done!")
    say.result(result)
