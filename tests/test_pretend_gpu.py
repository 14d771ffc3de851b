"""Commands with `--device cuda` on a GPU that is not there: what they wait for, copy and launch, and how they end.

`make test-pretend-gpu` builds the rig of tools/pretend_gpu and runs these; its README says what can be seen so. Numbers
are zeros there, so nothing is said of them here.
"""

import importlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import small_lmdb

from cn_clip import zoo
from cn_clip.clip.model import CLIP
from cn_clip.demo import emoji

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "pretend_gpu"))
rig: Any = importlib.import_module("rig")

pytestmark = pytest.mark.pretend_gpu

MODEL = ["--vision-model=ViT-Tiny-64", "--text-model=BERT-Tiny-chinese"]
# Seven steps within one epoch, of which the last closes the sixth; nothing but steps is due meanwhile.
BATCH, STEPS, PAIRS = 4, 7, 64
TRAIN = ["--train-data=data/lmdb/train", "--val-data=data/lmdb/valid", "--logs=runs", f"--batch-size={BATCH}"]
TRAIN += [f"--valid-batch-size={BATCH}", "--num-workers=1", "--warmup=1", "--log-interval=100", *MODEL]
# What a step may copy without pinned memory: the runtime takes that much along with the call.
PAGEABLE_LIMIT = 64 * 1024
# A picture of 64 x 64 pixels as bytes, and with it at most as many bytes of tokens, keys and numbers.
PICTURE_BYTES, REST_BYTES = 3 * 64 * 64, 1024


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The rig, in a folder with small data and weights; prints its table at the end."""
    folder = Path(os.environ.get("PRETEND_GPU", ROOT / ".pretend-gpu")).absolute()
    work = tmp_path_factory.mktemp("pretend")
    write_data(work)
    opened = rig.Rig(folder, work)
    try:
        yield opened
    finally:
        opened.close()
        opened.write_report(folder / "report.json")
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        assert capture is not None
        with capture.global_and_fixture_disabled():  # else it would be shown after failures only
            print(f"\n\n{rig.table(opened.results)}\n\n{folder / 'report.json'}; logs: {work / 'logs'}")


def write_data(work: Path) -> None:
    """Pairs to train on, pictures, classes and random weights of two small models."""
    small_lmdb(work / "data", num_pairs=PAIRS)
    emoji.write_classification(work / "classes", emoji.drawn_classes("twemoji"), vendor="twemoji")
    (work / "pictures").mkdir()
    for one in emoji.load("twemoji")[:12]:
        (work / "pictures" / f"{one.number}.png").write_bytes(one.picture)
    for name, vision in (("vit", "ViT-Tiny-64"), ("rn", "RN-Tiny-64")):
        model = CLIP.from_config(zoo.model_config(vision, "BERT-Tiny-chinese"))
        torch.save({"state_dict": model.state_dict()}, work / f"{name}.pt")


def assert_ended_well(result: Any) -> None:
    assert result.status == 0, result.log[-3000:]
    assert "Traceback" not in result.log, result.log[-3000:]


def trained(gpu: Any, name: str, flags: Sequence[str], *, steps: int = STEPS, **settings: Any) -> Any:
    """The result of training with these flags, in a run of this name."""
    words = ["-m", "cn_clip", "train", *TRAIN, "--device=cuda", f"--max-steps={steps}", f"--name={name}", *flags]
    result = gpu.run(f"train {name}", words, **settings)
    assert_ended_well(result)
    return result


# --- a step of training -----------------------------------------------------------------------------------------------

ACCUM, BF16, AMP = "--accum-freq=2", "--precision=bf16", "--precision=amp"
RESNET = "--vision-model=RN-Tiny-64"
TEACHER = ["--distillation", "--teacher-model-name=Emoji-Tiny"]
FLAGS = {
    "amp": [AMP],
    "bf16": [BF16],
    "fp16": ["--precision=fp16"],
    "fp32": ["--precision=fp32"],
    "default precision": [],
    "accum-freq": [ACCUM, BF16],
    "accum-freq amp": [ACCUM, AMP],
    "multi-positive": ["--multi-positive", BF16],
    "multi-positive accum-freq amp": ["--multi-positive", ACCUM, AMP],
    "distillation": [*TEACHER],
    "distillation accum-freq": [*TEACHER, ACCUM],
    "lora": ["--lora-rank=4"],
    "lora accum-freq": ["--lora-rank=4", ACCUM],
    "grad-checkpointing": ["--grad-checkpointing", BF16],
    "grad-checkpointing accum-freq": ["--grad-checkpointing", ACCUM, AMP],
    "RN-Tiny": [RESNET],
    "RN-Tiny accum-freq amp": [RESNET, ACCUM, AMP],
    "RN-Tiny fp16": [RESNET, "--precision=fp16"],
    "siglip": ["--loss=siglip"],
    "siglip accum-freq": ["--loss=siglip", ACCUM],
    "mask-ratio": ["--mask-ratio=0.5"],
    "mask-ratio accum-freq": ["--mask-ratio=0.5", ACCUM],
    "use-augment freeze-vision": ["--use-augment", "--freeze-vision"],
    "freeze-text": ["--freeze-text"],
    "freeze-text-layers": ["--freeze-text-layers=1"],
    "early-stop": ["--use-flash-attention", "--valid-step-interval=2", "--early-stop=5"],
    "no workers": ["--num-workers=0", "--valid-num-workers=0"],
    "batch accuracy": ["--report-training-batch-acc"],
    "debug tensorboard": ["--debug", "--report-to=tensorboard"],
    "init by name": ["--init=Emoji-Tiny", "--vision-model=RN-Small-64"],
    "clip-weight-path": ["--clip-weight-path=vit.pt", "--bert-weight-path=vit.pt"],
    "save by steps": ["--save-step-frequency=2", "--keep-checkpoints=1"],
    "compile": ["--compile", BF16],
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_step_waits_for_the_step_before_and_for_nothing_else(gpu: Any, name: str) -> None:
    result = trained(gpu, name, FLAGS[name], seconds=1500)
    assert len(result.steps) == len(rig.STEADY)
    assert result.waits == [{"event": 1}] * len(rig.STEADY), result.waits_at
    assert result.largest_pageable <= PAGEABLE_LIMIT
    assert result.bytes_a_picture <= PICTURE_BYTES + REST_BYTES


# --- several processes, going on, too little memory -------------------------------------------------------------------

# Not --use-bn-sync: PyTorch's SyncBatchNorm chooses rows by values of the device, for which it also waits.
PARALLEL = {
    "DDP": [],
    "DDP amp gather-with-grad": [AMP, "--gather-with-grad"],
    "DDP accum-freq": [ACCUM, BF16],
    "DDP skip-aggregate fp16": ["--skip-aggregate", "--precision=fp16"],
    "DDP distillation": [*TEACHER],
    "DDP lora": ["--lora-rank=4"],
    "DDP siglip": ["--loss=siglip"],
    "FSDP2": ["--fsdp"],
    "FSDP2 accum-freq": ["--fsdp", ACCUM, BF16],
    "FSDP2 grad-checkpointing": ["--fsdp", "--grad-checkpointing"],
    "FSDP2 RN-Tiny": ["--fsdp", RESNET],
}


# In its first ten steps, and in every hundredth, DDP measures its own times: two events for each of four.
DDP_TIMING = 8


@pytest.mark.parametrize("name", PARALLEL)
def test_a_step_of_two_processes_waits_for_the_step_before_and_for_nothing_else(gpu: Any, name: str) -> None:
    result = trained(gpu, name, PARALLEL[name], gpus=2, processes=2)
    assert len(result.records) == 2
    events = 1 + (DDP_TIMING if name.startswith("DDP") else 0)
    assert result.waits == [{"event": events}] * len(rig.STEADY), result.waits_at


def test_ddp_waits_for_one_event_once_it_has_measured_itself(gpu: Any) -> None:
    result = trained(gpu, "DDP later", [], gpus=2, processes=2, steps=17)
    later = result.records[0]["steps"][11:15]  # steps 12 to 15, within the second epoch of eight
    assert rig.waits_of(later) == [{"event": 1}] * 4


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_go_on_from_their_checkpoint(gpu: Any, flags: list[str]) -> None:
    name = f"two go on {''.join(flags)}"
    trained(gpu, name, flags, gpus=2, processes=2, steps=2)
    assert re.search(r"loaded checkpoint .*2 steps", trained(gpu, name, flags, gpus=2, processes=2, steps=3).log)


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_run_goes_on_where_it_did_not_begin(gpu: Any, first: str, then: str) -> None:
    name = f"from {first} to {then}"
    trained(gpu, name, [f"--device={first}", "--num-threads=1"], steps=2)
    result = trained(gpu, name, [f"--device={then}", "--num-threads=1"], steps=3)
    assert re.search(r"loaded checkpoint .*2 steps", result.log)
    assert f"Use device: {then}" in result.log
    others = trained(gpu, f"{name} resume", [f"--resume=runs/{name}/checkpoints/epoch_latest.pt", BF16], steps=4)
    assert re.search(r"loaded checkpoint .*3 steps", others.log)


def test_adapters_go_on(gpu: Any) -> None:
    trained(gpu, "lora goes on", ["--lora-rank=4"], steps=2)
    assert re.search(r"loaded checkpoint .*2 steps", trained(gpu, "lora goes on", ["--lora-rank=4"], steps=3).log)


def test_training_takes_the_gpu_that_is_named(gpu: Any) -> None:
    assert "Use device: cuda:1 " in trained(gpu, "second GPU", ["--device=cuda:1", ACCUM, AMP], gpus=2).log
    assert "Use device: cuda:0 " in trained(gpu, "auto", ["--device=auto"], gpus=2, steps=2).log


FEATURES = ["-m", "cn_clip", "features", "--resume=Emoji-Tiny"]
IMAGES = ["--extract-image-feats", "--image-data=data/lmdb/valid/imgs", "--image-feat-output-path=out.images.jsonl"]
TEXTS = ["--extract-text-feats", "--text-data=data/valid_texts.jsonl", "--text-feat-output-path=out.texts.jsonl"]
INDEX = ["-m", "cn_clip", "index", "build", "pictures", "--model=Emoji-Tiny"]
ZEROSHOT = ["-m", "cn_clip", "zeroshot", "--datapath=classes/test", "--label-file=classes/label_cn.txt"]
ZEROSHOT += ["--dataset=emoji", "--save-dir=.", "--num-workers=1", "--resume=Emoji-Tiny"]
TRAINING = ["-m", "cn_clip", "train", *TRAIN, "--max-steps=2"]

REFUSED = {
    "train: GPU of another number": ([*TRAINING, "--name=refused", "--device=cuda:5"], {"gpus": 2}, "there are 2 GPUs"),
    "train: one GPU for two": (
        [*TRAINING, "--name=refused", "--device=cuda:1"],
        {"gpus": 2, "processes": 2},
        "names one GPU for 2 processes",
    ),
    "train: more processes than GPUs": (
        [*TRAINING, "--name=refused"],
        {"gpus": 1, "processes": 2},
        "LOCAL_RANK is 1, but this process sees 1 GPU",
    ),
    "train: batch too large": (
        [*TRAINING, "--name=oom", "--batch-size=24", "--vision-model=RN-Small-64"],
        {"gpu_bytes": 50_000_000},
        "out of memory",
    ),
    "train: model too large": ([*TRAINING, "--name=oom2"], {"gpu_bytes": 8_000_000}, "out of memory"),
    "features: batch too large": (
        [*FEATURES, *IMAGES, "--img-batch-size=512"],
        {"gpu_bytes": 30_000_000},
        "out of memory",
    ),
    "features: model too large": ([*FEATURES, *IMAGES], {"gpu_bytes": 8_000_000}, "out of memory"),
    "index build: model too large": ([*INDEX, "--output=oom.index"], {"gpu_bytes": 8_000_000}, "out of memory"),
    "zeroshot: model too large": (ZEROSHOT, {"gpu_bytes": 8_000_000}, "out of memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_too_few_gpus_or_too_little_memory_end_with_a_sentence(gpu: Any, name: str) -> None:
    words, settings, sentence = REFUSED[name]
    result = gpu.run(name, words, **settings)
    assert result.status == 1, result.log[-3000:]
    assert sentence in result.log
    assert "Traceback" not in result.log, result.log[-3000:]


# --- what uses models -------------------------------------------------------------------------------------------------

ENCODER = """
import torch
from cn_clip.clip import Encoder
for device in (None, "cuda", torch.device("cuda")):
    encoder = Encoder("Emoji-Tiny", device=device, precision="{precision}")
    assert encoder.backend.device == torch.device("cuda", 0), encoder.backend.device
    images, texts = encoder.encode_images(["pictures/{picture}"]), encoder.encode_texts(["你好", "一个红色的苹果"])
    assert (images.shape[0], texts.shape[0]) == (1, 2) and images.dtype == texts.dtype == "float32"
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
def test_an_encoder_computes_on_the_gpu(gpu: Any, precision: str) -> None:
    picture = next((gpu.work / "pictures").iterdir()).name
    assert_ended_well(gpu.run(f"Encoder {precision}", ["-c", ENCODER.format(precision=precision, picture=picture)]))


LOAD_FROM_NAME = """
import pathlib, torch
from PIL import Image
from cn_clip.clip import create_model, load_from_name, tokenize
from cn_clip.clip.loading import load
for device in ("cuda", torch.device("cuda"), "cuda:0", None):
    model, preprocess = load_from_name("Emoji-Tiny", device=device)
    model.eval()
    image = preprocess(Image.open(next(pathlib.Path("pictures").iterdir()))).unsqueeze(0).to("cuda")
    text = tokenize(["皮卡丘", "小火龙"]).to("cuda")
    with torch.no_grad():
        for features in (model.encode_image(image), model.encode_text(text)):
            features /= features.norm(dim=-1, keepdim=True)
        logits, _ = model.get_similarity(image, text)
        assert logits.softmax(dim=-1).cpu().shape == (1, 2)
        assert model(image, text)[2].device == torch.device("cuda", 0)
made = load(create_model("ViT-Tiny-64@BERT-Tiny-chinese"), "cuda", clip_path="vit.pt")
assert made.logit_scale.device == torch.device("cuda", 0)
"""


def test_a_model_is_loaded_onto_the_gpu_as_in_the_guide(gpu: Any) -> None:
    assert_ended_well(gpu.run("load_from_name", ["-c", LOAD_FROM_NAME]))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "amp"])
def test_features_are_fed_from_pinned_memory(gpu: Any, precision: str) -> None:
    flags = ["--device=cuda", f"--precision={precision}", "--img-batch-size=16"]
    result = gpu.run(f"features {precision}", [*FEATURES, *IMAGES, *TEXTS, *flags])
    assert_ended_well(result)
    lines = [(gpu.work / f"out.{kind}.jsonl").read_text().count("\n") for kind in ("images", "texts")]
    assert lines == [PAIRS, PAIRS]
    assert result.largest_pageable <= PAGEABLE_LIMIT
    assert result.bytes_a_picture <= PICTURE_BYTES + REST_BYTES


def test_features_take_the_gpu_that_is_named_and_other_files(gpu: Any) -> None:
    assert_ended_well(gpu.run("features cuda:1", [*FEATURES, *IMAGES, "--device=cuda:1"], gpus=2))
    of_file = ["-m", "cn_clip", "features", "--resume=vit.pt", *MODEL, *IMAGES]
    assert_ended_well(gpu.run("features of a checkpoint", of_file))


def test_features_are_searched_and_judged(gpu: Any) -> None:
    assert_ended_well(gpu.run("features", [*FEATURES, *IMAGES, *TEXTS]))
    topk = ["-m", "cn_clip", "topk", "--image-feats=out.images.jsonl", "--text-feats=out.texts.jsonl", "--device=cuda"]
    for query in ("text", "image"):
        assert_ended_well(
            gpu.run(f"topk {query}", [*topk, f"--query={query}", "--top-k=10", f"--output={query}.jsonl"])
        )
    recall = ["-m", "cn_clip", "recall", "data/valid_texts.jsonl", "text.jsonl", "recall.json"]
    assert_ended_well(gpu.run("recall", recall))


def test_an_index_is_built_and_searched(gpu: Any) -> None:
    assert_ended_well(gpu.run("index build", [*INDEX, "--output=photos.index", "--device=cuda", "--precision=fp16"]))
    picture = next((gpu.work / "pictures").iterdir())
    for query in (["红苹果"], [f"--image={picture}"]):
        search = ["-m", "cn_clip", "search", "photos.index", *query, "--k=3", "--device=cuda"]
        assert_ended_well(gpu.run(f"search {query[0][:7]}", search))


SERVE = """
import json, os, signal, threading, time, urllib.request
from cn_clip import cli

def ask():
    url, data = "http://127.0.0.1:{port}", json.dumps({{"model": "Emoji-Tiny", "input": "红苹果"}}).encode()
    request = urllib.request.Request(url + "/v1/embeddings", data, {{"content-type": "application/json"}})
    for _ in range(600):
        try:
            answer = json.load(urllib.request.urlopen(request))
            break
        except OSError:
            time.sleep(0.2)
    print("answered with", len(answer["data"][0]["embedding"]), "numbers", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=ask).start()
cli.main(["serve", "--model=Emoji-Tiny", "--port={port}", "--device={device}", "--no-page"])
"""


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_service_answers(gpu: Any, device: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = gpu.run(f"serve {device}", ["-c", SERVE.format(port=port, device=device)])
    assert_ended_well(result)
    assert "answered with 256 numbers" in result.log


EVALUATE = ["evaluate", "muge", "--data=data", "--split=valid", "--model=Emoji-Tiny", "--output=evaluate"]
PROBE = ["linear-probe", "--train=classes/test", "--test=classes/test", "--model=Emoji-Tiny", "--c=1"]
BENCH = ["bench", "--model=Emoji-Tiny", "--backends=torch", "--batch-sizes=2", "--repeats=2", "--warmup=1"]
EXPORT = ["export", "onnx", "--model-arch=ViT-Tiny-64", "--pytorch-ckpt-path=vit.pt", "--save-onnx-path=onnx"]
COMMANDS = {
    "zeroshot": [*ZEROSHOT, "--device=cuda"],
    "evaluate": ["-m", "cn_clip", *EVALUATE],
    "linear-probe": ["-m", "cn_clip", *PROBE],
    "bench": ["-m", "cn_clip", *BENCH, "--precisions", "fp32", "fp16", "bf16"],
    "demo": ["-m", "cn_clip", "demo", "--output=demo", "--steps=2"],
    "export": ["-m", "cn_clip", *EXPORT, "--convert-vision"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_uses_a_model_ends_well(gpu: Any, name: str) -> None:
    assert_ended_well(gpu.run(name, COMMANDS[name], seconds=1500))


def test_what_is_done_with_a_run_ends_well(gpu: Any) -> None:
    trained(gpu, "finished", ["--precision=fp32"], steps=2)
    latest = "runs/finished/checkpoints/epoch_latest.pt"
    mixed = ["-m", "cn_clip", "wise-ft", "--zeroshot=vit.pt", f"--finetuned={latest}", "--val-data=data/lmdb/valid"]
    assert_ended_well(gpu.run("wise-ft", [*mixed, "--alphas=0,0.5,1", *MODEL]))
    report = ["-m", "cn_clip", "report", "runs/finished", "--data=data/lmdb/valid", "--output=report.html"]
    assert_ended_well(gpu.run("report", report))
    assert_ended_well(gpu.run("checkpoint info", ["-m", "cn_clip", "checkpoint", "info", latest]))


SMALL = {"vision_model": "ViT-Tiny-64", "text_model": "BERT-Tiny-chinese", "batch_size": "4", "num_workers": "1"}
SMALL |= {"valid_batch_size": "4"}
SCRIPTS: dict[str, dict[str, str]] = {path.stem: {} for path in sorted((ROOT / "run_scripts").glob("muge_*.sh"))}
SCRIPTS["muge_finetune_vit-b-16_rbt-base_distillation"] = {"teacher_model_name": "Emoji-Tiny"}


@pytest.fixture(scope="module")
def user_folder(gpu: Any) -> Path:
    """A DATAPATH as the scripts expect it."""
    folder: Path = gpu.work / "user"
    for dataset in ("MUGE", "emoji"):
        (folder / "datasets" / dataset).mkdir(parents=True)
    (folder / "pretrained_weights").mkdir()
    shutil.copytree(gpu.work / "data" / "lmdb", folder / "datasets" / "MUGE" / "lmdb")
    shutil.copytree(gpu.work / "classes", folder / "datasets" / "emoji", dirs_exist_ok=True)
    shutil.copy(gpu.work / "vit.pt", folder / "pretrained_weights" / "clip_cn_vit-b-16.pt")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains(gpu: Any, user_folder: Path, script: str) -> None:
    command = ["bash", ROOT / "run_scripts" / f"{script}.sh", user_folder, "--max-steps=2"]
    assert_ended_well(gpu.run_program(script, command, **{**SMALL, **SCRIPTS[script]}))


def test_a_script_trains_on_two_gpus(gpu: Any, user_folder: Path) -> None:
    command = ["bash", ROOT / "run_scripts" / "muge_finetune_vit-b-16_rbt-base.sh", user_folder, "--max-steps=2"]
    assert_ended_well(gpu.run_program("script on two GPUs", command, gpus=2, GPUS_PER_NODE="2", **SMALL))


def test_the_script_of_zero_shot_evaluation_ends_well(gpu: Any, user_folder: Path) -> None:
    words = [0, user_folder, "emoji", "ViT-Tiny-64", "BERT-Tiny-chinese", "vit.pt"]
    command = ["bash", ROOT / "run_scripts" / "zeroshot_eval.sh", *words]
    assert_ended_well(gpu.run_program("zeroshot_eval.sh", command))
