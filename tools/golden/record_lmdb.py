"""Records tests/golden/lmdb_reference/lmdb: what the reference's builder makes of the files of one split beside it.

REFERENCE/bin/python tools/golden/record_lmdb.py

The split itself, `train_imgs.tsv` and `train_texts.jsonl`, is written by hand: four pictures of one colour, as PNG, BMP
and JPEG, one in URL-safe base64; ids that are numbers or strings; a text with two pictures and one with none.
"""

import runpy
import shutil
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "lmdb_reference"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("train_imgs.tsv", "train_texts.jsonl"):
            shutil.copy(GOLDEN / name, temporary)
        sys.argv = ["build_lmdb_dataset", "--data_dir", temporary, "--splits", "train"]
        runpy.run_module("cn_clip.preprocess.build_lmdb_dataset", run_name="__main__")
        for part in ("imgs", "pairs"):
            folder = GOLDEN / "lmdb" / "train" / part
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(temporary, "lmdb", "train", part, "data.mdb"), folder)


if __name__ == "__main__":
    main()
