"""A folder of features in Parquet shards: which rows go into which, which are finished, and what they are of.

`manifest.json` says of what model, data and plan the shards are, and appears first; `part-00000.parquet` and the others
appear whole, in any order, and carry the key of the manifest. So what is finished is what is there.
"""

# N rows, D embedding

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cn_clip.data.records import RecordId
from cn_clip.data.storage import Storage
from cn_clip.digests import is_file
from cn_clip.errors import ConfigError, DataError, UnreadableError, is_absent
from cn_clip.features.rows import Features, FloatArray, IdField, check_finite
from cn_clip.features.tables import parquet_bytes, parquet_facts, read_parquet_parts

MANIFEST = "manifest.json"
PREFIX, SUFFIX = "part-", ".parquet"
_READING_THREADS = 16


class Shard(NamedTuple):
    """Inputs `start` to before `stop`, which go into one file."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file name of the shard."""
        return f"{PREFIX}{self.number:05d}{SUFFIX}"


@dataclass(frozen=True)
class Skipped:
    """An input that could not be read; reason: where it is, and what is wrong."""

    id: RecordId
    reason: str


@dataclass(frozen=True)
class Finished:
    """What a shard holds: its rows, and the inputs that have none."""

    num_rows: int
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What the shards of a folder are of.

    model, data: values that JSON can hold; each has a "digest", which tells it from others.
    """

    field: IdField
    model: Mapping[str, object]
    data: Mapping[str, object]
    num_inputs: int
    shard_size: int

    @property
    def key(self) -> str:
        """A digest that tells these shards from those of another job."""
        parts = [self.field, self.model["digest"], self.data["digest"], self.num_inputs, self.shard_size]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def shards(self) -> list[Shard]:
        """The plan: every input in one shard, all of `shard_size` but the last."""
        starts = range(0, self.num_inputs, self.shard_size)
        return [
            Shard(number, start, min(start + self.shard_size, self.num_inputs)) for number, start in enumerate(starts)
        ]

    def fingerprint(self) -> str:
        """One line for people."""
        return f"{self.field} model {self.model['digest']} data {self.data['digest']} shard-size {self.shard_size}"

    def to_json(self) -> bytes:
        """The manifest as it is written, with the number of shards and its key."""
        num_shards = len(self.shards())
        record = {"format": "cn_clip feature shards 1", **asdict(self), "num_shards": num_shards, "key": self.key}
        return json.dumps(record, ensure_ascii=False, indent=2).encode() + b"\n"


def read_manifest(data: bytes, where: str) -> Manifest:
    """Raises DataError for anything but what `Manifest.to_json` writes."""
    try:
        record = json.loads(data)
        values = {name: record[name] for name in ("field", "model", "data", "num_inputs", "shard_size")}
        manifest = Manifest(**values)
        if manifest.key != record["key"] or manifest.shard_size < 1:
            raise ValueError("its key is another")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"is no manifest of feature shards ({error}); extract again with `cn-clip features --overwrite`", at=where
        ) from error
    return manifest


def begin(folder: Storage, manifest: Manifest, *, overwrite: bool) -> dict[int, Finished]:
    """Makes the folder that of `manifest`, and returns the shards of it that are finished, by number.

    A shard that is damaged, or of another job, counts as not finished. overwrite: removes the shards that are there.
    Raises ConfigError naming both fingerprints when the folder is another job's, or holds shards of nobody knows what.
    """
    file = folder.child(MANIFEST)
    there = _part_names(folder)
    is_ours = not overwrite and file.find() is not None
    if is_ours:
        found = read_manifest(file.read(), file.name)
        if found.key != manifest.key:
            raise ConfigError(
                f"{folder.name}: 已有另一次提取的结果 / holds [{found.fingerprint()}], this run makes "
                f"[{manifest.fingerprint()}]; choose another --output, or start again with --overwrite"
            )
        return _finished(folder, manifest, there)
    if there and not overwrite:
        raise ConfigError(
            f"{folder.name}: holds {len(there)} Parquet shards but no {MANIFEST}; choose another --output, or remove "
            "them with --overwrite"
        )
    for name in ([MANIFEST] if file.find() else []) + there:
        folder.child(name).delete()
    file.write(manifest.to_json())
    return {}


def _part_names(folder: Storage) -> list[str]:
    names = (folder.below(file.path) for file in folder.list_files(recursive=False))
    return [name for name in names if name.startswith(PREFIX) and name.endswith(SUFFIX)]


def _finished(folder: Storage, manifest: Manifest, there: Iterable[str]) -> dict[int, Finished]:
    shards = {shard.name: shard for shard in manifest.shards()}
    wanted = [shards[name] for name in there if name in shards]
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        reports = pool.map(lambda shard: _read_report(folder, manifest, shard), wanted)
        return {shard.number: report for shard, report in zip(wanted, reports, strict=True) if report is not None}


def _read_report(folder: Storage, manifest: Manifest, shard: Shard) -> Finished | None:
    """What a file says of itself, None when it is not this shard of this job."""
    try:
        with folder.child(shard.name).open() as stream:
            return _report_of(stream, manifest, shard)
    except DataError:
        return None


def _report_of(stream: BinaryIO, manifest: Manifest, shard: Shard) -> Finished:
    """Raises DataError when a file is damaged, or not this shard of this job."""
    num_rows, facts = parquet_facts(stream)
    try:
        skipped = tuple(Skipped(*one) for one in facts["skipped"])
        key, extent = facts["key"], facts["shard"]
    except (KeyError, TypeError) as error:
        raise DataError(f"does not say of which extraction it is ({error})") from error
    if key != manifest.key:
        raise DataError(f"is of another extraction, by its key {key!r}; that of the manifest is {manifest.key!r}")
    if extent != list(shard) or num_rows + len(skipped) != shard.stop - shard.start:
        raise DataError(f"holds {num_rows} rows of the inputs {extent}; expected those of {list(shard)}")
    return Finished(num_rows, skipped)


def write_shard(
    folder: Storage,
    manifest: Manifest,
    shard: Shard,
    ids: Sequence[RecordId],
    rows_ND: FloatArray,
    *,
    paths: Sequence[str] | None = None,
    skipped: Sequence[Skipped] = (),
) -> Finished:
    """Writes a shard; it appears whole or not at all, in place of one that is there.

    Raises DataError when it cannot be written, CheckpointError naming the id of a row that holds NaN or infinity.
    """
    assert len(ids) + len(skipped) == shard.stop - shard.start, "every input has a row or a reason"
    check_finite(rows_ND, ids, manifest.field)
    facts = {"key": manifest.key, "shard": list(shard), "skipped": [[one.id, one.reason] for one in skipped]}
    data = parquet_bytes(manifest.field, ids, rows_ND, paths=paths, facts=facts)
    folder.child(shard.name).write(data)
    return Finished(len(ids), tuple(skipped))


def is_shard_folder(path: Path) -> bool:
    """Whether a local folder holds shards that this package wrote; raises UnreadableError."""
    return is_file(path / MANIFEST)


def read_shards(folder: Path, field: IdField) -> Features:
    """All rows of a local folder, in the order of the inputs.

    Raises DataError for shards that are missing or of another extraction, and as `tables.read_parquet_parts`.
    """
    file = folder / MANIFEST
    try:
        manifest = read_manifest(file.read_bytes(), str(file))
    except OSError as error:
        if not is_absent(error):
            raise UnreadableError.of(file, error) from error
        raise DataError(
            f"is a folder without {MANIFEST}; expected a feature file, or what "
            "`cn-clip features --engine ray` wrote into its --output",
            at=folder,
        ) from error
    if manifest.field != field:
        raise DataError(f"no {field}, only {manifest.field}; is this the folder of the other modality?", at=folder)
    shards = {folder / shard.name: shard for shard in manifest.shards()}
    missing = [path.name for path in shards if not is_file(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(shards)} shards are missing ({missing[0]}); run the extraction again, "
            "it goes on where it stopped",
            at=folder,
        )
    for path, shard in shards.items():
        try:
            with open(path, "rb") as stream:
                _report_of(stream, manifest, shard)
        except OSError as error:
            raise UnreadableError.of(path, error) from error
        except DataError as error:
            raise DataError(
                f"{error}; run the extraction again, which makes the shards that are not of {MANIFEST}", at=path
            ) from error
    return read_parquet_parts(folder, list(shards), field)
