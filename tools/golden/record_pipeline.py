"""Records tests/golden/pipeline: what the reference's scripts make of real photos with Chinese captions, on the CPU.

REFERENCE/bin/python tools/golden/record_pipeline.py FLICKR8K_CN_FOLDER [centre|first|all|zeroshot] …

The photos are for research only: ids, features and results are kept, no picture and no text.
"""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import deterministic  # noqa: E402
import numpy as np  # noqa: E402
import pipeline_weights  # noqa: E402
import reference_run  # noqa: E402  (before anything that imports torchvision)
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from pipeline_weights import GOLDEN, IMAGE_BIAS, PARTS, TEXT_BIAS, ZEROSHOT_TEMPLATES, write_zeroshot  # noqa: E402

import cn_clip.clip as clip  # noqa: E402
from cn_clip.clip.utils import create_model, image_transform  # noqa: E402

CENTRE_PICTURES = 64


def empty_model() -> torch.nn.Module:
    return create_model(f"{pipeline_weights.VISION}@{pipeline_weights.TEXT}").float().eval()


def tensors(model: torch.nn.Module, make: Any) -> dict[str, torch.Tensor]:
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return {name: torch.from_numpy(value) for name, value in make(shapes).items()}


@torch.no_grad()
def record_centre(data: Path) -> None:
    """Last biases of both towers, minus the mean of what they add to on the first pictures and their captions."""
    model = empty_model()
    model.load_state_dict(tensors(model, deterministic.state_dict))
    with (data / "valid_imgs.tsv").open(encoding="utf-8") as lines:
        pictures = [base64.urlsafe_b64decode(line.split("\t")[1]) for line in islice(lines, CENTRE_PICTURES)]
    transform = image_transform(model.visual.input_resolution)
    images = model.encode_image(torch.stack([transform(Image.open(io.BytesIO(picture))) for picture in pictures]))
    with (data / "valid_texts.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 5 * CENTRE_PICTURES)]
    tokens = clip.tokenize(texts, context_length=52)
    hidden = model.bert(tokens, attention_mask=tokens.ne(0).float())[0][:, 0]
    state = model.state_dict()
    centred = {IMAGE_BIAS: state[IMAGE_BIAS] - images.mean(0), TEXT_BIAS: state[TEXT_BIAS] - hidden.mean(0)}
    GOLDEN.mkdir(parents=True, exist_ok=True)
    np.savez(GOLDEN / "centre.npz", **{name: value.half().numpy() for name, value in centred.items()})


def write_part(data: Path, folder: Path, num_pictures: int) -> None:
    """The first pictures of valid and the captions of just these."""
    with (data / "valid_imgs.tsv").open(encoding="utf-8") as source:
        lines = list(islice(source, num_pictures))
    (folder / "valid_imgs.tsv").write_text("".join(lines), encoding="utf-8")
    ids = {int(line.split("\t")[0]) for line in lines}
    with (data / "valid_texts.jsonl").open(encoding="utf-8") as source:
        kept = [line for line in source if ids.issuperset(json.loads(line)["image_ids"])]
    (folder / "valid_texts.jsonl").write_text("".join(kept), encoding="utf-8")


def run(folder: Path, module: str, *arguments: str) -> str:
    """What a script of the reference prints; it runs in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, str(ROOT / "benchmarks" / "reference_run.py"), f"cn_clip.{module}", *arguments]
    done = subprocess.run(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True, encoding="utf-8"
    )
    return done.stdout


def run_scripts(folder: Path) -> dict[str, str]:
    """The user's commands in the order of the guides; file names are relative, so that lines are the same anywhere."""
    features = ["--image-feats=valid_imgs.img_feat.jsonl", "--text-feats=valid_texts.txt_feat.jsonl", "--top-k=10"]
    printed = {"build": run(folder, "preprocess.build_lmdb_dataset", "--data_dir=.", "--splits=valid")}
    printed["extract"] = run(
        folder,
        "eval.extract_features",
        "--extract-image-feats",
        "--extract-text-feats",
        "--image-data=lmdb/valid/imgs",
        "--text-data=valid_texts.jsonl",
        "--img-batch-size=32",
        "--text-batch-size=32",
        "--context-length=52",
        "--resume=model.pt",
        f"--vision-model={pipeline_weights.VISION}",
        f"--text-model={pipeline_weights.TEXT}",
    )
    printed["topk"] = run(folder, "eval.make_topk_predictions", *features, "--output=valid_predictions.jsonl")
    printed["topk_tr"] = run(folder, "eval.make_topk_predictions_tr", *features, "--output=valid_tr_predictions.jsonl")
    printed["transform"] = run(folder, "eval.transform_ir_annotation_to_tr", "--input=valid_texts.jsonl")
    found = ("valid_texts.jsonl", "valid_predictions.jsonl", "result.json")
    printed["recall"] = run(folder, "eval.evaluation", *found)
    found = ("valid_texts.tr.jsonl", "valid_tr_predictions.jsonl", "tr_result.json")
    printed["recall_tr"] = run(folder, "eval.evaluation_tr", *found)
    return printed


def save_checkpoint(folder: Path) -> None:
    state = {f"module.{key}": value for key, value in tensors(empty_model(), pipeline_weights.state_dict).items()}
    torch.save({"epoch": 0, "step": 0, "name": "golden", "state_dict": state}, folder / "model.pt")


def lines_of(path: Path, step: int = 1) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        yield from islice(stream, 0, None, step)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sample(folder: Path, picture_step: int, text_step: int) -> dict[str, Any]:
    """Some feature lines in files of their own, their arrays, and what the reference finds among just these."""
    inner = folder / "sample"
    inner.mkdir()
    arrays = {}
    for name, field, step in (
        ("valid_imgs.img_feat.jsonl", "image", picture_step),
        ("valid_texts.txt_feat.jsonl", "text", text_step),
    ):
        lines = list(lines_of(folder / name, step))
        (inner / name).write_text("".join(lines), encoding="utf-8")
        records = [json.loads(line) for line in lines]
        arrays[f"{field}_ids"] = np.array([record[f"{field}_id"] for record in records])
        arrays[f"{field}s"] = np.array([record["feature"] for record in records], dtype=np.float32)
    features = ["--image-feats=valid_imgs.img_feat.jsonl", "--text-feats=valid_texts.txt_feat.jsonl", "--top-k=10"]
    run(inner, "eval.make_topk_predictions", *features, "--output=valid_predictions.jsonl")
    run(inner, "eval.make_topk_predictions_tr", *features, "--output=valid_tr_predictions.jsonl")
    return {"arrays": arrays, "sha256": {path.name: sha256(path) for path in sorted(inner.iterdir())}}


def record_part(data: Path, name: str) -> None:
    num_pictures, picture_step, text_step = PARTS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_part(data, folder, num_pictures)
        save_checkpoint(folder)
        printed = run_scripts(folder)
        sampled = sample(folder, picture_step, text_step)
        content = {
            "printed": printed,
            "predictions": [list(json.loads(x).values()) for x in lines_of(folder / "valid_predictions.jsonl")],
            "tr_predictions": [list(json.loads(x).values()) for x in lines_of(folder / "valid_tr_predictions.jsonl")],
            "result": (folder / "result.json").read_text(encoding="utf-8"),
            "tr_result": (folder / "tr_result.json").read_text(encoding="utf-8"),
            "sha256": {name: sha256(folder / name) for name in ("valid_texts.tr.jsonl",)},
            "sample_sha256": sampled["sha256"],
        }
    packed = gzip.compress(json.dumps(content).encode(), mtime=0)
    (GOLDEN / f"{name}.json.gz").write_bytes(packed)
    np.savez_compressed(GOLDEN / f"{name}.npz", **sampled["arrays"])
    print(name, content["result"], content["tr_result"])


def record_zeroshot() -> None:
    """The zero-shot script on made-up pictures, with templates of our own; the pictures' order is turned round."""
    import cn_clip.eval.cvinw_zeroshot_templates as templates

    templates.openai_templates = [template.replace("{}", "%s").__mod__ for template in ZEROSHOT_TEMPLATES]
    reference_run.stay_on_cpu()
    to_numpy = torch.Tensor.numpy
    # The script calls float() on an array of one number, which NumPy 2.5 no longer takes.
    torch.Tensor.numpy = lambda self: to_numpy(self).reshape(() if self.shape == (1,) else self.shape)  # type: ignore
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_zeroshot(folder)
        save_checkpoint(folder)
        files = {"datapath": "test", "label-file": "label_cn.txt", "index": "index.json", "resume": "model.pt"}
        towers = {"vision-model": pipeline_weights.VISION, "text-model": pipeline_weights.TEXT}
        settings = {**files, **towers, "save-dir": ".", "dataset": "waves", "num-workers": "0"}
        sys.argv = ["zeroshot_evaluation", *(f"--{name}={value}" for name, value in settings.items())]
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_module("cn_clip.eval.zeroshot_evaluation", run_name="__main__")
        content = {"printed": printed.getvalue(), "written": (folder / "waves.json").read_text(encoding="utf-8")}
    (GOLDEN / "zeroshot.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(content["printed"][-60:])


def main() -> None:
    data = Path(sys.argv[1])
    for part in sys.argv[2:] or ["centre", *PARTS, "zeroshot"]:
        if part == "centre":
            record_centre(data)
        elif part == "zeroshot":
            record_zeroshot()
        else:
            record_part(data, part)


if __name__ == "__main__":
    main()
