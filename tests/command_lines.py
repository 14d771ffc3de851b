"""A line of arguments for every command, over one small world of files; for tests that walk all commands.

A slot such as `{lmdb}` is a path of the world. `LINES` says of each slot whether the command reads a file or a folder
there, or writes one; `world` makes what is read.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dataset_files import jsonl_line, picture, tsv_line, write_split

from cn_clip import cli
from cn_clip.clip.loading import open_model

GOLDEN = Path(__file__).parent / "golden" / "eval"
NUM_PICTURES = 4
NAMES = ("红色", "绿色", "蓝色", "白色")
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


class Line(NamedTuple):
    """Arguments with slots, and what each slot is: "read file", "read folder", "write file" or "write folder"."""

    arguments: str
    slots: dict[str, str]


SMALL_RUN = "--vision-model RN-Small-64 --text-model BERT-Tiny-chinese --batch-size 2 --valid-batch-size 2 "
SMALL_RUN += "--max-epochs 1 --num-workers 0 --valid-num-workers 0 --device cpu --precision fp32 --num-threads 1"
MODEL = "--device cpu --num-threads 1"
LINES: dict[str, Line] = {
    "demo": Line("--output {out} --steps 0", {"out": "write folder"}),
    "models": Line("", {}),
    "download": Line("ViT-B-16 --download-root {out}", {"out": "write folder"}),
    "dataset build": Line(
        "--data-dir {data} --splits train --lmdb-dir {out}", {"data": "read folder", "out": "write folder"}
    ),
    "dataset from-folder": Line(
        "--folder {pictures} --table {table} --output {out}",
        {"pictures": "read folder", "out": "write folder", "table": "read file"},
    ),
    "dataset check": Line("--data-dir {data} --splits train", {"data": "read folder"}),
    "dataset shards": Line(
        "--lmdb {lmdb} --num-shards 1 --output {out}", {"lmdb": "read folder", "out": "write folder"}
    ),
    "train": Line(
        f"--train-data {{lmdb}} --val-data {{lmdb2}} --logs {{out}} --name x {SMALL_RUN} --resume {{checkpoint}} "
        "--clip-weight-path {clip} --bert-weight-path {bert} --reset-optimizer --reset-data-offset",
        {
            "lmdb": "read folder",
            "lmdb2": "read folder",
            "out": "write folder",
            "checkpoint": "read file",
            "clip": "read file",
            "bert": "read file",
        },
    ),
    "features": Line(
        f"--resume {{checkpoint}} --extract-image-feats --extract-text-feats --image-data {{images}} "
        f"--text-data {{texts}} --image-feat-output-path {{out}} --text-feat-output-path {{out2}} {MODEL}",
        {
            "checkpoint": "read file",
            "images": "read folder",
            "texts": "read file",
            "out": "write file",
            "out2": "write file",
        },
    ),
    "topk": Line(
        "--image-feats {image_feats} --text-feats {text_feats} --output {out} --device cpu",
        {"image_feats": "read file", "text_feats": "read file", "out": "write file"},
    ),
    "recall": Line(
        "{standard} {predictions} {out}", {"standard": "read file", "predictions": "read file", "out": "write file"}
    ),
    "report": Line(
        f"--checkpoint {{checkpoint}} --data {{lmdb}} --output {{out}} {MODEL}",
        {"checkpoint": "read file", "lmdb": "read folder", "out": "write file"},
    ),
    "zeroshot": Line(
        f"--datapath {{classes}} --label-file {{labels}} --resume {{checkpoint}} --save-dir {{out}} {MODEL}",
        {"classes": "read folder", "labels": "read file", "checkpoint": "read file", "out": "write folder"},
    ),
    "evaluate": Line(
        f"flickr30k-cn --split test --data {{data}} --checkpoint {{checkpoint}} --output {{out}} {MODEL}",
        {"data": "read folder", "checkpoint": "read file", "out": "write folder"},
    ),
    "linear-probe": Line(
        f"--checkpoint {{checkpoint}} --train {{classes}} --test {{classes2}} --cache {{cache}} {MODEL}",
        {"checkpoint": "read file", "classes": "read folder", "classes2": "read folder", "cache": "read folder"},
    ),
    "compare": Line("红={result} --output {out}", {"result": "read file", "out": "write file"}),
    "index build": Line(
        f"{{pictures}} --model {{checkpoint}} --metadata {{table}} --output {{out}} {MODEL}",
        {"pictures": "read folder", "checkpoint": "read file", "table": "read file", "out": "write folder"},
    ),
    "index add": Line(
        f"{{index}} {{pictures}} --metadata {{table}} {MODEL}",
        {"index": "read folder", "pictures": "read folder", "table": "read file"},
    ),
    "index remove": Line("{index} a.png", {"index": "read folder"}),
    "index info": Line("{index}", {"index": "read folder"}),
    "index check": Line("{index}", {"index": "read folder"}),
    # It would go on until it is ended: of what is no folder it says so.
    "index watch": Line("{table} --output {out}", {"table": "read file", "out": "write folder"}),
    "index duplicates": Line("{index}", {"index": "read folder"}),
    "search": Line(
        f"{{index}} 红色 --model {{checkpoint}} --image {{picture}} --grid {{out}} {MODEL}",
        {"index": "read folder", "checkpoint": "read file", "picture": "read file", "out": "write file"},
    ),
    "wise-ft": Line(
        "--zeroshot {checkpoint} --finetuned {checkpoint2} --alpha 0.5 --output {out}",
        {"checkpoint": "read file", "checkpoint2": "read file", "out": "write file"},
    ),
    "serve": Line(
        "{index} --model {checkpoint} --label-sets {labels} --host 256.0.0.1",
        {"index": "read folder", "checkpoint": "read file", "labels": "read file"},
    ),
    "mcp": Line(
        "{index} --model {checkpoint} --device cuda:99",
        {"index": "read folder", "checkpoint": "read file"},
    ),
    "checkpoint info": Line("{checkpoint}", {"checkpoint": "read file"}),
    "checkpoint strip": Line("{checkpoint} --output {out}", {"checkpoint": "read file", "out": "write file"}),
    "checkpoint average": Line(
        "{checkpoint} {checkpoint2} --output {out}",
        {"checkpoint": "read file", "checkpoint2": "read file", "out": "write file"},
    ),
    "checkpoint export": Line(
        "{checkpoint} --output {safetensors}", {"checkpoint": "read file", "safetensors": "write file"}
    ),
    "convert": Line("{checkpoint} {out} --to pt", {"checkpoint": "read file", "out": "write file"}),
    "export tensorrt": Line(
        "--model-arch Emoji-Tiny --convert-text --text-onnx-path {onnx} --save-tensorrt-path {out} --fp16",
        {"onnx": "read file", "out": "write file"},
    ),
    "export coreml": Line(
        "--model-arch Emoji-Tiny --pytorch-ckpt-path {checkpoint} --convert-text --save-coreml-path {out}",
        {"checkpoint": "read file", "out": "write file"},
    ),
    "export onnx": Line(
        "--model-arch Emoji-Tiny --pytorch-ckpt-path {checkpoint} --convert-text --save-onnx-path {out} "
        "--precisions fp32",
        {"checkpoint": "read file", "out": "write file"},
    ),
    "bench": Line(
        "--model {checkpoint} --backends torch --precisions fp32 --batch-sizes 1 --towers text --repeats 1 --warmup 0 "
        "--device cpu --output {out}",
        {"checkpoint": "read file", "out": "write folder"},
    ),
}


def world(folder: Path) -> dict[str, Path]:
    """Makes what the commands read: slot name -> path."""
    pictures = [picture(colour, size=(64, 64)) for colour in COLOURS]
    data = folder / "data"
    split = ([tsv_line(n, one) for n, one in enumerate(pictures)], [jsonl_line(n, NAMES[n], [n]) for n in range(4)])
    for name in ("train", "valid"):
        write_split(data, *split, split=name)
    texts = [jsonl_line(n, f"{NAMES[n % 4]}{n}", [n]) for n in range(10)]
    write_split(data, [tsv_line(n, pictures[n % 4]) for n in range(10)], texts, split="test")  # enough for recall at 10
    cli.main(["dataset", "build", "--data-dir", str(data), "--splits", "train,valid,test"])
    (folder / "pictures").mkdir()
    (folder / "cache").mkdir()
    for number, one in enumerate(pictures):
        (folder / "pictures" / f"{'abcd'[number]}.png").write_bytes(one)
        (folder / "classes" / str(number)).mkdir(parents=True)
        (folder / "classes" / str(number) / "a.png").write_bytes(one)
    rows = "".join(f"{'abcd'[n]}.png,{NAMES[n]}\n" for n in range(4))
    (folder / "table.csv").write_text(f"image,text\n{rows}", encoding="utf-8")
    (folder / "labels.txt").write_text("\n".join(NAMES), encoding="utf-8")
    model, checkpoint = open_model("Emoji-Tiny")
    from cn_clip.clip.weights.writing import write_checkpoint

    for name in ("one", "two"):
        write_checkpoint(folder / f"{name}.pt", model.state_dict(), checkpoint)
    for name in ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl", "valid_predictions.jsonl"):
        shutil.copy(GOLDEN / name, folder)
    np.save(folder / "x.npy", np.zeros(3))
    (folder / "result.json").write_text('{"success": true, "scoreJson": {"r1": 1.0}}', encoding="utf-8")
    return {
        "data": data,
        "lmdb": data / "lmdb" / "train",
        "lmdb2": data / "lmdb" / "valid",
        "images": data / "lmdb" / "train" / "imgs",
        "texts": data / "train_texts.jsonl",
        "pictures": folder / "pictures",
        "picture": folder / "pictures" / "a.png",
        "classes": folder / "classes",
        "classes2": folder / "classes",
        "cache": folder / "cache",
        "labels": folder / "labels.txt",
        "table": folder / "table.csv",
        "checkpoint": folder / "one.pt",
        "checkpoint2": folder / "two.pt",
        "clip": folder / "one.pt",
        "bert": folder / "one.pt",
        "image_feats": folder / "valid_imgs.img_feat.jsonl",
        "text_feats": folder / "valid_texts.txt_feat.jsonl",
        "standard": GOLDEN / "valid_texts.jsonl",
        "predictions": folder / "valid_predictions.jsonl",
        "result": folder / "result.json",
        "onnx": folder / "x.npy",
        "index": folder / "index",
    }


def with_index(folder: Path) -> dict[str, Path]:
    """`world`, and an index of its pictures."""
    paths = world(folder)
    words = LINES["index build"].arguments.format(**paths, out=paths["index"]).split()
    cli.main(["index", "build", *words])
    return paths


def line_of(command: str, paths: dict[str, Path], output: Path, **other: str) -> list[str]:
    """The words of a command that writes into the folder `output`, on a copy of the index. other: paths of slots."""
    values = {name: str(paths.get(name, output / f"out.{name}")) for name in LINES[command].slots}
    if command.startswith("index ") and "index" in values:
        values["index"] = str(shutil.copytree(paths["index"], output / "copy.index"))
    return [*command.split(), *(word.format(**{**values, **other}) for word in LINES[command].arguments.split())]


def writing_commands() -> list[str]:
    """The commands that write a file or folder, or change one."""
    changing = {"index add", "index remove"}
    return [
        command
        for command, line in LINES.items()
        if command in changing or any(kind.startswith("write") for kind in line.slots.values())
    ]
