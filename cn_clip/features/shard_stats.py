"""How a shard was made: where, how fast, and with what; written into its file, summed per process, and for Prometheus.

A worker of `ray_extraction` measures, its driver sums.
"""

import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from cn_clip import __version__
from cn_clip.extras import require
from cn_clip.language import both, counted

T = TypeVar("T")


@dataclass(frozen=True)
class ShardStats:
    """seconds: in all, but for the writing. decode_seconds: spent waiting for inputs that are read and decoded.

    batch: the most inputs computed at once; less than was asked for where memory ran out.
    """

    host: str
    pid: int
    rows: int
    seconds: float
    decode_seconds: float
    batch: int
    versions: Mapping[str, str]

    @property
    def rows_a_second(self) -> float:
        """The rate of the process."""
        return self.rows / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "rows_a_second": round(self.rows_a_second, 3)}


class Stopwatch:
    """Measures one shard, from when it is made."""

    def __init__(self) -> None:
        self._began, self._decoding = time.perf_counter(), 0.0

    def waited(self, batches: Iterable[T]) -> Iterator[T]:
        """The same, with the time that each is waited for counted as decoding."""
        coming = iter(batches)
        while True:
            since = time.perf_counter()
            try:
                one = next(coming)
            except StopIteration:
                return
            finally:
                self._decoding += time.perf_counter() - since
            yield one

    def stop(self, rows: int, batch: int) -> ShardStats:
        """What was measured, of a shard with so many rows."""
        names = ("torch", "onnxruntime", "openvino", "ray")
        found = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
        versions = {"cn_clip": __version__, "python": platform.python_version()}
        versions |= {name: str(version) for name, version in found.items() if version}
        return ShardStats(
            platform.node(),
            os.getpid(),
            rows,
            round(time.perf_counter() - self._began, 3),
            round(self._decoding, 3),
            batch,
            versions,
        )


class Meters:
    """The same as Prometheus reads it from the metrics port of each machine of a Ray cluster."""

    def __init__(self) -> None:
        metrics = require("ray.util.metrics", extra="ray", purpose="--engine ray")
        tags = ("kind",)
        self._rows = metrics.Counter("cn_clip_rows", "Rows that were written", tag_keys=tags)
        self._shards = metrics.Counter("cn_clip_shards", "Shards that were written", tag_keys=tags)
        self._seconds = metrics.Counter("cn_clip_seconds", "Seconds that shards took", tag_keys=tags)
        self._decoding = metrics.Counter("cn_clip_decode_seconds", "Of these, waiting for inputs", tag_keys=tags)
        self._rate = metrics.Gauge("cn_clip_rows_per_second", "Rate of the last shard", tag_keys=tags)

    def count(self, kind: str, stats: ShardStats) -> None:
        """Adds a shard that was written."""
        tags = {"kind": kind}
        for counter, value in (
            (self._rows, float(stats.rows)),
            (self._shards, 1.0),
            (self._seconds, stats.seconds),
            (self._decoding, stats.decode_seconds),
        ):
            if value > 0:
                counter.inc(value, tags=tags)
        self._rate.set(stats.rows_a_second, tags=tags)


class Rates:
    """What each process has done, by its host and number."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, int], list[ShardStats]] = {}

    def add(self, stats: ShardStats) -> None:
        """A shard that was written."""
        self._of.setdefault((stats.host, stats.pid), []).append(stats)

    def has_less(self, stats: ShardStats) -> bool:
        """Whether the same process has computed with so small a batch before."""
        return any(one.batch <= stats.batch for one in self._of.get((stats.host, stats.pid), []))

    def told(self) -> str:
        """While it goes on: the rate of each process, as they were in their last shards."""
        rates = [shards[-1].rows_a_second for shards in self._of.values()]
        shown = " ".join(f"{rate:.0f}" for rate in rates[:8]) + (" …" if len(rates) > 8 else "")
        return both(f"各进程每秒 {shown} 行", f"{shown} rows/s each")

    def values(self) -> list[dict[str, Any]]:
        """For programs: of each process its sums."""
        return [self._summed(host, pid, shards) for (host, pid), shards in sorted(self._of.items())]

    def lines(self) -> list[str]:
        """At the end, a line a process."""
        return [
            both(
                f"Ray：{one['host']} 进程 {one['pid']}：{one['shards']} 个分片、{one['rows']} 行，"
                f"每秒 {one['rows_a_second']} 行，{one['decode_share']:.0%} 的时间在等解码",
                f"Ray: {one['host']} process {one['pid']}: {counted(one['shards'], 'shard')}, {one['rows']} rows, "
                f"{one['rows_a_second']} rows/s, {one['decode_share']:.0%} of the time waiting for decoding",
            )
            for one in self.values()
        ]

    def _summed(self, host: str, pid: int, shards: list[ShardStats]) -> dict[str, Any]:
        seconds = sum(one.seconds for one in shards) or 1e-9
        rows = sum(one.rows for one in shards)
        return {
            "host": host,
            "pid": pid,
            "shards": len(shards),
            "rows": rows,
            "rows_a_second": round(rows / seconds, 1),
            "decode_share": round(sum(one.decode_seconds for one in shards) / seconds, 3),
            "batch": min(one.batch for one in shards),
        }
