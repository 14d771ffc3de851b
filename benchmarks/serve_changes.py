"""How long a service still shows what another process has removed from its index, under load.

python benchmarks/serve_changes.py --minutes 10

Builds an index of the embedded pictures with Emoji-Tiny, serves it, and has clients search, list, and fetch small
pictures and files, while a process removes and adds items. Exits with 1 when an item is shown `--most-seconds` after
the commit that removed it, or when a request gets an answer that is no answer: anything but 200, or 404 for an item
that may be gone.
"""

import asyncio
import json
import math
import multiprocessing
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from serve_load import PAUSE_AFTER_REFUSAL, exchange, service  # noqa: E402
from serve_soak import percentiles_ms, resident_mb  # noqa: E402

from cn_clip import command, terminal  # noqa: E402
from cn_clip.deploy import bench_report  # noqa: E402
from cn_clip.emoji_pack import load  # noqa: E402
from cn_clip.errors import ConfigError, DataError  # noqa: E402
from cn_clip.retrieval.writer import open_writer  # noqa: E402

# Items that are gone at a time stay away so long, in seconds: all that is staler than this reads as this.
AWAY_SECONDS = 15.0
# Removed with each commit, and seconds between two.
AT_A_TIME, PAUSE = 3, 1.0
PHRASES = ("小猫", "下雨天", "生日蛋糕", "水果", "月亮", "飞机")


@dataclass(frozen=True)
class Options:
    """Changes an index while it is served, and measures how long what was removed is still shown."""

    minutes: float = 10.0
    """How long"""
    clients: int = 4
    """Clients of each kind of request"""
    num_pictures: int = 200
    """Pictures of the index"""
    most_seconds: float = 5.0
    """Longest time that a removed item may still be shown"""
    json: bool = False
    """Print the result as one JSON object"""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes: expected a positive number, got {self.minutes:g}")
        if self.num_pictures < 20 * AT_A_TIME:
            raise ConfigError(f"--num-pictures: expected at least {20 * AT_A_TIME}, got {self.num_pictures}")


@dataclass
class Seen:
    """What was asked and found. All times are those of `time.monotonic`, which all processes share."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    # When the commit returned that removed an item; only while it is away.
    removed_at: dict[str, float] = field(default_factory=dict)
    added_at: dict[str, float] = field(default_factory=dict)
    longest_shown: float = 0.0
    longest_missing: float = 0.0
    num_removed: int = 0

    def note(self, event: tuple[str, str, float]) -> None:
        """What the other process says of an item: removing, removed, adding or added, and when."""
        what, item_id, at = event
        if what == "removed":
            self.removed_at[item_id] = at
            self.num_removed += 1
        elif what == "adding":
            self.removed_at.pop(item_id, None)
        elif what == "added":
            self.added_at[item_id] = at
        else:
            self.added_at.pop(item_id, None)

    def shown(self, item_ids: Sequence[str], asked_at: float, *, is_all: bool) -> None:
        """An answer to what was asked then showed these, and if `is_all` no others."""
        for item_id in item_ids:
            if (removed_at := self.removed_at.get(item_id, math.inf)) < asked_at:
                self.longest_shown = max(self.longest_shown, asked_at - removed_at)
        if is_all:
            for item_id in self.added_at.keys() - set(item_ids):
                self.longest_missing = max(self.longest_missing, asked_at - self.added_at[item_id])


def change(folder: Path, until: float, events: "multiprocessing.Queue[Any]") -> None:
    """Removes and adds items until then; each commit is an opening of its own, as of a command."""
    chance, away = random.Random(0), list[tuple[float, Any]]()

    def tell(what: str, item_ids: Sequence[Any]) -> None:
        for item_id in item_ids:
            events.put((what, str(item_id), time.monotonic()))

    while time.monotonic() < until:
        with open_writer(folder) as writer:
            ids = chance.sample([item_id for item_id, _ in writer.items()], AT_A_TIME)
            stored = writer.stored(ids)
            tell("removing", ids)
            writer.commit(remove=ids)
            tell("removed", ids)
        away += [(time.monotonic() + AWAY_SECONDS, item) for item in stored.values()]
        back = [item for when, item in away if when <= time.monotonic()]
        away = [one for one in away if one[1] not in back]
        if back:
            tell("adding", [item.id for item in back])
            with open_writer(folder) as writer:
                writer.commit(back)
            tell("added", [item.id for item in back])
        time.sleep(PAUSE)


def requests(number: int, ids: Sequence[str]) -> tuple[str, str, bytes]:
    """(kind, method and path, body) of one more request."""
    one, address = ids[number * 7 % len(ids)], quote(ids[number * 7 % len(ids)], safe="")
    phrase = PHRASES[number % len(PHRASES)]
    return (
        ("search", "POST /v1/search", json.dumps({"query": phrase, "k": 1000}).encode()),
        ("list", "GET /v1/index/items?limit=1000", b""),
        ("thumbnail", f"GET /v1/index/thumbnails/{address}?size=small", b""),
        ("original", f"GET /v1/index/items/{address}", b""),
        ("like", "POST /v1/search", json.dumps({"query": {"id": one}, "k": 10}).encode()),
    )[number % 5]


async def load_it(options: Options, port: int, ids: Sequence[str], events: "multiprocessing.Queue[Any]") -> Seen:
    """Asks until the time is over."""
    seen, until = Seen(), time.monotonic() + 60 * options.minutes

    async def listen() -> None:
        while time.monotonic() < until:
            try:
                while True:
                    seen.note(events.get_nowait())
            except queue.Empty:
                await asyncio.sleep(0.005)

    async def client(start: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = start
        while (asked_at := time.monotonic()) < until:
            number += 1
            kind, what, body = requests(number, ids)
            status, answer = await exchange(reader, writer, what, body)
            seen.statuses[kind, status] += 1
            if status == 503:
                await asyncio.sleep(PAUSE_AFTER_REFUSAL)
                continue
            seen.seconds[kind].append(time.monotonic() - asked_at)
            own_id = ids[number * 7 % len(ids)]
            if status == 404 and kind in ("thumbnail", "original", "like"):
                continue
            if status != 200:
                raise DataError(f"{kind}: got {status} {answer[:200]!r}")
            if kind in ("search", "list"):
                shown = [str(hit["id"]) for hit in json.loads(answer)["data"]]
                seen.shown(shown, asked_at, is_all=True)
            else:
                seen.shown([own_id], asked_at, is_all=False)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(listen(), *[client(number * 13) for number in range(5 * options.clients)])
    return seen


def run(options: Options) -> None:
    """Builds, serves, loads and changes; raises DataError for what should not be."""
    say = command.Speaker(quiet=options.json)
    with tempfile.TemporaryDirectory() as temporary:
        pictures, folder = Path(temporary) / "pictures", Path(temporary) / "photos.index"
        pictures.mkdir()
        for one in load()[: options.num_pictures]:
            (pictures / f"{one.number}.webp").write_bytes(one.picture)
        build = ["index", "build", str(pictures), "--output", str(folder), "--model", "Emoji-Tiny"]
        subprocess.run([sys.executable, "-m", "cn_clip", *build], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        ids = [path.name for path in sorted(pictures.iterdir())]
        context = multiprocessing.get_context("spawn")
        events: multiprocessing.Queue[Any] = context.Queue()
        with service([str(folder), "--originals", "--no-page"]) as (process, port):
            before_mb = resident_mb(process.pid)
            until = time.monotonic() + 60 * options.minutes - AWAY_SECONDS / 3
            changing = context.Process(target=change, args=(folder, until, events), daemon=True)
            changing.start()
            seen = asyncio.run(load_it(options, port, ids, events))
            changing.join(60)
            after_mb, status = resident_mb(process.pid), changing.exitcode
    rows = [["requests", "status", "number", "p50 ms", "p95 ms", "p99 ms"]]
    for (kind, code), count in sorted(seen.statuses.items()):
        rows.append([kind, str(code), str(count), *(percentiles_ms(seen.seconds[kind]) if code == 200 else ["-"] * 3)])
    say("\n".join(terminal.align(rows, right=frozenset(range(1, 6)))))
    say(f"{seen.num_removed} items were removed in {options.minutes:g} minutes")
    say(f"longest time that a removed item was still shown: {seen.longest_shown:.2f} s")
    say(f"longest time that an added item was not shown: {seen.longest_missing:.2f} s")
    say(f"memory of the service: {before_mb:.0f} MB at the start, {after_mb:.0f} MB at the end")
    say.result(
        {
            "machine": bench_report.machine_facts(),
            "options": asdict(options),
            "statuses": {f"{kind} {code}": count for (kind, code), count in sorted(seen.statuses.items())},
            "removed": seen.num_removed,
            "longest_shown_seconds": seen.longest_shown,
            "longest_missing_seconds": seen.longest_missing,
            "memory_mb": [before_mb, after_mb],
        }
    )
    if status != 0 or not seen.num_removed:
        raise DataError(f"the process that changes the index ended with status {status}")
    if seen.longest_shown > options.most_seconds:
        raise DataError(f"an item was shown {seen.longest_shown:.2f} s after it was removed")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
