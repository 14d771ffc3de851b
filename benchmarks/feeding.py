"""How fast training is fed: from the JPEGs of an LMDB to batches of the loader, beside another checkout, in turns:

python benchmarks/feeding.py --other OTHER_CHECKOUT
"""

import base64
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pictures import made_up  # noqa: E402

from cn_clip import command, terminal  # noqa: E402
from cn_clip.clip.picture_names import Decode  # noqa: E402
from cn_clip.data.lmdb_store import Pair, SplitWriter  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

# CPU time and not the clock's: other programs of the machine change it little.
PROBE = """
import json, resource, sys, typing
import torch
from cn_clip.training import inputs
from cn_clip.training.params import Options
settings = json.loads(sys.argv[1])
if settings["options"]["decode"] not in typing.get_args(typing.get_type_hints(Options)["decode"]):
    raise SystemExit("has no such way of decoding")
torch.set_num_threads(1)
data = inputs.training_data(Options(**settings["options"]), 224, torch.device("cpu"))
def cpu():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
began, pictures, shared = cpu(), 0, 0
for epoch in range(settings["epochs"]):
    data.start_epoch(epoch, 0)
    for batch in data.loader:
        pictures += len(batch.image_id)
        shared = sum(part.nbytes for part in batch if isinstance(part, torch.Tensor))
del data, batch
print("ANSWER " + json.dumps({"per_core_s": pictures / (cpu() - began), "shared_bytes": shared}))
"""


@dataclass(frozen=True)
class Options:
    """Pictures a second of one core, and bytes of shared memory a batch, as `cn-clip train` loads them."""

    other: Path | None = None
    """The folder of another checkout of this project, measured too."""
    pictures: int = 128
    """How many pictures an epoch has; they are made up."""
    size: tuple[int, int] = (1024, 768)
    """Their width and height."""
    epochs: int = 2
    """How often they are loaded in a measurement."""
    batch_size: int = 32
    """Pairs in a batch."""
    workers: int = 2
    """Processes that load."""
    use_augment: bool = False
    """Vary the pictures, as train --use-augment."""
    decode: tuple[Decode, ...] = ("exact", "fast")
    """Ways of decoding to measure; the other checkout may lack one."""
    rounds: int = 3
    """How often each measurement is made; medians are reported."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def __post_init__(self) -> None:
        if min(self.pictures, self.epochs, self.batch_size, self.workers, self.rounds) < 1:
            raise ConfigError("--pictures, --epochs, --batch-size, --workers, --rounds: expected at least 1")


def run(options: Options) -> None:
    trees = {"this": ROOT, **({"other": options.other.resolve()} if options.other else {})}
    sides = [(name, how) for how in options.decode for name in trees]
    found: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        with SplitWriter(Path(folder) / "train") as writer:
            for number, data in enumerate(made_up(options.pictures, options.size)):
                writer.put_image(number, base64.b64encode(data))
                writer.put_pair(Pair(number, number, f"第{number}张"))
        for turn in range(options.rounds):
            for name, how in sides if turn % 2 == 0 else sides[::-1]:
                found[name, how] += probe(trees[name], Path(folder), options, how)
    results = {
        f"{name} {how}": {key: median(answer[key] for answer in answers) for key in answers[0]}
        for (name, how), answers in found.items()
        if answers
    }
    say = command.Speaker(quiet=options.json)
    say("\n".join(table(options, results)))
    say.result({"machine": platform.machine(), "cores": os.cpu_count(), "results": results})


def probe(tree: Path, folder: Path, options: Options, how: str) -> list[dict[str, float]]:
    """One measurement; none where the tree has no such way of decoding."""
    given = {"train_data": str(folder / "train"), "batch_size": options.batch_size, "num_workers": options.workers}
    given |= {"decode": how, "use_augment": options.use_augment}
    settings = json.dumps({"options": given, "epochs": options.epochs})
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", PROBE, settings]
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    if done.returncode:
        print(f"{tree}, --decode {how}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    answer: dict[str, float] = json.loads(done.stdout.rpartition("ANSWER ")[2])
    return [answer]


def table(options: Options, results: dict[str, Any]) -> list[str]:
    width, height = options.size
    head = f"{options.pictures} JPEGs of {width} x {height}, batches of {options.batch_size}, {options.workers} workers"
    rows = [["checkout, --decode", "pictures/s a core", "shared bytes a batch"]]
    rows += [[name, f"{row['per_core_s']:.0f}", f"{row['shared_bytes']:,.0f}"] for name, row in results.items()]
    return [f"{head}; medians of {options.rounds}", *terminal.align(rows, right=frozenset({1, 2}))]


if __name__ == "__main__":
    command.execute(run, Options)
