"""`metrics.jsonl`: one JSON line for each logged step and each validation of a run, every step once; for `monitor`."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cn_clip.digests import is_there
from cn_clip.errors import CnClipError, DataError
from cn_clip.jsonl import atomic_write, json_object, numbered_lines
from cn_clip.training.logs import logger

METRICS = "metrics.jsonl"

Record = dict[str, Any]


class MetricsFile:
    """An open metrics file: records {"step": int, "kind": "train" | "valid", ...numbers or null}, in order.

    Raises CnClipError naming the file when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[str] | None = None

    @property
    def is_open(self) -> bool:
        """Whether `append` may be called."""
        return self._stream is not None

    def set_aside(self) -> None:
        """Gives a file with something in it a name with the time of its last change."""
        if not is_there(self.path) or not self.path.stat().st_size:
            return
        changed = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime(self.path.stat().st_mtime))
        with self._writing():
            os.replace(self.path, self.path.with_name(f"{self.path.stem}_{changed}{self.path.suffix}"))

    def keep(self, wanted: Callable[[Record], bool]) -> list[Record]:
        """Leaves only the wanted records in the file, says what went, opens it for more; returns what stays."""
        self.close()
        records, num_torn = read_records(self.path)
        kept = [record for record in records if wanted(record)]
        if num_torn:
            logger.warning("%s: left out %d lines that are no record (a torn write?)", self.path, num_torn)
        if len(kept) < len(records):
            logger.info("%s: left out %d records of steps that are done again", self.path, len(records) - len(kept))
        with self._writing():
            if num_torn or len(kept) < len(records):
                with atomic_write(self.path) as stream:
                    stream.writelines(json.dumps(record) + "\n" for record in kept)
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        return kept

    def append(self, record: Record) -> None:
        """Writes one line, which other processes see at once."""
        assert self._stream is not None
        with self._writing():
            self._stream.write(json.dumps(record, allow_nan=False) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Closes the file; twice does no harm."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with self._writing():
                stream.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CnClipError(f"{self.path}: cannot be written ({error.strerror}); is the disk full?") from error


def read_records(path: Path) -> tuple[list[Record], int]:
    """The records of a metrics file, none where there is no file, and the number of lines that are none.

    Raises DataError for a file that cannot be opened.
    """
    records, num_torn = [], 0
    for _, line in numbered_lines(path) if is_there(path) else ():
        try:
            record = json_object(line)
        except DataError:
            record = {}
        if type(record.get("step")) is int and record.get("kind") in ("train", "valid") and _are_numbers(record):
            records.append(record)
        else:
            num_torn += 1
    return records, num_torn


def _are_numbers(record: Record) -> bool:
    values = (value for name, value in record.items() if name != "kind")
    return all(value is None or type(value) in (int, float) for value in values)
