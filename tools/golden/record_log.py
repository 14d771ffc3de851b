"""Records the log of a short training by Chinese-CLIP (cn_clip 1.6.0), for the tests of `cn-clip report`:

python tools/golden/record_log.py --reference-python REFERENCE/bin/python tests/golden/training_log
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from interchange import TOWERS, alone, write_dataset  # noqa: E402
from two_sides import two_sides  # noqa: E402

from cn_clip import command  # noqa: E402

SETTINGS = [
    *("--train-data=lmdb/train", "--val-data=lmdb/valid", "--logs=logs", "--name=waves", "--max-epochs=2"),
    *("--batch-size=4", "--valid-batch-size=4", "--num-workers=0", "--valid-num-workers=0", "--precision=fp32"),
    *("--lr=1e-5", "--warmup=1", "--log-interval=1", "--report-training-batch-acc", "--valid-step-interval=2"),
    *("--context-length=24", "--save-epoch-frequency=-1"),
]


@dataclass(frozen=True)
class Options:
    """Trains RN50@RBT3-chinese from random weights for four steps of four pairs on the CPU."""

    output: Annotated[str, tyro.conf.Positional]
    """Folder for the log and the file of settings, as the reference names them."""
    reference_python: str
    """The interpreter of an environment that has cn_clip 1.6.0."""


def run(options: Options) -> None:
    """Writes `out_*.log` and `params_*.txt`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder)
        reference = next(side for side in two_sides(options.reference_python, **alone()) if side.is_reference)
        reference.run("training.main", [*SETTINGS, *TOWERS], folder)
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        for pattern in ("out_*.log", "params_*.txt"):
            (written,) = (folder / "logs" / "waves").glob(pattern)
            shutil.copy(written, output)


if __name__ == "__main__":
    command.execute(run, Options, None)
