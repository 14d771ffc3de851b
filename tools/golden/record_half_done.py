"""Records tests/golden/half_done: what two killed extractions left, rows of one process and shards of several.

python tools/golden/record_half_done.py

Not from the reference, but from this package: files of version 2.0.0, with which later versions must go on. The bytes
are the same as long as the format is. When the format changes, keep the files, and delete this program.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from test_row_store import HALF_DONE, OLD_JOB  # noqa: E402

from cn_clip.data.storage import open_storage  # noqa: E402
from cn_clip.features.store import Manifest, RowStore, Shard, Skipped, begin_shards, write_shard  # noqa: E402


def record_rows() -> None:
    """Three of four rows."""
    rows = np.eye(4, dtype=np.float32)
    with RowStore(HALF_DONE / "pictures.npz", OLD_JOB, 4, print) as store:
        store.put(0, rows[:2])
        store.put(2, rows[2:3])


def record_shards() -> None:
    """Two of three shards; the second has a damaged picture."""
    folder = open_storage(str(HALF_DONE / "shards"))
    manifest = Manifest("image_id", {"digest": "aaaa"}, {"digest": "dddd"}, 10, 4)
    begin_shards(folder, manifest, overwrite=False)
    for shard, numbers in ((Shard(0, 0, 4), (0, 1, 2, 3)), (Shard(1, 4, 8), (4, 6, 7))):
        vectors = np.array([[number + 0.25, 0.5] for number in numbers], dtype=np.float32)
        skipped = [Skipped("p5", "p5: damaged")] if shard.start == 4 else []
        write_shard(folder, manifest, shard, [f"p{number}" for number in numbers], vectors, skipped=skipped)


def main() -> None:
    shutil.rmtree(HALF_DONE, ignore_errors=True)
    (HALF_DONE / "shards").mkdir(parents=True)
    record_rows()
    record_shards()


if __name__ == "__main__":
    main()
