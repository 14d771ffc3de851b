"""What every command prints and writes, recorded from a checkout, so that two can be compared byte for byte.

python tools/outputs.py record FOLDER [--checkout PATH]   # runs the commands on the embedded pictures, some minutes
python tools/outputs.py compare BEFORE AFTER              # status 1 and the differences, if there are any

Times, speeds, memory and the folder of the work are left out; files are compared by their digests, checkpoints by those
of their tensors.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = "--vision-model=ViT-Tiny-64 --text-model=BERT-Tiny-chinese"
SEARCH = "search photos.index"
# Each runs in the same folder after those before it. The words are those of `cn-clip`.
COMMANDS = {
    "models": "models",
    "models-json": "models --json",
    "dataset-build": "dataset build --data_dir=data --splits=train,valid",
    "dataset-check": "dataset check --data-dir=data --splits=train,valid --json",
    "features-text": "features --extract-text-feats --extract-image-feats --resume=Emoji-Tiny "
    "--image-data=data/lmdb/valid/imgs --text-data=data/valid_texts.jsonl --context-length=24 "
    "--image-feat-output-path=i.jsonl --text-feat-output-path=t.jsonl",
    "features-npz": "features --extract-image-feats --resume=Emoji-Tiny --image-data=data/lmdb/valid/imgs "
    "--text-data=data/valid_texts.jsonl --image-feat-output-path=i.npz --json",
    "features-parquet": "features --extract-text-feats --resume=Emoji-Tiny --text-data=data/valid_texts.jsonl "
    "--image-data=data/lmdb/valid/imgs --context-length=24 --text-feat-output-path=t.parquet --json",
    "topk-images": "topk --image-feats=i.jsonl --text-feats=t.jsonl --top-k=10 --output=p.jsonl",
    "topk-texts": "topk --query=image --image-feats=i.jsonl --text-feats=t.jsonl --top-k=10 --output=p.tr.jsonl --json",
    "recall": "recall data/valid_texts.jsonl p.jsonl r.json",
    "recall-json": "recall data/valid_texts.jsonl p.jsonl r.json --json",
    "from-folder": "dataset from-folder --folder=classes --output=made --splits=train,valid --split-ratio=0.8,0.2 "
    "--json",
    "index-build": "index build pictures --output=photos.index --model=Emoji-Tiny",
    "index-again": "index build pictures --output=photos.index --model=Emoji-Tiny --json",
    "index-info": "index info photos.index --json",
    "index-check": "index check photos.index --json",
    "search-text": f"{SEARCH} 一只猫 --json",
    "search-lines": f"{SEARCH} 红色的花",
    "search-picture": f"{SEARCH} --image=pictures/000.webp --json",
    "index-remove": "index remove photos.index 000.webp --json",
    "zeroshot": "zeroshot --datapath=classes --label-file=labels.txt --resume=Emoji-Tiny --save-dir=z --json",
    "train": f"train --train-data=data/lmdb/train --val-data=data/lmdb/valid --logs=logs --name=run {TINY} "
    "--batch-size=32 --valid-batch-size=32 --max-steps=3 --num-threads=1 --num-workers=0 --valid-num-workers=0 "
    "--device=cpu --precision=fp32 --warmup=2 --log-interval=1 --max-epochs=1",
    "info": "checkpoint info logs/run/checkpoints/epoch_latest.pt --json",
    "strip": "checkpoint strip logs/run/checkpoints/epoch_latest.pt --output=stripped.pt --json",
    "convert": "convert stripped.pt folder --json",
    "compare": "compare one=r.json two=r.json --output=table.md",
    "wrong-model": "search photos.index 猫 --model=missing.pt",
    "wrong-file": "recall data/valid_texts.jsonl missing.jsonl r.json",
    "wrong-flag": "features --resume=Emoji-Tiny",
}
# What differs from run to run.
MOVING = [
    (r"\d{4}-\d\d-\d\d[ ,T]\d\d[:-]\d\d[:-]\d\d(\.\d+)?(Z|\+00:00)?", "TIME"),
    (r"\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", "TIME"),
    (r"Time: [\d.]+s", "Time: Xs"),
    (r"[\d.,]+ (samples|pictures|rows|items|texts)/s", r"X \1/s"),
    (r"Speed: [\d.]+", "Speed: X"),
    (r"[\d.]+ ?(GiB|MiB|MB|KiB)\b", r"X \1"),
    (r'"(seconds|[a-z_]*_seconds|[a-z_]*per_second|created|modified|bytes)": [\d."TIME:-]+', r'"\1": X'),
    (r"\b[\d.]+ ?(s|ms|秒|seconds)\b", r"X \1"),
    (r"\"mtime_ns\": \d+", '"mtime_ns": X'),
    (r".*(\d%\||\[\d\d:\d\d, ).*\n?", ""),
]


def run(words: list[str], folder: Path, checkout: Path) -> str:
    """The status, standard output and standard error of a command."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONUTF8": "1", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    text = f"status {done.returncode}\n--- stdout\n{done.stdout}--- stderr\n{done.stderr}"
    return text.replace(str(folder), "WORK").replace(str(checkout), "CHECKOUT").replace("\r", "\n")


def still(text: str) -> str:
    """The text without what moves."""
    for pattern, replacement in MOVING:
        text = re.sub(pattern, replacement, text)
    return text


def digest(path: Path) -> str:
    """Of the bytes; of a checkpoint, of names, types and values of its tensors."""
    if path.suffix == ".pt":
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        digits = hashlib.sha256()
        for name, value in state.items():
            digits.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digits.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digits.hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_compared(path: Path) -> bool:
    """Not logs, databases, pictures drawn, or what holds the time it was made."""
    left_out = {".mdb", ".log", ".lock", ".png", ".html", ".npz", ".parquet"}
    parts = set(path.parts)
    return (path.suffix not in left_out and not parts & {"photos.index", "logs"}) or path.name == "epoch_latest.pt"


def record(output: Path, checkout: Path) -> None:
    """Runs every command in a new folder; writes one text file each, and the digests of what they left."""
    output.mkdir(parents=True)
    names = subprocess.run(
        [sys.executable, "-c", "from cn_clip.cli import COMMANDS; print(*COMMANDS, sep='\\n')"],
        env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, encoding="utf-8", check=True,
    ).stdout.splitlines()  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        prepare(folder, checkout)
        commands = {**COMMANDS, **{f"help-{one.replace(' ', '-')}": f"{one} --help" for one in names}}
        for title, words in commands.items():
            text = run(["-m", "cn_clip", *shlex.split(words)], folder, checkout)
            (output / f"{title}.txt").write_text(f"cn-clip {words}\n{text}", encoding="utf-8")
            print(title, text.split("\n", 1)[0], flush=True)
        files = sorted(one for one in folder.rglob("*") if one.is_file() and is_compared(one.relative_to(folder)))
        digests = {str(one.relative_to(folder)): digest(one) for one in files}
    (output / "files.json").write_text(json.dumps(digests, indent=0, ensure_ascii=False), encoding="utf-8")
    print(f"{len(commands)} commands and {len(digests)} files are recorded in {output}")


def prepare(folder: Path, checkout: Path) -> None:
    """The embedded pictures as a dataset, as a folder of pictures and as folders of classes."""
    code = """
from pathlib import Path
from cn_clip.demo import emoji
from cn_clip.emoji_pack import load
emoji.write_dataset(Path("data"))
packed = load()[:40]
for number, one in enumerate(packed):
    for place in (Path("pictures") / f"{number:03}.webp", Path("classes") / str(number % 4) / f"{number:03}.webp"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(one.picture)
Path("labels.txt").write_text("".join(one.name + "\\n" for one in packed[:4]), encoding="utf-8")
"""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)


def compare(before: Path, after: Path) -> int:
    """Prints how the recordings differ; the number of differences."""
    num_different = 0
    names = sorted({one.name for folder in (before, after) for one in folder.glob("*.txt")})
    for name in names:
        texts = [
            still((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else ""
            for folder in (before, after)
        ]
        if texts[0] != texts[1]:
            num_different += 1
            lines = difflib.unified_diff(*(text.splitlines() for text in texts), "before", "after", lineterm="", n=0)
            print(name, *lines, sep="\n  ")
    files = [json.loads((folder / "files.json").read_text(encoding="utf-8")) for folder in (before, after)]
    for name in sorted(files[0].keys() | files[1].keys()):
        if files[0].get(name) != files[1].get(name):
            num_different += 1
            print(f"{name}: other bytes")
    print(f"{len(names)} commands and {len(files[1])} files compared, {num_different} different")
    return num_different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parts = parser.add_subparsers(dest="what", required=True)
    recording = parts.add_parser("record")
    recording.add_argument("output", type=Path)
    recording.add_argument("--checkout", type=Path, default=ROOT)
    comparing = parts.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.what == "record":
        record(given.output, given.checkout.resolve())
    else:
        sys.exit(1 if compare(given.before, given.after) else 0)


if __name__ == "__main__":
    main()
