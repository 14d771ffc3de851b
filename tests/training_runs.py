"""Short training runs of a tiny model on 24 emoji pictures, started as users start them; for several test files."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import warm_python

from cn_clip.demo import emoji

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--vision-model=ViT-Tiny-64", "--text-model=BERT-Tiny-chinese", "--num-threads=1", "--num-workers=0"]
TINY += ["--valid-num-workers=0", "--device=cpu", "--precision=fp32", "--warmup=2", "--log-interval=1"]


def run(script: str, *args: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [warm_python.program(), f"cn_clip/{script}.py", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def train(data: Path, logs: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return run("training/main", f"--train-data={data}", f"--logs={logs}", *TINY, *args)


def small_lmdb(folder: Path, *, num_pairs: int = 24) -> Path:
    """Splits train and valid of as many emoji pictures and pairs each; returns the folder that holds them."""
    emoji.write_dataset(folder)
    for split in ("train", "valid"):
        for kind in ("imgs.tsv", "texts.jsonl"):
            path = folder / f"{split}_{kind}"
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[:num_pairs]), encoding="utf-8")
    kept = [json.loads(line) for line in (folder / "train_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "train_texts.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({**row, "image_ids": row["image_ids"][:1]}) + "\n" for row in kept)
    built = run("preprocess/build_lmdb_dataset", f"--data_dir={folder}", "--splits=train,valid")
    assert built.returncode == 0, built.stderr
    return folder / "lmdb"


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def losses(text: str) -> list[str]:
    return re.findall(r"\| Loss: ([\d.]+)", text)
