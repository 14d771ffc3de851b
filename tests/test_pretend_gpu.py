"""Commands with `--device cuda` on a GPU that is not there: what they wait for, copy and launch, and how they end.

`make test-pretend-gpu` builds the rig of tools/pretend_gpu and runs these; its README says what can be seen so. Numbers
are zeros there, so nothing is said of them here.
"""

import importlib
import os
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
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        assert terminal is not None
        terminal.write_line(f"\n\n{rig.table(opened.results)}\n\n{folder / 'report.json'}; logs: {work / 'logs'}")


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
