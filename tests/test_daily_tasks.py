"""Daily tasks in sentence-transformers, open_clip and here: every cell of the table of docs/encoder.md is run.

`make test-families` installs the other two, and runs all three columns.
"""

import itertools
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import ROOT
from model_hub import TOKEN, UPLOADS, ModelHub, serving
from PIL import Image

from cn_clip import zoo
from cn_clip.clip import Encoder
from cn_clip.clip.model import CLIP

DIMENSIONS, LABELS = 64, ["cat", "dog", "rain"]


@dataclass(frozen=True)
class Task:
    """What is done, in Chinese and English, and the code of each: lines that leave `out`; "" where it has no way.

    shape: of `out`, where that is an array.
    """

    chinese: str
    english: str
    theirs: str
    open_clip: str
    ours: str
    shape: tuple[int, ...] | None = None


TASKS = [
    Task(
        "打开模型",
        "open a model",
        'out = model = SentenceTransformer("my-model")',
        'model, _, preprocess = open_clip.create_model_and_transforms("tiny")\n'
        'tokenizer = open_clip.get_tokenizer("tiny")\nout = model.eval()',
        'out = encoder = Encoder("my-model")',
    ),
    Task(
        "文本变向量",
        "texts to vectors",
        "out = texts_ND = model.encode(TEXTS, normalize_embeddings=True)",
        "with torch.no_grad():\n    out = texts_ND = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()",
        "out = texts_ND = encoder.encode_texts(TEXTS)",
        (3, DIMENSIONS),
    ),
    Task(
        "图片文件变向量",
        "picture files to vectors",
        "out = images_ND = model.encode([Image.open(path) for path in PATHS], normalize_embeddings=True)",
        "pixels = torch.stack([preprocess(Image.open(path)) for path in PATHS])\n"
        "with torch.no_grad():\n    out = images_ND = model.encode_image(pixels, normalize=True).numpy()",
        "out = images_ND = encoder.encode_images(PATHS)",
        (4, DIMENSIONS),
    ),
    Task(
        "相似度",
        "similarity",
        "out = model.similarity(texts_ND, images_ND)",
        "out = texts_ND @ images_ND.T",
        "out = encoder.similarity(texts_ND, images_ND)",
        (3, 4),
    ),
    Task(
        "零样本分类：标签和概率，带提示模板",
        "zero-shot labels and probabilities, with templates",
        'prompts = [f"a photo of {label}" for label in LABELS]\n'
        "classes_CD = model.encode(prompts, normalize_embeddings=True)\n"
        "out = torch.softmax(100 * model.similarity(images_ND, classes_CD), dim=1)",
        "with torch.no_grad():\n"
        "    classes_DC = open_clip.build_zero_shot_classifier(\n"
        '        model, tokenizer, LABELS, [lambda label: f"a photo of {label}"]\n'
        "    )\n"
        "out = (model.logit_scale.exp().item() * torch.tensor(images_ND) @ classes_DC).softmax(dim=1)",
        "out = encoder.classify(PATHS, LABELS).probabilities",
        (4, 3),
    ),
    Task(
        "最近的 k 个",
        "the nearest k",
        "hits = util.semantic_search(texts_ND, images_ND, top_k=2)\n"
        'out = np.array([[hit["corpus_id"] for hit in row] for row in hits])',
        "out = torch.tensor(texts_ND @ images_ND.T).topk(2).indices",
        "out = encoder.top_k(texts_ND, images_ND, 2).indices",
        (3, 2),
    ),
    Task(
        "一个文件夹，分批，有进度条",
        "a folder, in batches, with a progress bar",
        'paths = sorted(Path("pictures").glob("*.png"))\n'
        "batches = [paths[start : start + 2] for start in range(0, len(paths), 2)]\n"
        "rows = [model.encode([Image.open(path) for path in batch]) for batch in tqdm(batches, disable=True)]\n"
        "out = np.concatenate(rows)",
        'paths = sorted(Path("pictures").glob("*.png"))\n'
        "batches = [paths[start : start + 2] for start in range(0, len(paths), 2)]\n"
        "with torch.no_grad():\n"
        "    rows = [\n"
        "        model.encode_image(torch.stack([preprocess(Image.open(path)) for path in batch]), normalize=True)\n"
        "        for batch in tqdm(batches, disable=True)\n"
        "    ]\n"
        "out = torch.cat(rows).numpy()",
        'out = encoder.encode_images(sorted(Path("pictures").glob("*.png")), batch_size=2, progress=True)',
        (4, DIMENSIONS),
    ),
    Task(
        "来自生成器，不读成列表",
        "from a generator, never made a list",
        "stream = (Image.open(path) for path in PATHS)\nrows = []\n"
        "while batch := list(itertools.islice(stream, 2)):\n    rows.append(model.encode(batch))\n"
        "out = np.concatenate(rows)",
        "stream = (preprocess(Image.open(path)) for path in PATHS)\nrows = []\n"
        "with torch.no_grad():\n"
        "    while batch := list(itertools.islice(stream, 2)):\n"
        "        rows.append(model.encode_image(torch.stack(batch), normalize=True))\n"
        "out = torch.cat(rows).numpy()",
        "out = encoder.encode_images((Image.open(path) for path in PATHS), batch_size=2)",
        (4, DIMENSIONS),
    ),
    Task(
        "NumPy 数组当图片",
        "NumPy arrays as pictures",
        "out = model.encode([Image.fromarray(ARRAY)])",
        "with torch.no_grad():\n"
        "    out = model.encode_image(preprocess(Image.fromarray(ARRAY))[None], normalize=True).numpy()",
        "out = encoder.encode_images(ARRAY)",
        (1, DIMENSIONS),
    ),
    Task(
        "张量，留在设备上",
        "tensors, left on the device",
        "out = model.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)",
        "with torch.no_grad():\n    out = model.encode_text(tokenizer(TEXTS), normalize=True)",
        'out = encoder.encode_texts(TEXTS, output="torch")',
        (3, DIMENSIONS),
    ),
    Task(
        "int8 向量",
        "int8 vectors",
        'out = quantize_embeddings(images_ND, precision="int8", calibration_embeddings=images_ND)',
        "",
        'out = encoder.encode_images(PATHS, dtype="int8")',
        (4, DIMENSIONS),
    ),
    Task(
        "半精度计算",
        "compute in half precision",
        'half = SentenceTransformer("my-model", model_kwargs={"dtype": torch.bfloat16})\n'
        "out = half.encode(TEXTS, convert_to_tensor=True).float()",
        'half = open_clip.create_model("tiny", precision="bf16").eval()\n'
        "with torch.no_grad():\n    out = half.encode_text(tokenizer(TEXTS), normalize=True).float()",
        'out = Encoder("my-model", precision="bf16").encode_texts(TEXTS)',
        (3, DIMENSIONS),
    ),
    Task(
        "用 ONNX Runtime 计算文本和图片",
        "texts and pictures by ONNX Runtime",
        "",
        "",
        'onnx = Encoder("my-model", backend="onnx", download_root="exports")\n'
        "out = onnx.similarity(onnx.encode_texts(TEXTS), onnx.encode_images(PATHS))",
        (3, 4),
    ),
    Task(
        "存下来，再打开",
        "save, and open again",
        'model.save("copy")\nout = SentenceTransformer("copy").encode(TEXTS)',
        'torch.save(model.state_dict(), "copy.pt")\n'
        'again = open_clip.create_model("tiny", pretrained="copy.pt").eval()\n'
        "with torch.no_grad():\n    out = again.encode_text(tokenizer(TEXTS), normalize=True).numpy()",
        'encoder.save("copy-of-mine")\nout = Encoder("copy-of-mine").encode_texts(TEXTS)',
        (3, DIMENSIONS),
    ),
    Task(
        "推到 Hugging Face hub",
        "push to the Hugging Face hub",
        'out = model.push_to_hub("me/theirs", token=TOKEN)',
        'api = HfApi(token=TOKEN)\napi.create_repo("me/open-clip")\n'
        'out = api.upload_file(repo_id="me/open-clip", path_or_fileobj="copy.pt", path_in_repo="open_clip.pt")',
        'out = encoder.push_to_hub("me/ours", token=TOKEN)',
    ),
    Task(
        "交给别的进程（pickle）",
        "hand it to another process (pickle)",
        "out = len(pickle.dumps(model)) // 1000",
        "out = len(pickle.dumps(model)) // 1000",
        "out = len(pickle.dumps(encoder)) // 1000",
    ),
]


def table(*, in_chinese: bool) -> str:
    """The table of the page: how many lines each takes; ours as it is, if it is one."""
    head = ["任务", "sentence-transformers", "open_clip", "这里"] if in_chinese else ["Task", *COLUMNS[:2], "Here"]
    rows = [head, ["---"] * 4]
    for task in TASKS:
        rows.append([task.chinese if in_chinese else task.english, *(_lines(task, one, in_chinese) for one in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


COLUMNS = ["sentence-transformers", "open_clip", "ours"]


def code_of(task: Task, column: str) -> str:
    return {"sentence-transformers": task.theirs, "open_clip": task.open_clip, "ours": task.ours}[column]


def _lines(task: Task, column: str, in_chinese: bool) -> str:
    code = code_of(task, column)
    count = len(code.splitlines())
    if not code:
        return "没有" if in_chinese else "none"
    if column == "ours":
        return "<br>".join(f"`{re.sub(r'^out = ', '', line)}`" for line in code.splitlines())
    return f"{count} 行" if in_chinese else f"{count} line{'s' if count > 1 else ''}"


# --- they run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A folder with `my-model`, as all but open_clip open it, and pictures; and a hub."""
    folder = tmp_path_factory.mktemp("tasks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"))
    Encoder(model, device="cpu").save(folder / "my-model")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (4, 40, 50, 3), dtype=np.uint8)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / "pictures" / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch, serving(patch, folder / "cache") as hub:
        patch.chdir(folder)
        # The client reads both when it is imported, which may have been for a hub that is gone.
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        paths = sorted((folder / "pictures").glob("*.png"))
        given = {"TEXTS": ["a cat", "dog", "rainy day"], "PATHS": paths, "LABELS": LABELS, "ARRAY": arrays[0]}
        modules = {"np": np, "torch": torch, "Image": Image, "Path": Path, "pickle": pickle, "itertools": itertools}
        yield {**given, **modules, "TOKEN": TOKEN, "hub": hub, "folder": folder, "Encoder": Encoder}


def run_column(column: str, namespace: dict[str, Any]) -> None:
    """Runs the tasks in order, in one namespace, and prints what each took."""
    for task in TASKS:
        code = code_of(task, column)
        if not code:
            continue
        exec(compile(code, f"{column}: {task.english}", "exec"), namespace)
        out = namespace["out"]
        print(f"{column:22} {task.english:50} {len(code.splitlines())} lines  {str(getattr(out, 'shape', out))[:60]}")
        if task.shape is not None:
            assert tuple(out.shape) == task.shape, task.english


@UPLOADS
def test_every_task_runs_here(workplace: dict[str, Any]) -> None:
    run_column("ours", dict(workplace))
    server: ModelHub = workplace["hub"]
    assert "config.json" in server.repos["me/ours"]


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
def test_every_task_runs_in_sentence_transformers(workplace: dict[str, Any]) -> None:
    import sentence_transformers
    from sentence_transformers.util.quantization import quantize_embeddings
    from tqdm import tqdm

    names: dict[str, Any] = {
        "SentenceTransformer": sentence_transformers.SentenceTransformer,
        "util": sentence_transformers.util,
    }
    run_column(
        "sentence-transformers", {**workplace, **names, "quantize_embeddings": quantize_embeddings, "tqdm": tqdm}
    )


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
def test_every_task_runs_in_open_clip(workplace: dict[str, Any]) -> None:
    import open_clip
    from huggingface_hub import HfApi
    from tqdm import tqdm

    vision = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    config = workplace["folder"] / "tiny.json"
    config.write_text(json.dumps({"embed_dim": DIMENSIONS, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    run_column("open_clip", {**workplace, "open_clip": open_clip, "HfApi": HfApi, "tqdm": tqdm})


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_table_of_the_page_is_that_of_the_tasks(language: str) -> None:
    page = ROOT / "docs" / ("encoder.md" if language == "zh" else "en/encoder.md")
    assert table(in_chinese=language == "zh") in page.read_text(encoding="utf-8")
