"""Records tests/golden/faces.npz: what the datasets, losses and zero-shot functions of cn_clip 1.6.0 give.

REFERENCE/bin/python tools/golden/record_faces.py
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import lmdb  # noqa: E402
import numpy as np  # noqa: E402
import reference_shim  # noqa: E402, F401
import torch  # noqa: E402
from deterministic import SMALL_MODEL, picture_bytes, state_dict, training_batches  # noqa: E402
from PIL import Image  # noqa: E402

from cn_clip.clip.model import CLIP  # noqa: E402
from cn_clip.clip.utils import image_transform  # noqa: E402
from cn_clip.eval import data as eval_data  # noqa: E402
from cn_clip.eval import zeroshot_evaluation  # noqa: E402
from cn_clip.training import data, train  # noqa: E402

SPLIT = ROOT / "tests" / "golden" / "lmdb_reference" / "lmdb" / "train"
PICTURES = ROOT / "tests" / "golden" / "lmdb_reference" / "train_imgs.tsv"
TEXTS = ROOT / "tests" / "golden" / "lmdb_reference" / "train_texts.jsonl"
SETTINGS: dict[str, Any] = {"batch_size": 3, "valid_batch_size": 2, "num_workers": 0, "valid_num_workers": 0, "seed": 5}
SETTINGS |= {"use_augment": False, "vision_model": "ViT-B-16", "img_batch_size": 3, "text_batch_size": 3}
TEMPLATES = [lambda c: f"{c}的照片", lambda c: f"“{c}”"]


def small() -> torch.nn.Module:
    model = CLIP(**SMALL_MODEL)
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(shapes).items()})
    return model.float().eval()


def training(folder: str) -> dict[str, Any]:
    copies = [shutil.copytree(SPLIT, Path(folder) / name) for name in ("items", "train", "val")]  # LMDB opens each once
    dataset = data.LMDBDataset(str(copies[0]), max_txt_length=12, resolution=32)
    items = [dataset[number] for number in range(len(dataset))]
    args = SimpleNamespace(**SETTINGS, train_data=str(copies[1]), val_data=str(copies[2]))
    values: dict[str, Any] = {
        "pixels": torch.stack([item[0] for item in items]).numpy(),
        "tokens": torch.stack([item[1] for item in items]).numpy(),
        "ends": [item[2] for item in items],
    }
    for name, info in data.get_data(args, epoch_id=1, max_txt_length=12).items():
        values[f"order_{name}"] = list(info.sampler)
        values[f"counts_{name}"] = (info.dataloader.num_samples, info.dataloader.num_batches)
        values[f"texts_{name}"] = np.concatenate([texts.numpy() for _, texts, _ in info.dataloader])
    return values


def numbered(folder: Path) -> tuple[str, str]:
    """Pictures and texts of the split whose ids are numbers, which are all that cn_clip 1.6.0 evaluates."""
    pictures = [line.split(b"\t") for line in PICTURES.read_bytes().splitlines() if line.split(b"\t")[0].isdigit()]
    with lmdb.open(str(folder / "imgs"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in [*pictures, [b"num_images", str(len(pictures)).encode()]]:
            transaction.put(key, value)
    texts = TEXTS.read_text(encoding="utf-8").splitlines()
    lines = [line for line in texts if isinstance(json.loads(line)["text_id"], int)]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "imgs"), str(folder / "texts.jsonl")


def evaluation(folder: Path) -> dict[str, Any]:
    image_data, text_data = numbered(folder)
    args = SimpleNamespace(**SETTINGS, image_data=image_data, text_data=text_data)
    images, texts = eval_data.get_eval_img_dataset(args), eval_data.get_eval_txt_dataset(args, max_txt_length=9)
    picture_batches, text_batches = list(images.dataloader), list(texts.dataloader)
    return {
        "image_ids": np.concatenate([ids.numpy() for ids, _ in picture_batches]),
        "image_means": np.concatenate([pixels.mean(dim=(2, 3)).numpy() for _, pixels in picture_batches]),
        "text_ids": np.concatenate([ids.numpy() for ids, _ in text_batches]),
        "text_tokens": np.concatenate([tokens.numpy() for _, tokens in text_batches]),
    }


def losses() -> dict[str, Any]:
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **k: self
    pixels, tokens = (torch.from_numpy(one) for one in next(iter(training_batches())))
    args = SimpleNamespace(accum_freq=1, mask_ratio=0, aggregate=False, report_training_batch_acc=True)
    args.local_device_rank, args.distillation, args.kd_loss_weight = 0, False, 0.5
    entropy = torch.nn.CrossEntropyLoss()
    loss, shares = train.get_loss(small(), pixels, tokens, entropy, entropy, args)
    args.distillation = True
    teacher = SimpleNamespace(module=SimpleNamespace(get_feature=lambda images: (images.flatten(1)[:, :48],)))
    taught, _ = train.get_loss(small(), pixels, tokens, entropy, entropy, args, teacher_model=teacher)
    return {"loss": loss.item(), "shares": [shares["i2t"].item(), shares["t2i"].item()], "taught_loss": taught.item()}


def zeroshot() -> dict[str, Any]:
    model, args = small(), SimpleNamespace(context_length=12, gpu="cpu", img_batch_size=4, num_workers=0)
    classifier = zeroshot_evaluation.zero_shot_classifier(model, ["猫", "狗", "鸟"], TEMPLATES, args)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(6):
            place = Path(folder) / f"00{number % 3}"
            place.mkdir(exist_ok=True)
            Image.fromarray(picture_bytes(number)).save(place / f"{number}.png")
        args.datapath = folder
        batches = list(eval_data.get_zeroshot_dataset(args, image_transform(32)).dataloader)
    zeroshot_evaluation.accuracy = lambda *a, **k: (0.0, 0.0)  # the reference's does not run with NumPy 2.4
    _, probabilities = zeroshot_evaluation.run(model, classifier, batches, args)
    return {"classifier": classifier.numpy(), "probabilities": probabilities.numpy()}


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"}
    torch.distributed.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        values = {**training(folder), **evaluation(Path(folder)), **losses(), **zeroshot()}
    np.savez_compressed(ROOT / "tests" / "golden" / "faces.npz", **values)
    print({name: np.shape(value) for name, value in values.items()})


if __name__ == "__main__":
    main()
