"""Measures how long each command leaves a person at a terminal without a sign of life:

python benchmarks/silence.py --folder /tmp/silence [--only features topk …]

Runs the commands on a terminal of their own, on the embedded pictures, a random ViT-B-16 and Emoji-Tiny, and notes when
bytes come. The longest silence counts from the start of the process, imports and all, to the last byte; the time until
the first byte is printed beside it, and so is the time that the process takes to go when all has been said. Of commands
that do not end (serve, index watch) it counts until they say that they are ready. Exits with status 1 when a command
fails or one is silent for longer than --limit.
"""

import itertools
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from terminals import Seen, on_terminal  # noqa: E402

from cn_clip import command  # noqa: E402

B16 = "--vision-model=ViT-B-16 --text-model=RoBERTa-wwm-ext-base-chinese"
SIDES = "--image-data=small/lmdb/valid/imgs --text-data=small/valid_texts.jsonl"
RUN = "--num-workers=0 --valid-num-workers=0 --device=cpu --precision=fp32 --warmup=2 --max-epochs=1 --log-interval=50"
ARCH = "--model-arch=ViT-B-16 --pytorch-ckpt-path=base.pt"
# Each runs in one folder after those before it; the words are those of `cn-clip`.
COMMANDS = {
    "models": "models",
    "download": "download RN50 --download-root=downloads",
    "dataset from-folder": "dataset from-folder --folder=many --output=made --lmdb",
    "dataset build": "dataset build --data_dir=large --splits=train,valid --check=decode --lmdb_dir=large/lmdb",
    "dataset check": "dataset check --data-dir=large --splits=train,valid",
    "dataset shards": "dataset shards --data_dir=large --split=train --output=shards --num-shards=4 --shrink=96",
    "features": f"features --extract-image-feats --extract-text-feats --resume=base.pt {SIDES} "
    "--image-feat-output-path=i.jsonl --text-feat-output-path=t.jsonl --img-batch-size=64",
    "features, onnx, first use": f"features --extract-image-feats --model=base.pt --backend=onnx {SIDES} "
    "--image-feat-output-path=o.jsonl --download-root=cache",
    "topk": "topk --image-feats=many.jsonl --text-feats=few.jsonl --top-k=10 --output=many.p.jsonl",
    "topk, small": "topk --image-feats=i.jsonl --text-feats=t.jsonl --top-k=10 --output=p.jsonl",
    "recall": "recall small/valid_texts.jsonl p.jsonl r.json",
    "evaluate": "evaluate muge --data=small --checkpoint=base.pt --output=evaluated",
    "zeroshot": "zeroshot --datapath=classes --label-file=labels.txt --resume=base.pt --save-dir=z",
    "linear-probe": "linear-probe --train=classes --test=classes --checkpoint=base.pt --cache=probe",
    "train": f"train --train-data=large/lmdb/train --val-data=large/lmdb/valid --logs=logs --name=base {B16} "
    f"--batch-size=16 --valid-batch-size=32 --max-steps=6 {RUN}",
    "train Emoji-Tiny": "train --train-data=large/lmdb/train --val-data=large/lmdb/valid --logs=logs --name=tiny "
    "--init=Emoji-Tiny --vision-model=RN-Small-64 --text-model=BERT-Tiny-chinese --batch-size=64 --valid-batch-size=64 "
    f"--max-steps=60 {RUN}",
    "report": "report logs/tiny --data=large/lmdb/valid",
    "wise-ft": "wise-ft --zeroshot=base.pt --finetuned=other.pt --val-data=small/lmdb/valid --alphas 0,0.5,1 "
    "--output=mixed.pt",
    "compare": "compare one=r.json two=r.json --output=table.md",
    "checkpoint info": "checkpoint info logs/base/checkpoints/epoch_latest.pt",
    "checkpoint strip": "checkpoint strip logs/base/checkpoints/epoch_latest.pt --output=stripped.pt",
    "checkpoint average": "checkpoint average base.pt other.pt stripped.pt --output=mean.pt",
    "checkpoint export": "checkpoint export base.pt --output=base.safetensors",
    "convert": "convert base.pt base-folder",
    "index build": "index build some --output=some.index --model=base.pt",
    "index build, many": "index build many --output=many.index --model=Emoji-Tiny",
    "index add": "index add some.index other --model=base.pt",
    "index check": "index check many.index",
    "index duplicates": "index duplicates many.index",
    "index info": "index info many.index",
    "index watch": "index watch some --output=some.index --model=base.pt",
    "search": "search some.index 红色的花 --model=base.pt",
    "serve": "serve some.index --model=base.pt --port=0",
    "export onnx": f"export onnx {ARCH} --save-onnx-path=onnx/base --convert-text --convert-vision --precisions fp32 "
    "fp16 int8",
    "export coreml": f"export coreml {ARCH} --save-coreml-path=coreml/base --convert-text --convert-vision",
    "features, openvino": f"features --extract-image-feats --model=base.pt --backend=openvino {SIDES} "
    "--precision=int8 --image-feat-output-path=v.jsonl --download-root=cache",
    "bench": "bench --model=base.pt --backends torch onnx --precisions fp32 --batch-sizes 8 --repeats 5 "
    "--download-root=cache",
    "demo": "demo --output=demo-output --steps=20",
}
# The commands that do not end, and what they say when they are ready: Ctrl-C follows.
ENDLESS = {"serve": "ready", "index watch": "waiting for changes"}
# How a command ends, if not with 0: the bytes that come are not those of the model, and the whole of them is refused.
ENDS = {"download": 1}


@dataclass(frozen=True)
class Options:
    """Prints the longest silence of each command on a terminal."""

    folder: Path
    """Folder of the work, with 5 GB free; what is there already is used again"""
    only: tuple[str, ...] = ()
    """The commands to run, by their names here; default: all"""
    limit: float = 3.0
    """The longest silence, in seconds"""
    keep: bool = False
    """Keep what came on the terminals, in FOLDER/terminals"""
    json: bool = False
    """Print the result as one JSON object"""


@dataclass(frozen=True)
class Silence:
    """Seconds: of the whole command; until its first byte; of the longest silence, which came after `before`; and from
    the last byte to the end."""

    name: str
    status: int
    seconds: float
    first: float
    longest: float
    end: float
    before: str


def longest(name: str, seen: Seen) -> Silence:
    """The longest time without a byte, from the start to the last."""
    times = [0.0, *(moment for moment, _ in seen.chunks)] if seen.chunks else [0.0, seen.seconds]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    number = max(range(len(gaps)), key=gaps.__getitem__)
    before = "".join(text for _, text in seen.chunks[:number]).replace("\r", "\n").strip().rpartition("\n")[2]
    return Silence(
        name, seen.status, seen.seconds, gaps[0], gaps[number], seen.seconds - times[-1], before.strip()[-60:]
    )


PREPARE = """
import base64, io, json
from pathlib import Path
import numpy as np
from PIL import Image
from cn_clip import emoji_pack
from cn_clip.deploy import towers

for towers.RANDOM_SEED, name in enumerate(("base.pt", "other.pt")):
    towers.write_random(Path(name), "ViT-B-16", "RoBERTa-wwm-ext-base-chinese")
rng, pack = np.random.default_rng(0), emoji_pack.load("noto")

def write(folder, numbers, side):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        one = pack[number % len(pack)]
        picture = Image.open(io.BytesIO(one.picture)).convert("RGB").resize((side, side))
        noise = Image.fromarray(rng.integers(0, 255, (80, 80, 3), dtype=np.uint8)).resize((side, side))
        Image.blend(picture, noise, 0.2).save(folder / f"{one.name.replace('/', ' ')}-{number}.jpg", quality=92)

write(Path("many"), range(3000), 640)
write(Path("some"), range(48), 640)
write(Path("other"), range(200, 232), 640)
for number in range(4):
    write(Path("classes", str(number)), range(number, 48, 4), 320)
Path("labels.txt").write_text("".join(one.name + "\\n" for one in pack[:4]), encoding="utf-8")

def write_split(folder, split, paths):
    folder.mkdir(exist_ok=True)
    with open(folder / f"{split}_imgs.tsv", "w") as images, open(folder / f"{split}_texts.jsonl", "w") as texts:
        for number, path in enumerate(paths):
            images.write(f"{number}\\t{base64.b64encode(path.read_bytes()).decode()}\\n")
            texts.write(json.dumps({"text_id": number, "text": path.stem, "image_ids": [number]}) + "\\n")

many = sorted(Path("many").iterdir())
write_split(Path("large"), "train", many[:2700])
write_split(Path("large"), "valid", many[2700:])
for split in ("train", "valid"):
    write_split(Path("small"), split, sorted(Path("some").iterdir()))
for name, field, count in (("many", "image_id", 60000), ("few", "text_id", 4000)):
    with open(f"{name}.jsonl", "w") as stream:
        for number in range(count):
            values = np.round(rng.standard_normal(512) / 22, 6).tolist()
            stream.write(json.dumps({field: number, "feature": values}) + "\\n")
"""


def prepare(folder: Path) -> None:
    """Makes pictures, datasets, features and two random models, once."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "ready").exists():
        return
    subprocess.run([sys.executable, "-c", PREPARE], cwd=folder, env=environment(), check=True)
    build = ["-m", "cn_clip", "dataset", "build", "--data_dir=small", "--splits=train,valid", "--lmdb_dir=small/lmdb"]
    subprocess.run([sys.executable, *build], cwd=folder, env=environment(), check=True, capture_output=True)
    for made in ("onnx", "coreml", "probe"):
        (folder / made).mkdir(exist_ok=True)
    (folder / "ready").touch()


def environment() -> dict[str, str]:
    """Of every command."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "CN_CLIP_LANG": "en"}


@contextmanager
def slow_hub() -> Iterator[dict[str, str]]:
    """A hub on this machine that has one file, and gives 4 MB of it a second."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    content, step = os.urandom(1 << 20) * 40, 1 << 19

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                time.sleep(step / (4 << 20))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


def measure(name: str, options: Options) -> tuple[Silence, Seen]:
    """Runs one of `COMMANDS`."""
    words = [sys.executable, "-m", "cn_clip", *shlex.split(COMMANDS[name])]
    around: Any = slow_hub() if name == "download" else nullcontext({})
    with around as more:
        settings = {**environment(), **more}
        seen = on_terminal(words, env=settings, cwd=options.folder, timeout=1800, until=ENDLESS.get(name))
    return longest(name, seen), seen


def run(options: Options) -> int:
    """Measures; returns 1 when a command failed or was silent for too long."""
    prepare(options.folder)
    say: Callable[[str], None] = command.Speaker(quiet=options.json)
    facts = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine(), "limit": options.limit}
    say(f"{facts['cores']} cores, load {os.getloadavg()[0]:.1f}")
    say(f"{'command':28} status  whole s  first byte s  longest silence s  end s  load  before it")
    rows, is_good = [], True
    for name in options.only or COMMANDS:
        found, seen = measure(name, options)
        load = os.getloadavg()[0]
        is_whole = found.status == ENDS.get(name, 0) or (name in ENDLESS and found.status == 130)
        if options.keep or not is_whole:
            (options.folder / "terminals").mkdir(exist_ok=True)
            (options.folder / "terminals" / f"{name}.txt").write_text(seen.text, encoding="utf-8")
        is_good &= is_whole and found.longest <= options.limit
        numbers = f"{found.seconds:7.1f}  {found.first:12.1f}  {found.longest:17.1f}  {found.end:5.1f}  {load:4.1f}"
        say(f"{name:28} {found.status:6}  {numbers}  {found.before}")
        rows.append({**found.__dict__, "load": load})
    command.Speaker(quiet=options.json).result({**facts, "commands": rows})
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Options, description=__doc__)))
